"""Training runs on several processes: what both TRL under torchrun and ours under mlx.launch are asked to do."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
BASE = {
    "per_device_train_batch_size": 2, "num_train_epochs": 1, "learning_rate": 1e-2, "lr_scheduler_type": "linear",
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "bf16": False, "gradient_checkpointing": False,
    "seed": 42, "max_grad_norm": 1.0, "disable_tqdm": True, "include_num_input_tokens_seen": "all",
}  # fmt: skip

# What is no field of the configuration: rows, eval_rows, shards (of a stream), masked (share of rows with a prompt),
# trainer ("sft", or "lm" for transformers' own), adapter (False trains all weights).
NAMED: dict[str, dict[str, Any]] = {
    "plain": {"rows": 16},
    "accumulated": {"rows": 16, "gradient_accumulation_steps": 3},
    "filled": {"rows": 13, "gradient_accumulation_steps": 3, "num_train_epochs": 2},
    "cut": {"rows": 9, "gradient_accumulation_steps": 2},
    "masked": {"rows": 14, "masked": True, "gradient_accumulation_steps": 2},
    "own_tokens": {
        "rows": 16, "masked": True, "gradient_accumulation_steps": 3, "average_tokens_across_devices": False,
    },
    "drop_last": {"rows": 13, "gradient_accumulation_steps": 2, "dataloader_drop_last": True},
    "by_length": {"rows": 16, "train_sampling_strategy": "group_by_length"},
    "packed": {"rows": 16, "packing": True, "max_length": 48},
    "padding_free": {"rows": 16, "padding_free": True, "max_length": None},
    "evaluated": {
        "rows": 16, "eval_rows": 7, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2,
    },
    "stream": {"rows": 13, "max_steps": 5, "shards": 1},
    "shards": {"rows": 13, "max_steps": 5, "shards": 4},
    "tail": {"rows": 16, "logging_steps": 3},
    "split": {"rows": 16, "accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 6},
    "few": {"rows": 3, "num_train_epochs": 3},
    "language": {"rows": 14, "trainer": "lm", "gradient_accumulation_steps": 2, "num_train_epochs": 2},
    "language_evaluated": {
        "rows": 11, "trainer": "lm", "eval_rows": 5, "eval_strategy": "epoch", "per_device_eval_batch_size": 2,
    },
    "full": {"rows": 12, "adapter": False, "learning_rate": 1e-3, "gradient_accumulation_steps": 2},
    "experts": {"rows": 10, "family": "mixtral", "output_router_logits": True, "gradient_accumulation_steps": 2},
}  # fmt: skip


def drawn_case(seed: int) -> dict[str, Any]:
    """A run drawn at random."""
    draw = random.Random(seed)
    case: dict[str, Any] = {"rows": draw.randint(4, 26), "masked": draw.random() < 0.5}
    case["gradient_accumulation_steps"] = draw.choice([1, 1, 2, 3, 4])
    case["per_device_train_batch_size"] = draw.choice([1, 2, 2, 3])
    case["num_train_epochs"] = draw.choice([1, 1.5, 2])
    case["logging_steps"] = draw.choice([1, 1, 2, 3])
    case["seed"] = draw.choice([42, 7, 1234])
    case["lr_scheduler_type"] = draw.choice(["linear", "cosine", "constant_with_warmup"])
    case["include_num_input_tokens_seen"] = draw.choice(["all", "non_padding"])
    for share, field, values in (
        (0.25, "dataloader_drop_last", [True]),
        (0.3, "train_sampling_strategy", ["sequential", "group_by_length"]),
        (0.25, "average_tokens_across_devices", [False]),
        (0.3, "max_steps", [2, 5]),
        (0.2, "label_smoothing_factor", [0.1]),
        (0.2, "loss_type", ["dft"]),
        (0.2, "warmup_steps", [2]),
        (0.2, "max_grad_norm", [0.05, 0.0]),
        (0.2, "weight_decay", [0.1]),
        (0.2, "data_seed", [3]),
        (0.2, "optim", ["sgd"]),
        (0.15, "padding_free", [True]),
        (0.2, "trainer", ["lm"]),
    ):
        if draw.random() < share:
            case[field] = draw.choice(values)
    if draw.random() < 0.4:
        case |= {"eval_rows": draw.randint(1, 9), "eval_strategy": "steps", "eval_steps": draw.choice([1, 2])}
        case["per_device_eval_batch_size"] = draw.choice([1, 2, 3])
    if draw.random() < 0.2:
        case |= {"shards": draw.choice([1, 4]), "max_steps": draw.choice([2, 4])}
        if case["shards"] > 1:
            # TRL waits for ever where one process's shards end inside a window.
            case["gradient_accumulation_steps"] = 1
    if case.get("label_smoothing_factor"):
        case.pop("loss_type", None)
    if case.get("trainer") == "lm":
        case.pop("loss_type", None), case.pop("padding_free", None)
    if case.get("padding_free"):
        case["max_length"] = None
    if "shards" in case:
        case.pop("train_sampling_strategy", None), case.pop("dataloader_drop_last", None)
    if case.get("dataloader_drop_last"):
        case["rows"] = max(case["rows"], 9)
    return case


DRAWN = {f"drawn_{seed}": drawn_case(seed) for seed in range(1, 31)}
CASES = NAMED | DRAWN
#: Two epochs of two steps, each saved.
SAVED = NAMED["filled"] | {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}


def token_rows(count: int, seed: int, *, masked: bool = False, labelled: bool = False) -> list[dict[str, Any]]:
    """Rows of token ids of uneven length, some with a prompt that is not trained on."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = draw.integers(0, 253, int(draw.integers(6, 30))).tolist()
        prompt = int(draw.integers(1, len(ids) - 1)) if masked else 0
        row: dict[str, Any] = {"input_ids": ids}
        if labelled:
            row |= {"attention_mask": [1] * len(ids), "labels": [-100] * prompt + ids[prompt:]}
        elif masked:
            row["completion_mask"] = [0] * prompt + [1] * (len(ids) - prompt)
        rows.append(row)
    return rows


def datasets_of(case: dict[str, Any]) -> tuple[Any, Any]:
    """The train and the evaluation set."""
    from datasets import Dataset

    kind = {"masked": case.get("masked", False), "labelled": case.get("trainer") == "lm"}
    train: Any = Dataset.from_list(token_rows(case["rows"], 5, **kind))
    if "shards" in case:
        train = train.to_iterable_dataset(num_shards=case["shards"])
    held = Dataset.from_list(token_rows(case["eval_rows"], 99, **kind)) if "eval_rows" in case else None
    return train, held


def settings_of(case: dict[str, Any], output_dir: str) -> dict[str, Any]:
    """The fields of the configuration."""
    apart = ("rows", "eval_rows", "shards", "masked", "trainer", "family", "output_router_logits", "adapter")
    masked = {"completion_only_loss": True} if case.get("masked") and case.get("trainer") != "lm" else {}
    return (
        BASE | masked | {"output_dir": output_dir, "use_cpu": True} | {k: v for k, v in case.items() if k not in apart}
    )


def lora_of(case: dict[str, Any]) -> dict[str, Any]:
    """The fields of the adapter's configuration."""
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return LORA | ({"target_modules": attention} if "family" in case else {})


def make_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A random fp32 model (hidden 64, 2 layers, vocabulary 256) and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(7)
    vocabulary = {f"w{i}": i for i in range(253)} | {"<pad>": 253, "<eos>": 254, "<unk>": 255}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "mixtral" else {}
    sizes: dict[str, Any] = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "eos_token_id": 254,
        "pad_token_id": 253, "bos_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **sizes | experts | changes)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def summed(weights: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Of every array its sum and that of its magnitudes."""
    made = {}
    for name, array in sorted(weights.items()):
        flat = array.astype(np.float64).ravel()
        made[name] = [float(flat.sum()), float(np.abs(flat).sum())]
    return made
