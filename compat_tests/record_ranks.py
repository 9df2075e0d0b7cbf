"""TRL's and transformers' own numbers under DDP, for every case of ``rank_cases``.

    torchrun --nproc-per-node 2 compat_tests/record_ranks.py rank_records.json [case ...]

on the CPU with gloo; writes ``{"<case>/<ranks>": …}`` into the file, beside what is there. With ``RECORD_DOUBLE=1`` in
the environment everything is computed in float64, from the same float32 weights: what both sides' rounding is seen by.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from rank_cases import (
    CASES,
    SAVED,
    datasets_of,
    derive,
    load,
    lora_of,
    make_model,
    metrics_of,
    optimizers_of,
    settings_of,
    summed,
)
from torch.overrides import TorchFunctionMode

TIMED = ("runtime", "per_second", "total_flos")


class Doubled(TorchFunctionMode):
    """What asks for float32 gets float64: norms, softmaxes and losses of transformers do."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        double = {torch.float32: torch.float64}
        swap = lambda value: double.get(value, value) if isinstance(value, torch.dtype) else value  # noqa: E731
        return function(*map(swap, args), **{key: swap(value) for key, value in (kwargs or {}).items()})


def train(case: dict[str, Any], model: Path, out: str, checkpoint: str | None = None) -> Any:
    """The trainer, after its run, or the rest of it from ``checkpoint`` on."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, Trainer, TrainingArguments
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    rows, held = datasets_of(case)
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = load(case, model)
    if case.get("output_router_logits"):
        base.config.output_router_logits = True
    settings = settings_of(case, out)
    keywords: dict[str, Any] = {"train_dataset": rows, "eval_dataset": held, "processing_class": tokenizer}
    keywords |= metrics_of(case)
    if case.get("trainer") == "lm":
        from transformers import DataCollatorForSeq2Seq

        torch.manual_seed(3)
        lora = get_peft_model(base, LoraConfig(**lora_of(case)))
        keywords["data_collator"] = DataCollatorForSeq2Seq(tokenizer)
        keywords |= optimizers_of(case, lora)
        trainer: Any = derive(Trainer, case)(lora, TrainingArguments(**settings), **keywords)
    else:
        lora = LoraConfig(**lora_of(case)) if case.get("adapter", True) else None
        kinds = {"dpo": (DPOConfig, DPOTrainer), "reward": (RewardConfig, RewardTrainer)}
        config, made = kinds.get(case.get("trainer", ""), (SFTConfig, SFTTrainer))
        trainer = derive(made, case)(model=base, args=config(**settings), peft_config=lora, **keywords)
    if os.environ.get("RECORD_DOUBLE"):
        train_doubled(trainer)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def train_doubled(trainer: Any) -> None:
    """Train in float64, from the float32 weights that the trainer has."""
    for model in filter(None, (trainer.model, getattr(trainer, "ref_model", None))):
        model.double()
        # Grouped products know no float64.
        model.config._experts_implementation = "eager"
    torch.set_default_dtype(torch.float64)
    try:
        with Doubled():
            trainer.train()
    finally:
        torch.set_default_dtype(torch.float32)


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A log without what a clock makes."""
    return [{k: v for k, v in entry.items() if not any(part in k for part in TIMED)} for entry in history]


def resume(models: str, out: str, checkpoint: str) -> None:
    """Run the case that is saved after every step, or the rest of it; writes OUT/log.json."""
    trainer = train(SAVED, Path(models, "llama"), out, checkpoint or None)
    if trainer.args.process_index == 0:
        Path(out, "log.json").write_text(json.dumps(untimed(trainer.state.log_history)))


def main() -> None:
    from accelerate.state import GradientState

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if sys.argv[1] == "--resume":
        resume(*sys.argv[2:])
        return
    file, names = Path(sys.argv[1]), sys.argv[2:] or list(CASES)
    with tempfile.TemporaryDirectory() as folder:
        families = {CASES[name].get("family", "llama") for name in names}
        models = {family: make_model(Path(folder, family), family) for family in families}
        for name in names:
            case = CASES[name]
            try:
                trainer = train(case, models[case.get("family", "llama")], f"{folder}/out")
            except Exception as error:
                print("FAILED", name, type(error).__name__, str(error)[:300], flush=True)
                continue
            history = untimed(trainer.state.log_history)
            # A loader that is not read to its end is taken for the one at hand in the next case.
            GradientState._reset_state()
            held = {k: p.detach().numpy() for k, p in trainer.model.named_parameters() if p.requires_grad}
            made = {"max_steps": trainer.state.max_steps, "log": history, "weights": summed(held)}
            if trainer.args.process_index == 0:
                kept = json.loads(file.read_text()) if file.exists() else {}
                kept[f"{name}/{trainer.args.world_size}"] = made
                lines = (f"{json.dumps(key)}: {json.dumps(kept[key], sort_keys=True)}" for key in sorted(kept))
                file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
                print(name, trainer.args.world_size, history[-1], flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
