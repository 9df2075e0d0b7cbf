"""A value for each setting whose effect stands in the log, with the settings that it needs beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "max_length": 64,
    "gradient_checkpointing": False,
}
EPOCHS = {"max_steps": -1, "num_train_epochs": 2}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 2}
SGD = {"optim": "sgd"}
COSINE = {"lr_scheduler_type": "cosine_with_restarts"}
GROUPED = {"train_sampling_strategy": "group_by_length"}
BEST = {
    **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
    **{"metric_for_best_model": "loss", "greater_is_better": True},  # the worst, so that it is not the last
}
PACKED = {"packing": True, "max_length": 32}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class Case:
    """A setting whose effect TRL's run of the same script shows too.

    Attributes:
        value: What it is set to.
        beside: What is set in both runs, with it and without it.
        rows: Kind of the training rows.
        stays: It names a thing that is there anyway, so that only equality with TRL is to be seen.
    """

    value: Any
    beside: dict[str, Any] = field(default_factory=dict)
    rows: str = "text"
    stays: bool = False


ARGUMENTS: dict[str, Case] = {
    "per_device_train_batch_size": Case(3),
    "num_train_epochs": Case(1.5, EPOCHS),
    "max_steps": Case(2),
    "gradient_accumulation_steps": Case(2),
    "accelerator_config": Case({"gradient_accumulation_kwargs": {"num_steps": 2}}),
    "seed": Case(7),
    "data_seed": Case(7),
    "dataloader_drop_last": Case(True, {**EPOCHS, "per_device_train_batch_size": 5}),
    "train_sampling_strategy": Case("sequential"),
    "learning_rate": Case(5e-4),
    "lr_scheduler_type": Case("cosine"),
    "lr_scheduler_kwargs": Case({"num_cycles": 2}, COSINE),
    "warmup_steps": Case(0.5),
    "optim": Case("adagrad"),
    "optim_args": Case("momentum=0.9", SGD),
    "weight_decay": Case(0.1),
    "adam_beta1": Case(0.5),
    "adam_beta2": Case(0.9),
    "adam_epsilon": Case(1e-3),
    "max_grad_norm": Case(0.1, SGD),
    "label_smoothing_factor": Case(0.1),
    "logging_strategy": Case("epoch", EPOCHS),
    "logging_steps": Case(2),
    "logging_first_step": Case(True, {"logging_steps": 3}),
    "include_num_input_tokens_seen": Case("non_padding"),
    "eval_strategy": Case("epoch", EPOCHS),
    "eval_steps": Case(0.25, EVALUATES),
    "eval_delay": Case(3, EVALUATES),
    "per_device_eval_batch_size": Case(2, EVALUATES),
    "eval_on_start": Case(True, EVALUATES),
    "dataset_text_field": Case("other", rows="two columns"),
    "eos_token": Case("<|im_end|>"),
    "max_length": Case(12),
    "truncation_mode": Case("keep_end", {"max_length": 12}),
    "shuffle_dataset": Case(True, {"train_sampling_strategy": "sequential"}),
    "packing": Case(True, {"max_length": 32}),
    "packing_strategy": Case("wrapped", PACKED),
    "padding_free": Case(True, {"max_length": None, "include_num_input_tokens_seen": "all"}),
    "eval_packing": Case(False, {**PACKED, **EVALUATES, "per_device_eval_batch_size": 1}),
    "completion_only_loss": Case(False, rows="prompt"),
    "loss_type": Case("dft"),
    "length_column_name": Case("size", {**GROUPED, "remove_unused_columns": False}, rows="two columns"),
    "dataset_num_proc": Case(1, stays=True),
    "pad_token": Case("<s>", stays=True),
    "label_names": Case(["labels"], stays=True),
    "activation_checkpointing": Case(True, stays=True),
    "gradient_checkpointing": Case(True, stays=True),
    "activation_checkpointing_kwargs": Case({"every_n_layers": 2}, {"activation_checkpointing": True}, stays=True),
    "gradient_checkpointing_kwargs": Case({"use_reentrant": False}, {"gradient_checkpointing": True}, stays=True),
}

ADAPTER: dict[str, Case] = {
    "r": Case(2),
    "lora_alpha": Case(32),
    "target_modules": Case("all-linear"),
    "exclude_modules": Case(["v_proj"]),
    "rank_pattern": Case({"v_proj": 2}),
    "alpha_pattern": Case({"v_proj": 64}),
    "use_rslora": Case(True),
    "layers_to_transform": Case([1]),
    "layers_pattern": Case("layers", {"layers_to_transform": [1]}, stays=True),
    "init_lora_weights": Case("gaussian"),
    "modules_to_save": Case(["lm_head"]),
    "trainable_token_indices": Case([40, 41, 42, 43, 44, 45, 46, 47, 48]),
    "use_dora": Case(True),
    "lora_bias": Case(True),
    "bias": Case("all"),
    "target_parameters": Case(["mlp.down_proj.weight"]),
    "ensure_weight_tying": Case(True, {"modules_to_save": ["lm_head"]}, stays=True),
}

# Settings whose effect is which files a run leaves.
FILES: dict[str, Case] = {
    "save_strategy": Case("epoch", EPOCHS),
    "save_steps": Case(2, {"save_strategy": "steps"}),
    "save_total_limit": Case(1, BEST),
    "save_only_model": Case(True, {"save_strategy": "steps", "save_steps": 2}),
    "metric_for_best_model": Case(
        "mean_token_accuracy", {**EVALUATES, "eval_steps": 1, "save_strategy": "best"}, stays=True
    ),
    "greater_is_better": Case(
        True, {**EVALUATES, "eval_steps": 1, "save_strategy": "best", "metric_for_best_model": "loss"}
    ),
}
