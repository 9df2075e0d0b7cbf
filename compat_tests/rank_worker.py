"""One process of a run of ours: ``rank_worker.py FOLDER OUT CASE ...``, started by ``rank_runs`` or ``mlx.launch``.

FOLDER holds a model of each family; OUT.<rank> gets what each case logged and left behind.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from compiling import is_uncompiled, uncompiled_if
from rank_cases import CASES, datasets_of, derive, load, lora_of, metrics_of, optimizers_of, settings_of, summed

from hf_mlx.blas import load_openblas

# Before anything asks MLX which process this is.
load_openblas()
TIMED = ("runtime", "per_second", "total_flos")


def build(case: dict[str, Any], folder: Path, out: str, **keywords: Any) -> Any:
    """The trainer of a case."""
    import mlx.nn as nn
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments
    from trl import DPOConfig, RewardConfig, SFTConfig

    from hf_mlx import MLXDPOTrainer, MLXRewardTrainer, MLXSFTTrainer, MLXTrainer

    rows, held = datasets_of(case)
    model = folder / case.get("family", "llama")
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = load(case, model)
    if case.get("output_router_logits"):
        base.config.output_router_logits = True
    settings = settings_of(case, out)
    keywords = {"train_dataset": rows, "eval_dataset": held, "processing_class": tokenizer} | keywords
    keywords = metrics_of(case) | keywords
    if case.get("trainer") == "lm":
        torch.manual_seed(3)
        lora = get_peft_model(base, LoraConfig(**lora_of(case)))
        keywords.setdefault("data_collator", DataCollatorForSeq2Seq(tokenizer))
        keywords = optimizers_of(case, lora) | keywords
        return derive(MLXTrainer, case)(lora, TrainingArguments(**settings), **keywords)
    lora = LoraConfig(**lora_of(case)) if case.get("adapter", True) else None
    if case.get("trainer") == "dpo":
        return derive(MLXDPOTrainer, case)(model=base, args=DPOConfig(**settings), peft_config=lora, **keywords)
    if case.get("trainer") == "reward":
        return derive(MLXRewardTrainer, case)(model=base, args=RewardConfig(**settings), peft_config=lora, **keywords)
    if case.get("own") == "native":
        keywords["loss"] = lambda logits, labels, mask: nn.losses.cross_entropy(logits, labels, reduction="none")
    return derive(MLXSFTTrainer, case)(base, SFTConfig(**settings), peft_config=lora, **keywords)


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A log without what a clock makes."""
    return [{k: v for k, v in entry.items() if not any(part in k for part in TIMED)} for entry in history]


def describe(trainer: Any) -> dict[str, Any]:
    """What a case logged and left behind; ``exact`` differs as soon as one bit does."""
    trainer._base.write_back()
    named = {name: p.detach().numpy() for name, p in trainer.model.named_parameters() if p.requires_grad}
    exact = {name: np.ascontiguousarray(array).tobytes().hex() for name, array in sorted(named.items())}
    import hashlib

    return {
        "max_steps": trainer.state.max_steps,
        "log": untimed(trainer.state.log_history),
        "weights": summed(named),
        "exact": hashlib.sha256(json.dumps(exact).encode()).hexdigest(),
        "world": [trainer.args.world_size, trainer.args.process_index, trainer.accelerator.num_processes],
    }


def count_exchanges(trainer: Any, folder: Path) -> int:
    """How often the graph of a trainer's update exchanges something with other processes."""
    import mlx.core as mx

    step = trainer.session.step
    grads = step._bundles.pack({name: mx.zeros_like(array) for name, array in step.params.items()})
    sums = {name: mx.array(1.0) for name in ("loss", "micro_batches", *step.objective.metrics)}
    hyper = {key: mx.array(value, mx.float32) for key, value in step.optimizer.hyper(1, 1e-3).items()}
    params, state, metrics = step._update_carried(step._params, step._state, (grads, sums), hyper)
    file = folder.with_name(f"{folder.name}-{trainer.args.process_index}.dot")
    arrays = [array for slot in state.values() for array in slot.values()]
    mx.export_to_dot(str(file), [*params.values(), *arrays, *metrics.values()])
    text = file.read_text()
    return sum(text.count(name) for name in ("AllReduce", "AllGather", "Send", "Recv", "ReduceScatter"))


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from hf_mlx.processes.world import the_world

    folder, out, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    made: dict[str, Any] = {}
    for name in names:
        with uncompiled_if(is_uncompiled(name)):
            trainer = build(CASES[name], folder, f"{out}-{name}")
            trainer.train()
            made[name] = describe(trainer)
        Path(f"{out}.{the_world().rank}").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
