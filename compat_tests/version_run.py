"""What is compared with upstream in each set of versions: run as a program, it prints one line of JSON."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_mlx.backends import prepare_backend

prepare_backend()


def main(*names: str) -> None:
    """Train, save, resume, load and export beside upstream."""
    import mlx.core
    import torch
    import transformers
    from datasets import Dataset
    from pairs import SILENT, tiny_model
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from hf_mlx import MLXDPOTrainer, MLXSFTTrainer, verify_adapter
    from hf_mlx.cli.main import main as command

    warnings.simplefilter("ignore")
    rows = [{"prompt": f"add {n}", "completion": f" is {'x' * (n % 5)}{2 * n}"} for n in range(24)]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in rows]
    settings = {
        **SILENT, "max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
        "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    found: dict[str, Any] = {"versions": {name: version(name) for name in names}}
    # What is imported is what the metadata says.
    found["imported"] = {"transformers": transformers.__version__, "mlx": mlx.core.__version__}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # The base that mlx-lm reads as transformers 5 writes it: others are refused by the export.
        model = str(tiny_model("llama", folder / "model", rope_theta=10_000.0))
        sides = {
            "sft": (SFTTrainer, MLXSFTTrainer, SFTConfig, rows),
            "dpo": (DPOTrainer, MLXDPOTrainer, DPOConfig, pairs),
        }
        for name, (theirs, ours, config, data) in sides.items():
            for side, cls in (("theirs", theirs), ("ours", ours)):
                args = config(output_dir=str(folder / name / side), **settings)
                trainer = cls(
                    model, args=args, train_dataset=Dataset.from_list(data),
                    peft_config=LoraConfig(r=4, target_modules="all-linear"),
                )  # fmt: skip
                trainer.train()
                logged = [entry for entry in trainer.state.log_history if "loss" in entry]
                found[f"{name}, {side}"] = [[entry["loss"], entry["grad_norm"]] for entry in logged]
        adapter = folder / "sft" / "ours" / "checkpoint-4"
        found["verified"] = bool(verify_adapter(adapter, model).ok)
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(adapter))
        found["lora tensors"] = sum("lora_" in key for key in loaded.state_dict())
        args = SFTConfig(output_dir=str(folder / "sft" / "theirs"), **settings)
        resumed = MLXSFTTrainer(
            model, args=args, train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )  # fmt: skip
        resumed.train(resume_from_checkpoint=str(folder / "sft" / "theirs" / "checkpoint-2"))
        found["resumed from trl"] = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
        out = ["export", str(adapter), str(folder / "mlx-lm"), "--format", "mlx-lm", "--base", model]
        found["exported"] = command(out)
    del torch
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
