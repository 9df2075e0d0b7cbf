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

#: One in thirty runs has a first gradient of some 1e-9. Beside an epsilon of 1e-8 its rounding decides the update of
#: that element, and a large step makes much of it.
STEADY = {"learning_rate": 1e-3, "adam_epsilon": 1e-6}
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
    "by_length": {"rows": 16, "train_sampling_strategy": "group_by_length"} | STEADY,
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
# Pairs of answers; LORA and BASE are as above, and a step that does not run away.
_PAIRS = {"trainer": "dpo", "learning_rate": 1e-3, "gradient_accumulation_steps": 2}
PAIRS: dict[str, dict[str, Any]] = {
    name: _PAIRS | case for name, case in {
        "pairs": {"rows": 13, "num_train_epochs": 2},
        "pairs_evaluated": {
            "rows": 10, "eval_rows": 7, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2,
            "adam_epsilon": STEADY["adam_epsilon"],
        },
        "pairs_full": {"rows": 9, "adapter": False, "sync_ref_model": True, "optim": "sgd", "ref_model_sync_steps": 1},
        "pairs_weighed": {
            "rows": 11, "loss_type": ["sigmoid", "bco_pair"], "loss_weights": [1.0, 0.2],
            "use_weighting": True, "ld_alpha": 0.5, "logging_steps": 2,
        },
        "pairs_sorted": {"rows": 12, "loss_type": ["aot"], "label_smoothing": 0.1, "per_device_train_batch_size": 3},
        "pairs_experts": {"rows": 10, "family": "mixtral", "output_router_logits": True},
        "pairs_stream": {"rows": 9, "shards": 1, "max_steps": 3},
        "pairs_split": {
            "rows": 13, "accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 6,
            "gradient_accumulation_steps": 1,
        },
    }.items()
}  # fmt: skip

#: Pairs of texts and a model that scores each; ``margin`` is no field of the configuration: a column of the rows.
_SCORED = STEADY | {"trainer": "reward", "family": "scored", "gradient_accumulation_steps": 2}
REWARDS: dict[str, dict[str, Any]] = {
    name: _SCORED | case for name, case in {
        "rewards": {"rows": 13, "margin": True, "num_train_epochs": 2},
        "rewards_evaluated": {
            "rows": 14, "eval_rows": 7, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2,
            "center_rewards_coefficient": 0.1, "logging_steps": 2,
        },
        "rewards_full": {"rows": 9, "adapter": False, "optim": "sgd", "gradient_accumulation_steps": 1},
        "rewards_stream": {"rows": 9, "shards": 1, "max_steps": 3},
    }.items()
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
        # Upstream reads a stream that ends before its first step for ever.
        rounds = -(-case["rows"] // (3 * case["per_device_train_batch_size"]))
        case["gradient_accumulation_steps"] = min(case["gradient_accumulation_steps"], rounds)
    if case.get("label_smoothing_factor"):
        case.pop("loss_type", None)
    if case.get("trainer") == "lm":
        case.pop("loss_type", None), case.pop("padding_free", None)
    if case.get("padding_free"):
        case["max_length"] = None
    if "shards" in case:
        case.pop("train_sampling_strategy", None), case.pop("dataloader_drop_last", None)
    if "shards" in case and case.get("trainer") == "lm":
        # transformers' Trainer has rank 0 read a stream for all, and stops at rows of unlike length.
        del case["trainer"]
    if case.get("dataloader_drop_last"):
        case["rows"] = max(case["rows"], 9)
    return case


def default_case(seed: int) -> dict[str, Any]:
    """The same with AdamW as upstream has it by default, at a learning rate that people use."""
    return drawn_case(seed) | {"learning_rate": random.Random(f"rate-{seed}").choice([2e-5, 2e-4, 1e-3, 1e-2])}


def doubled_case(seed: int) -> dict[str, Any]:
    """A run of two processes that one process of twice the rows equals, drawn at random.

    Nothing is filled and nothing depends on which rows share a micro-batch.
    """
    draw = random.Random(f"doubled-{seed}")
    # With the padding it would be counted how wide a micro-batch is.
    case: dict[str, Any] = {"include_num_input_tokens_seen": "non_padding"}
    case["trainer"] = draw.choice(["sft", "sft", "lm", "dpo"])
    size = case["per_device_train_batch_size"] = draw.choice([1, 2, 3])
    case["gradient_accumulation_steps"] = draw.choice([1, 2, 3])
    case["dataloader_drop_last"] = draw.random() < 0.3
    case["rows"] = draw.randint(6 * size, 10 * size) if case["dataloader_drop_last"] else 2 * size * draw.randint(2, 6)
    case["num_train_epochs"] = draw.choice([1, 2])
    case["seed"] = draw.choice([42, 7, 1234])
    for field, values in {
        "lr_scheduler_type": ["linear", "cosine"], "warmup_steps": [0, 2], "max_grad_norm": [1.0, 0.05, 0.0],
        "weight_decay": [0.0, 0.1], "optim": ["adamw_torch", "sgd"], "logging_steps": [1, 1, 2],
        "train_sampling_strategy": ["random", "sequential"], "adapter": [True, True, False],
    }.items():  # fmt: skip
        case[field] = draw.choice(values)
    case["learning_rate"] = 1e-2 if case["adapter"] and case["trainer"] != "dpo" else 1e-3
    if case["trainer"] != "dpo":
        case["masked"] = draw.random() < 0.5
        case["label_smoothing_factor"] = draw.choice([0.0, 0.0, 0.1])
    if case["trainer"] == "sft" and draw.random() < 0.3:
        case |= {"padding_free": True, "max_length": None}
    if case["trainer"] != "lm" and draw.random() < 0.5:
        # One row at a time: a mean of batches is a mean of rows then.
        case |= {"eval_rows": draw.randint(2, 7), "eval_strategy": "epoch", "per_device_eval_batch_size": 1}
    if case["trainer"] == "lm":
        case["adapter"] = True
    return case | STEADY


class Cases(dict[str, dict[str, Any]]):
    """Cases by name; ``default_N`` and ``doubled_N`` are drawn from any N."""

    def __missing__(self, name: str) -> dict[str, Any]:
        kind, _, seed = name.rpartition("_")
        self[name] = {"default": default_case, "doubled": doubled_case}[kind](int(seed))
        return self[name]


DRAWN = {f"drawn_{seed}": drawn_case(seed) for seed in range(1, 31)}
_HELD = {"rows": 8, "eval_rows": 7, "eval_strategy": "epoch", "per_device_eval_batch_size": 2}
#: What compute_metrics is called with; ``told`` is no field of the configuration: how it is asked for.
PREDICTED: dict[str, dict[str, Any]] = {
    "predicted": _HELD | {"told": "array", "include_for_metrics": ["inputs", "loss"]},
    "predicted_nested": _HELD | {"told": "nested", "trainer": "lm", "eval_rows": 5},
    "predicted_batched": _HELD | {
        "told": "array", "batch_eval_metrics": True, "include_for_metrics": ["inputs", "loss"], "eval_rows": 9,
    },
    "predicted_apart": _HELD | {"told": "nested", "eval_do_concat_batches": False, "include_for_metrics": ["loss"]},
    "predicted_pairs": _HELD | {"told": "array", "trainer": "dpo"},
}  # fmt: skip
_ADAPTED = {"rows": 13, "trainer": "lm", "gradient_accumulation_steps": 2, "num_train_epochs": 2} | STEADY
_SEEN = {"eval_rows": 7, "eval_strategy": "epoch", "per_device_eval_batch_size": 2}
#: Parts of the script's own; ``own`` is no field of the configuration: which.
OWN: dict[str, dict[str, Any]] = {
    "own_optimizer": _ADAPTED | {"own": "optimizer"},
    "own_loader": _ADAPTED | _SEEN | {"own": "loader"},
    "own_loader_whole": {"rows": 12, "own": "whole", "max_steps": 3},
    "own_loss": {
        "rows": 11,
        "own": "loss",
        "masked": True,
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 2,
    }
    | _SEEN,
    "own_loss_func": _ADAPTED | _SEEN | {"own": "loss_func", "told": "array"},
    "own_loss_apart": _ADAPTED | _SEEN | {"own": "loss", "average_tokens_across_devices": False},
    "own_sampler": {"rows": 11, "own": "sampler", "gradient_accumulation_steps": 3, "num_train_epochs": 2} | _SEEN,
}
#: What torchrun cannot record, under the name of what it equals: its ranks do not see each other's cache of rows
#: that were never on a disk.
EQUAL = {"pairs_precomputed": "pairs_evaluated"}
CASES = Cases(NAMED | PAIRS | REWARDS | PREDICTED | OWN | DRAWN)
#: And what is only here: a loss that is compiled into the step.
OWN_EQUAL = {"own_native": "masked"}
CASES["own_native"] = NAMED["masked"] | {"own": "native"}
CASES["pairs_precomputed"] = PAIRS["pairs_evaluated"] | {"precompute_ref_log_probs": True}
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


def pair_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Prompts with two answers, of words of the tokenizer's."""
    draw = np.random.default_rng(seed)

    def words() -> str:
        return " ".join(f"w{word}" for word in draw.integers(0, 253, int(draw.integers(2, 12))))

    return [{"prompt": words(), "chosen": words(), "rejected": words()} for _ in range(count)]


def datasets_of(case: dict[str, Any]) -> tuple[Any, Any]:
    """The train and the evaluation set."""
    from datasets import Dataset

    kind = {"masked": case.get("masked", False), "labelled": case.get("trainer") == "lm"}

    def make(count: int, seed: int) -> Any:
        if case.get("trainer") not in ("dpo", "reward"):
            return Dataset.from_list(token_rows(count, seed, **kind))
        rows = pair_rows(count, seed)
        return Dataset.from_list(
            [row | {"margin": at % 5 / 4} for at, row in enumerate(rows)] if "margin" in case else rows
        )

    train = make(case["rows"], 5)
    if "shards" in case:
        train = train.to_iterable_dataset(num_shards=case["shards"])
    return train, make(case["eval_rows"], 99) if "eval_rows" in case else None


def settings_of(case: dict[str, Any], output_dir: str) -> dict[str, Any]:
    """The fields of the configuration."""
    apart = (
        "told",
        "own",
        "rows",
        "eval_rows",
        "margin",
        "shards",
        "masked",
        "trainer",
        "family",
        "output_router_logits",
        "adapter",
    )
    masked = {"completion_only_loss": True} if case.get("masked") and case.get("trainer") != "lm" else {}
    return (
        BASE | masked | {"output_dir": output_dir, "use_cpu": True} | {k: v for k, v in case.items() if k not in apart}
    )


def derive(trainer: type, case: dict[str, Any]) -> type:
    """The trainer, or what a case makes of it."""
    import torch

    class WithLoader(trainer):
        def get_train_dataloader(self) -> Any:
            loader = torch.utils.data.DataLoader(
                self.train_dataset, batch_size=2, shuffle=True, collate_fn=self.data_collator
            )
            return self.accelerator.prepare(loader) if case["own"] == "loader" else loader

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            rows = self.eval_dataset if eval_dataset is None else eval_dataset
            return self.accelerator.prepare(torch.utils.data.DataLoader(rows, 2, collate_fn=self.data_collator))

    class WithSampler(trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return list(range(len(self.train_dataset)))[::-1]

    class WithLoss(trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
            made = super().compute_loss(model, inputs, return_outputs=return_outputs, **options)
            loss, outputs = made if return_outputs else (made, None)
            # What is gathered is not trained by.
            seen = self.accelerator.gather_for_metrics(inputs["input_ids"].sum().reshape(1))
            self.seen = [*getattr(self, "seen", []), int(seen.sum())]
            loss = loss * 1.5
            return (loss, outputs) if return_outputs else loss

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log(logs | {"seen": float(sum(self.seen))}, start_time)

    made = {"loss": WithLoss, "loader": WithLoader, "whole": WithLoader, "sampler": WithSampler}
    return made.get(case.get("own", ""), trainer)


def optimizers_of(case: dict[str, Any], model: Any) -> dict[str, Any]:
    """The optimizer and the schedule of a case that brings them, or its loss."""
    if case.get("own") == "loss_func":
        return {"compute_loss_func": summed_loss}
    if case.get("own") != "optimizer":
        return {}
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.RMSprop(trained, lr=1e-3, momentum=0.5, eps=STEADY["adam_epsilon"])
    return {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)))}


def summed_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """A loss that divides by what it is told."""
    import torch

    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    summed = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return summed / num_items_in_batch


def metrics_of(case: dict[str, Any]) -> dict[str, Any]:
    """The functions of a case that looks at predictions: numbers that tell rows, their order and their values."""
    if "told" not in case:
        return {}
    seen: list[Any] = []

    def shrink(logits: Any, labels: Any) -> Any:
        # What is computed at padding is nobody's business.
        largest = logits.amax(-1) * (labels != -100)
        return largest if case["told"] == "array" else (largest, {"least": logits.amin(-1)[:, :2]})

    def weigh(value: Any) -> float:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            return float(sum((place + 1) * weigh(item) for place, item in enumerate(value)))
        array = np.abs(np.asarray(value, np.float64))
        return float((array * (1 + np.arange(len(array)).reshape(-1, *[1] * (array.ndim - 1)))).sum() + array.size)

    def compute(prediction: Any, compute_result: bool = True) -> dict[str, float]:
        whole = case.get("trainer") != "dpo"
        made = {"predicted": weigh(prediction.predictions if whole else prediction.predictions[:, :2])}
        made |= {"labelled": weigh(prediction.label_ids)}
        if prediction.losses is not None:
            made["lost"] = weigh(prediction.losses)
        if prediction.inputs is not None:
            ids = prediction.inputs
            made["given"] = weigh(ids if case.get("batch_eval_metrics") is None else ids["input_ids"])
        if case.get("batch_eval_metrics"):
            seen.append(made)
            made = {name: weigh(np.array([one[name] for one in seen])) for name in made}
        return made

    made: dict[str, Any] = {"compute_metrics": compute}
    return made if case.get("trainer") == "dpo" else made | {"preprocess_logits_for_metrics": shrink}


def lora_of(case: dict[str, Any]) -> dict[str, Any]:
    """The fields of the adapter's configuration."""
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    scores = {"task_type": "SEQ_CLS"} if case.get("trainer") == "reward" else {}
    return LORA | scores | ({"target_modules": attention} if "family" in case else {})


def load(case: dict[str, Any], folder: Path) -> Any:
    """The model of a case."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    scores: dict[str, Any] = {"num_labels": 1} if case.get("trainer") == "reward" else {}
    made: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    return made.from_pretrained(folder, dtype=torch.float32, **scores)


def make_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A random fp32 model (hidden 64, 2 layers, vocabulary 256) and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
    )

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
    made: Any = AutoModelForCausalLM
    if family == "scored":
        made, family, experts = AutoModelForSequenceClassification, "llama", {"num_labels": 1}
    config = AutoConfig.for_model(family, **sizes | experts | changes)
    made.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def summed(weights: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Of every array its sum and that of its magnitudes."""
    made = {}
    for name, array in sorted(weights.items()):
        flat = array.astype(np.float64).ravel()
        made[name] = [float(flat.sum()), float(np.abs(flat).sum())]
    return made
