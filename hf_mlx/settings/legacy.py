"""Names that transformers and TRL once had, and what to write for them today."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import SettingError

# Same meaning under another name.
RENAMED: Mapping[str, str] = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "max_seq_length": "max_length",
    "use_liger": "use_liger_kernel",
}

# Gone, with the value that asked for nothing (or for what always happens now), and what to do otherwise.
_GONE: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "overwrite_output_dir": ((True, False), "remove it: transformers 5 never empties the folder"),
    "save_safetensors": ((True,), "remove it: safetensors is the one format that is written"),
    "fp16_opt_level": (("O1",), "bf16=True"),
    "fp16_backend": (("auto",), "bf16=True"),
    "half_precision_backend": (("auto",), "bf16=True"),
    "use_mps_device": ((True, False), "remove it: MLX uses the Mac's GPU by itself"),
    "use_ipex": ((False,), "remove it"),
    "past_index": ((-1,), "remove it: transformers 5 has no such feature"),
    "jit_mode_eval": ((False,), "remove it"),
    "torchdynamo": ((None,), "remove it: the step is compiled by MLX"),
    "sharded_ddp": (("", None, False, []), "remove it: memory is unified here"),
    "fsdp_min_num_params": ((0,), "remove it: memory is unified here"),
    "fsdp_transformer_layer_cls_to_wrap": ((None,), "remove it: memory is unified here"),
    "xpu_backend": ((None,), "remove it"),
    "tpu_num_cores": ((None,), "remove it"),
    "tpu_metrics_debug": ((False,), "remove it"),
    "mp_parameters": (("",), "remove it"),
    "ray_scope": (("last",), "remove it: hyperparameter search is not part of this trainer"),
    "dataset_batch_size": ((None, 1000), "remove it: it only sized the tokenizer's batches"),
    "num_of_sequences": ((None, 1024), "packing=True with max_length"),
    "chars_per_token": ((None, 3.6), "packing=True with max_length"),
    # The rows are gone through again anyway, until max_steps or num_train_epochs is reached.
    "infinite": ((None, False, True), "max_steps"),
    "use_legacy_prediction_loop": ((False,), "remove it"),
    # Of DPOConfig, before trl 1.
    "reference_free": ((False,), "remove it: TRL 1 always has a reference"),
    "max_prompt_length": ((None,), "max_length for prompt and answer together; TRL 1 cuts no prompt alone"),
    "max_completion_length": ((None,), "max_length for prompt and answer together"),
    "label_pad_token_id": ((-100, None), "remove it: -100 is what is left out"),
    "padding_value": ((None,), "processing_class with its pad_token"),
    "is_encoder_decoder": ((None, False), "remove it: causal language models are trained here"),
    "generate_during_eval": ((False,), "a TrainerCallback that generates"),
    "model_adapter_name": ((None,), "remove it: the model's active adapter is trained"),
    "ref_adapter_name": ((None,), "remove it: the reference is the adapter as it was"),
    "force_use_ref_model": ((False,), "remove it: MLXDPOTrainer(ref_model=…) is always used"),
    "base_model_attribute_name": (("model",), "remove it"),
    "ref_model_init_kwargs": ((None, {}), "MLXDPOTrainer(ref_model=model) with a model that is loaded already"),
    "tools": ((None,), "a column 'tools' in each row"),
    "max_target_length": ((None,), "max_length for prompt and answer together"),
    "use_logits_to_keep": ((True, False), "remove it: only scored positions are projected here"),
}


def is_older(name: str) -> bool:
    """Whether a keyword of ``TrainingArguments`` or ``SFTConfig`` is one of an older release."""
    return name in RENAMED or name in _GONE or name in _REWRITTEN


def translate_arguments(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Rewrite keyword arguments for an older ``TrainingArguments`` or ``SFTConfig`` into today's.

    Today's constructors raise a ``TypeError`` for these names, so a script that must run unchanged calls this
    first: ``SFTConfig(**translate_arguments(kwargs)[0])``.

    Args:
        kwargs: Keyword arguments, old and new ones mixed. Not modified.

    Returns:
        The keyword arguments of today, and one line for each name that was rewritten.

    Raises:
        SettingError: A name is gone and its value asked for something, or an old and a new name disagree.

    Example:
        >>> translate_arguments({"evaluation_strategy": "steps"})
        ({'eval_strategy': 'steps'}, ['evaluation_strategy is now eval_strategy'])
    """
    old = {name: value for name, value in kwargs.items() if is_older(name)}
    current = {name: value for name, value in kwargs.items() if name not in old}
    notes: list[str] = []
    for name in old.keys() & RENAMED.keys():
        _set(current, name, RENAMED[name], old[name])
    # The rewritten ones may build on the renamed ones, which are all in place now.
    for name, value in old.items():
        if name in RENAMED:
            notes.append(f"{name} is now {RENAMED[name]}")
        elif name in _GONE:
            notes.append(drop(name, value))
        else:
            notes.append(_REWRITTEN[name](current, name, value))
    if current.get("optim") == "adamw_hf":
        current["optim"] = "adamw_torch"
        notes.append('optim="adamw_hf" is now optim="adamw_torch"')
    return current, notes


def _set(current: dict[str, Any], old: str, new: str, value: Any) -> None:
    if new in current and current[new] != value:
        raise SettingError(
            f"{old}={value!r} and {new}={current[new]!r}",
            f"{old} is the older name of {new}; one value is given",
            f"write {new}={current[new]!r}",
        )
    current[new] = value


def drop(name: str, value: Any) -> str:
    """Leave out a name that is gone, and say so.

    Raises:
        SettingError: Its value asked for something.
    """
    harmless, remedy = _GONE[name]
    if not any(value is option or (type(value) is type(option) and value == option) for option in harmless):
        raise SettingError(f"{name}={value!r}", f"{name} is gone from transformers 5 and TRL 1", f"write {remedy}")
    return f"{name}={value!r} is gone, and asked for nothing"


def _warmup_ratio(current: dict[str, Any], name: str, ratio: Any) -> str:
    # The older Trainer let warmup_steps win when it was positive.
    if not current.get("warmup_steps"):
        # warmup_steps=1.0 would be one step, so a full warmup is the largest share below 1.
        current["warmup_steps"] = math.nextafter(1.0, 0.0) if ratio == 1 else ratio
    return f"warmup_ratio={ratio!r} is now warmup_steps={current['warmup_steps']!r}: below 1 it is a share of the run"


def _group_by_length(current: dict[str, Any], name: str, value: Any) -> str:
    if value:
        _set(current, name, "train_sampling_strategy", "group_by_length")
    return 'group_by_length=True is now train_sampling_strategy="group_by_length"'


def _tokens_per_second(current: dict[str, Any], name: str, value: Any) -> str:
    if value:
        current.setdefault("include_num_input_tokens_seen", "all")
    return 'include_tokens_per_second=True is now include_num_input_tokens_seen="all"'


def _inputs_for_metrics(current: dict[str, Any], name: str, value: Any) -> str:
    if value:
        current["include_for_metrics"] = sorted({*current.get("include_for_metrics", []), "inputs"})
    return 'include_inputs_for_metrics=True is now include_for_metrics=["inputs"]'


def _organization(current: dict[str, Any], name: str, value: Any) -> str:
    if value:
        model_id = str(current.get("hub_model_id") or current.get("output_dir") or "").rstrip("/").rpartition("/")[2]
        if not model_id:
            raise SettingError(
                f"{name}={value!r}", "the repository has a name", f'write hub_model_id="{value}/my-model"'
            )
        current["hub_model_id"] = f"{value}/{model_id}"
    return "push_to_hub_organization is now the first half of hub_model_id"


def _logging_dir(current: dict[str, Any], name: str, value: Any) -> str:
    return f"logging_dir is gone: set the environment variable TENSORBOARD_LOGGING_DIR={value}"


def _adafactor(current: dict[str, Any], name: str, value: Any) -> str:
    if value:
        current["optim"] = "adafactor"
    return 'adafactor=True is now optim="adafactor"'


def _rpo_alpha(current: dict[str, Any], name: str, value: Any) -> str:
    if value is None:
        return "rpo_alpha=None is gone, and asked for nothing"
    losses = current.get("loss_type") or ["sigmoid"]
    losses = [losses] if isinstance(losses, str) else list(losses)
    weights = current.get("loss_weights") or [1.0] * len(losses)
    current |= {"loss_type": [*losses, "sft"], "loss_weights": [*weights, float(value)]}
    return (
        f"rpo_alpha={value!r} is now loss_type={current['loss_type']!r}, loss_weights={current['loss_weights']!r}; "
        "the numbers differ a little: TRL 1 takes the mean over the tokens of a micro-batch"
    )


def _accelerator(current: dict[str, Any], name: str, value: Any) -> str:
    if value is not None:
        current["accelerator_config"] = dict(current.get("accelerator_config") or {}) | {name: value}
    return f'{name} is now accelerator_config={{"{name}": {value!r}}}'


_REWRITTEN: Mapping[str, Callable[[dict[str, Any], str, Any], str]] = {
    "warmup_ratio": _warmup_ratio,
    "group_by_length": _group_by_length,
    "include_tokens_per_second": _tokens_per_second,
    "include_inputs_for_metrics": _inputs_for_metrics,
    "push_to_hub_organization": _organization,
    "logging_dir": _logging_dir,
    "adafactor": _adafactor,
    "rpo_alpha": _rpo_alpha,
    "dispatch_batches": _accelerator,
    "split_batches": _accelerator,
}
