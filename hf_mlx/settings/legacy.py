"""Names that transformers and TRL once had, and what to write for them today."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import SettingError


class Renamed(NamedTuple):
    """A field of the same meaning under another name.

    Attributes:
        left: The first release without it.
        now: Its name today.
    """

    left: str
    now: str


class Gone(NamedTuple):
    """A field without a successor.

    Attributes:
        left: The first release without it.
        harmless: The values that asked for nothing, or for what always happens now; None for every value.
        remedy: What to do where it asked for something.
    """

    left: str
    harmless: tuple[Any, ...] | None
    remedy: str


class Rewritten(NamedTuple):
    """A field whose meaning is said another way.

    Attributes:
        left: The first release without it.
        rewrite: Puts the meaning into today's fields; returns what is said about it.
    """

    left: str
    rewrite: Callable[[dict[str, Any], str, Any], str]


def is_older(name: str) -> bool:
    """Whether a keyword of ``TrainingArguments`` or ``SFTConfig`` is one of an older release."""
    return name in OLDER_FIELDS


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
        match OLDER_FIELDS[name]:
            case Renamed(now=now):
                notes.append(f"{name} is now {now}")
            case Gone():
                notes.append(drop(name, value))
            case Rewritten(rewrite=rewrite):
                notes.append(rewrite(current, name, value))
    if current.get("optim") == "adamw_hf":
        current["optim"] = "adamw_torch"
        notes.append('optim="adamw_hf" is now optim="adamw_torch"')
    if "report_to" in current and current["report_to"] is None:
        current["report_to"] = "all"
        notes.append('report_to=None is now report_to="all": every tracker that is installed')
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
    """Say that a field without a successor asked for nothing.

    Raises:
        SettingError: It asked for something.
    """
    gone = OLDER_FIELDS[name]
    assert isinstance(gone, Gone)
    if gone.harmless is not None and not any(
        value is option or (type(value) is type(option) and value == option) for option in gone.harmless
    ):
        raise SettingError(f"{name}={value!r}", f"{name} left in {gone.left}", f"write {gone.remedy}")
    return f"{name}={value!r} is gone, and asked for nothing"


def _warmup_ratio(current: dict[str, Any], name: str, ratio: Any) -> str:
    # The older Trainer let warmup_steps win when it was positive.
    if not current.get("warmup_steps"):
        # warmup_steps=1.0 would be one step, so a full warmup is the largest share below 1.
        current["warmup_steps"] = math.nextafter(1.0, 0.0) if ratio == 1 else ratio
    return f"warmup_ratio={ratio!r} is now warmup_steps={current['warmup_steps']!r}: below 1 it is a share of the run"


def _group_by_length(current: dict[str, Any], name: str, value: Any) -> str:
    if not value:
        return "group_by_length=False is gone, and asked for nothing"
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
    return f"logging_dir is now the environment variable TENSORBOARD_LOGGING_DIR={value}"


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


_REMOVE = "remove it"
# Fields of TrainingArguments ("transformers …"), SFTConfig and DPOConfig ("trl …") that have left.
OLDER_FIELDS: Mapping[str, Renamed | Gone | Rewritten] = {
    "evaluation_strategy": Renamed("transformers 4.51", "eval_strategy"),
    "no_cuda": Renamed("transformers 5.0", "use_cpu"),
    "push_to_hub_token": Renamed("transformers 5.0", "hub_token"),
    "push_to_hub_model_id": Renamed("transformers 5.0", "hub_model_id"),
    "per_gpu_train_batch_size": Renamed("transformers 5.0", "per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Renamed("transformers 5.0", "per_device_eval_batch_size"),
    "max_seq_length": Renamed("trl 0.20", "max_length"),
    "use_liger": Renamed("trl 0.18", "use_liger_kernel"),
    "use_liger_loss": Renamed("trl 0.28", "use_liger_kernel"),
    "warmup_ratio": Rewritten("transformers 5.15", _warmup_ratio),
    "group_by_length": Rewritten("transformers 5.2", _group_by_length),
    "include_tokens_per_second": Rewritten("transformers 5.0", _tokens_per_second),
    "include_inputs_for_metrics": Rewritten("transformers 5.0", _inputs_for_metrics),
    "push_to_hub_organization": Rewritten("transformers 5.0", _organization),
    "logging_dir": Rewritten("transformers 5.15", _logging_dir),
    "adafactor": Rewritten("transformers 5.0", _adafactor),
    "dispatch_batches": Rewritten("transformers 4.51", _accelerator),
    "split_batches": Rewritten("transformers 4.51", _accelerator),
    "rpo_alpha": Rewritten("trl 0.29", _rpo_alpha),
    "overwrite_output_dir": Gone("transformers 5.0", None, _REMOVE),
    "save_safetensors": Gone("transformers 5.0", (True,), "remove it: safetensors is the one format that is written"),
    "fp16_opt_level": Gone("transformers 5.0", ("O1",), "bf16=True"),
    "fp16_backend": Gone("transformers 5.0", ("auto",), "bf16=True"),
    "half_precision_backend": Gone("transformers 5.0", ("auto",), "bf16=True"),
    "use_mps_device": Gone("transformers 5.0", None, "remove it: MLX uses the Mac's GPU by itself"),
    "use_ipex": Gone("transformers 4.57", (False,), _REMOVE),
    "past_index": Gone("transformers 5.0", (-1,), "remove it: transformers 5 has no such feature"),
    "jit_mode_eval": Gone("transformers 5.0", (False,), _REMOVE),
    "torchdynamo": Gone("transformers 5.0", (None,), "remove it: the step is compiled by MLX"),
    "sharded_ddp": Gone("transformers 4.35", ("", None, False, []), "remove it: memory is unified here"),
    "fsdp_min_num_params": Gone("transformers 5.0", (0,), "remove it: memory is unified here"),
    "fsdp_transformer_layer_cls_to_wrap": Gone("transformers 5.0", (None,), "remove it: memory is unified here"),
    "xpu_backend": Gone("transformers 4.32", (None,), _REMOVE),
    "tp_size": Gone("transformers 4.52", (0, None), "remove it: one process trains here"),
    "tpu_num_cores": Gone("transformers 5.0", (None,), _REMOVE),
    "tpu_metrics_debug": Gone("transformers 5.0", (False,), _REMOVE),
    "mp_parameters": Gone("transformers 5.0", ("",), _REMOVE),
    "ray_scope": Gone("transformers 5.0", ("last",), "remove it: hyperparameter search is not part of this trainer"),
    "use_legacy_prediction_loop": Gone("transformers 5.0", (False,), _REMOVE),
    # They sized the buffers of texts that were tokenized at once; trl ignored them from 0.15 on.
    "dataset_batch_size": Gone("trl 0.18", None, _REMOVE),
    "num_of_sequences": Gone("trl 0.18", None, _REMOVE),
    "chars_per_token": Gone("trl 0.18", None, _REMOVE),
    # The rows are gone through again anyway, until max_steps or num_train_epochs is reached.
    "infinite": Gone("trl 0.13", None, "max_steps"),
    "reference_free": Gone("trl 0.29", (False,), "remove it: TRL 1 always has a reference"),
    "max_prompt_length": Gone(
        "trl 0.29", (None,), "max_length for prompt and answer together; TRL 1 cuts no prompt alone"
    ),
    "max_completion_length": Gone("trl 0.29", (None,), "max_length for prompt and answer together"),
    "max_target_length": Gone("trl 0.14", (None,), "max_length for prompt and answer together"),
    "label_pad_token_id": Gone("trl 0.29", (-100, None), "remove it: -100 is what is left out"),
    "padding_value": Gone("trl 0.26", (None,), "processing_class with its pad_token"),
    "is_encoder_decoder": Gone("trl 0.15", (None, False), "remove it: causal language models are trained here"),
    "generate_during_eval": Gone("trl 0.29", (False,), "a TrainerCallback that generates"),
    "model_adapter_name": Gone("trl 0.29", (None,), "remove it: the model's active adapter is trained"),
    "ref_adapter_name": Gone("trl 0.29", (None,), "remove it: the reference is the adapter as it was"),
    "force_use_ref_model": Gone("trl 0.29", (False,), "remove it: MLXDPOTrainer(ref_model=…) is always used"),
    "base_model_attribute_name": Gone("trl 0.29", ("model",), _REMOVE),
    "ref_model_init_kwargs": Gone(
        "trl 0.29", (None, {}), "MLXDPOTrainer(ref_model=model) with a model that is loaded already"
    ),
    "tools": Gone("trl 0.29", (None,), "a column 'tools' in each row"),
    "use_num_logits_to_keep": Gone("trl 0.17", None, "remove it: only scored positions are projected here"),
    "use_logits_to_keep": Gone("trl 0.29", None, "remove it: only scored positions are projected here"),
}
RENAMED: Mapping[str, str] = {name: field.now for name, field in OLDER_FIELDS.items() if isinstance(field, Renamed)}
