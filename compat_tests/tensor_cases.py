"""Runs of processes that hold one model together, each beside the same run of one process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from rank_cases import STEADY, token_rows

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
BASE = {
    "per_device_train_batch_size": 2, "max_steps": 20, "learning_rate": 5e-3, "lr_scheduler_type": "linear",
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "bf16": False, "gradient_checkpointing": False,
    "seed": 42, "max_grad_norm": 1.0, "disable_tqdm": True, "use_cpu": True, "include_num_input_tokens_seen": "all",
}  # fmt: skip


FOUR_BITS = {"quantization_config": {"load_in_4bit": True}}


def case(
    model: str = "llama",
    *,
    rows: int = 16,
    eval_rows: int = 0,
    lora: Any = None,
    language: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """A run: a model's folder, rows, and what differs from the plainest adapter and configuration.

    ``language`` has it trained as transformers' own trainer trains.
    """
    described = {"model": model, "rows": rows, "eval_rows": eval_rows, "lora": lora or {}}
    return described | {"language": language, "settings": settings}


NAMED = {
    "plain": case(),
    "four_bits": case(model_init_kwargs=FOUR_BITS),
    "dropped": case(lora={"lora_dropout": 0.2, "use_rslora": True, "r": 6}, gradient_accumulation_steps=2, max_steps=6),
    "mixture": case(
        "experts", lora={"init_lora_weights": "gaussian"}, router_aux_loss_coef=0.0, weight_decay=0.1,
        max_grad_norm=0.05, learning_rate=1e-3, adam_epsilon=1e-6, max_steps=4,
    ),
    "evaluated": case("qwen2", eval_rows=5, eval_strategy="steps", eval_steps=3, max_steps=6,
                      per_device_eval_batch_size=2, gradient_checkpointing=True),
}  # fmt: skip


def drawn_case(seed: int) -> dict[str, Any]:
    """A run drawn at random."""
    draw = random.Random(seed)
    lora: dict[str, Any] = {"r": draw.choice([1, 2, 5, 8]), "lora_alpha": draw.choice([4, 8, 16])}
    lora["lora_dropout"] = draw.choice([0.0, 0.0, 0.1, 0.3])
    lora["use_rslora"] = draw.random() < 0.3
    lora["init_lora_weights"] = draw.choice([True, True, "gaussian", False])
    lora["target_modules"] = draw.choice(
        [
            "all-linear",
            ["q_proj", "v_proj"],
            ["down_proj"],
            ["o_proj", "up_proj"],
            ["gate_proj", "k_proj"],
            ".*mlp.*_proj",
        ]
    )
    settings = {
        "max_steps": draw.choice([5, 8]), "gradient_accumulation_steps": draw.choice([1, 1, 2, 3]),
        "max_grad_norm": draw.choice([1.0, 0.05, 0.0]), "weight_decay": draw.choice([0.0, 0.1]),
        "seed": draw.choice([42, 7]), "optim": draw.choice(["adamw_torch", "sgd"]),
        "gradient_checkpointing": draw.random() < 0.3,
        # As runs of several ranks are drawn: AdamW's own lets the rounding of a gradient of 1e-9 decide an update.
        "adam_epsilon": STEADY["adam_epsilon"],
    }  # fmt: skip
    if draw.random() < 0.3:
        settings |= {"neftune_noise_alpha": 5.0}
    if draw.random() < 0.3:
        settings |= {"packing": True, "max_length": 48}
    if draw.random() < 0.3:
        settings |= {"model_init_kwargs": FOUR_BITS}
    rows: dict[str, Any] = {"rows": draw.randint(8, 20)}
    if draw.random() < 0.4:
        settings |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": draw.choice([1, 3])}
        rows["eval_rows"] = draw.randint(1, 7)
    return case(draw.choice(["llama", "llama", "qwen2"]), lora=lora, **rows, **settings)


DRAWN = {f"drawn_{seed}": drawn_case(seed) for seed in range(1, 19)}


def build(described: dict[str, Any], models: Path, out: str, **keywords: Any) -> Any:
    """The trainer of a case."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments
    from trl import SFTConfig

    from hf_mlx import MLXSFTTrainer, MLXTrainer

    held, language = described["eval_rows"], described["language"]
    keywords = {
        "model": str(models / described["model"]),
        "train_dataset": Dataset.from_list(token_rows(described["rows"], 5, labelled=language)),
        "eval_dataset": Dataset.from_list(token_rows(held, 99, labelled=language)) if held else None,
        "peft_config": LoraConfig(**LORA | described["lora"]),
    } | keywords
    settings = {"output_dir": out, **BASE, **described["settings"]}
    if language:
        collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(models / described["model"]))
        return MLXTrainer(args=TrainingArguments(**settings), data_collator=collator, **keywords)
    return MLXSFTTrainer(args=SFTConfig(**settings), **keywords)


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A log without what a clock makes."""
    timed = ("runtime", "per_second")
    return [{k: v for k, v in entry.items() if not any(part in k for part in timed)} for entry in history]


def play_upstream(described: dict[str, Any], models: Path, out: str, *, doubled: bool) -> dict[str, Any]:
    """What trl's trainer logs and leaves in one process, of float64 or of float32: ``log`` and ``adapter``."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from record_ranks import train_doubled
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    held = described["eval_rows"]
    trainer: Any = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(models / described["model"], dtype=torch.float32),
        SFTConfig(output_dir=out, **BASE | described["settings"]),
        train_dataset=Dataset.from_list(token_rows(described["rows"], 5)),
        eval_dataset=Dataset.from_list(token_rows(held, 99)) if held else None,
        peft_config=LoraConfig(**LORA | described["lora"]),
    )
    train_doubled(trainer) if doubled else trainer.train()
    named = {name: p.detach().numpy() for name, p in trainer.model.named_parameters() if p.requires_grad}
    adapter = {name.replace(".default", ""): array for name, array in named.items()}
    return {"log": untimed(trainer.state.log_history), "adapter": adapter}


def play(described: dict[str, Any], models: Path, out: str) -> dict[str, Any]:
    """Train a case and save its adapter into ``out``-adapter; what it logged."""
    trainer = build(described, models, out)
    trainer.train()
    trainer.save_model(f"{out}-adapter")
    return {"log": json.loads(json.dumps(untimed(trainer.state.log_history))), "traces": trainer.session.step.traces}
