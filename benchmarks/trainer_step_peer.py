"""One peer of ``trainer_step.py``, in a process of its own: ``trainer_step_peer.py JOB-AS-JSON RESULT-FILE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sft_step_peer import SEVEN, Clock, MLXMemory, TorchMemory, losses, make_model, random_rows


def main() -> None:
    """Run the job on each of its shapes."""
    job, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    if job["peer"] == "make-model":
        make_model(job)
        output.write_text("[]", encoding="utf-8")
        return
    results = []
    for shape in job["shapes"]:
        rows, tokens = map(int, shape.split("x"))
        entry = {"peer": job["peer"], "shape": shape, "tokens": rows * tokens * job["accumulate"]}
        results.append(entry | run(job, rows, tokens))
        output.write_text(json.dumps(results), encoding="utf-8")


def run(job: dict[str, Any], rows: int, tokens: int) -> dict[str, Any]:
    """The script that both trainers run."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments, default_data_collator

    if job["peer"] == "hf_mlx":
        from hf_mlx import MLXTrainer as Trainer

        clock = Clock(job, MLXMemory())
    else:
        from transformers import Trainer

        clock = Clock(job, TorchMemory())

    class Ticks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.tick()

    ids = random_rows(job, rows * job["accumulate"] * clock.last, tokens)
    args = TrainingArguments(
        output_dir=f"{job['folder']}/out",
        max_steps=clock.last,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=job["accumulate"],
        max_grad_norm=job["clip"],
        bf16=job["dtype"] == "bfloat16",
        gradient_checkpointing=job["on"],
        logging_steps=clock.last,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=getattr(torch, job["dtype"]))
    if job["rank"]:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        options: dict[str, Any] = {"lora_alpha": 2 * job["rank"], "target_modules": SEVEN, "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, LoraConfig(r=job["rank"], **options))
    trainer = Trainer(
        model=model,
        args=args,
        data_collator=default_data_collator,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        callbacks=[Ticks()],
    )
    trainer.train()
    return clock.result() | {"losses": losses(trainer)}


if __name__ == "__main__":
    main()
