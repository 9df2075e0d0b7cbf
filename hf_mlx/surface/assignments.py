"""What may not be set on a constructed trainer, because nothing would ever read it; with what to write instead."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ..errors import SettingError
from ..recipes.never_called import NEVER_CALLED

logger = logging.getLogger(__name__)

_ROWS = "prepare the rows before, or pass them to a new trainer: MLXSFTTrainer(train_dataset=…)"
_PLAN = "change the setting: trainer.args.… = …"
_LOSS = 'SFTConfig(loss_type="nll"), or "dft"; label_smoothing_factor=… smooths labels'
_SEARCH = "a new trainer for each trial: MLXSFTTrainer(args=SFTConfig(…), …).train()"
_ONE_PROCESS = """
    is_deepspeed_enabled is_fsdp_enabled is_fsdp_xla_enabled is_fsdp_xla_v1_enabled is_fsdp_xla_v2_enabled
    is_model_parallel is_distributed_loading_by_transformers place_model_on_device can_return_loss deepspeed
"""

# Attributes of transformers 5.23 ``Trainer`` and trl 1.16 ``SFTTrainer``, and this trainer's own.
_ATTRIBUTES = {
    "model": "MLXSFTTrainer(model=my_model, …)",
    "model_wrapped": "MLXSFTTrainer(model=my_model, …)",
    "model_init": "MLXSFTTrainer(model=model_init(), …)",
    "label_smoother": _LOSS,
    "label_names": 'rows with "labels"',
    "model_accepts_loss_kwargs": _LOSS,
    "neftune_noise_alpha": "SFTConfig(neftune_noise_alpha=…)",
    "router_aux_loss_coef": "SFTConfig(router_aux_loss_coef=…)",
    "aux_loss_enabled": "SFTConfig(router_aux_loss_coef=…)",
    "callbacks": "trainer.add_callback(MyCallback()), trainer.remove_callback(MyCallback)",
    "callback_handler": "trainer.add_callback(MyCallback()), trainer.remove_callback(MyCallback)",
    "accelerator": "leave it as it is: one process trains here",
    "padding_free": "SFTConfig(padding_free=True)",
    "completion_only_loss": "SFTConfig(completion_only_loss=True)",
    "chat_template": "SFTConfig(chat_template_path=…)",
    "hub_model_id": 'trainer.args.hub_model_id = "me/my-model"',
    "gather_function": "leave it as it is: one process trains here",
    "maybe_activation_offload_context": "SFTConfig(gradient_checkpointing=True)",
    "_train_batch_size": "SFTConfig(per_device_train_batch_size=…)",
    "_signature_columns": "SFTConfig(remove_unused_columns=False) with a data_collator",
    "_skip_prepare_dataset": 'SFTConfig(dataset_kwargs={"skip_prepare_dataset": True})',
    "_formatting_func": "MLXSFTTrainer(formatting_func=…)",
    "_loss_shifts_labels": _LOSS,
    "_tokenizer": "trainer.processing_class = my_tokenizer",
    "current_flos": "trainer.state.total_flos = …, which counts them",
    "hp_name": _SEARCH,
    "hp_search_backend": _SEARCH,
    **dict.fromkeys(_ONE_PROCESS.split(), "leave it as it is: one process trains here, on one device"),
    **dict.fromkeys(("plan", "ledger", "grad_clip", "steps", "session", "data", "adapter"), _PLAN),
}
# Methods of the same classes that are not here.
_METHODS = """
    call_model_init create_accelerator_and_postprocess floating_point_ops get_cp_size get_learning_rates
    get_num_trainable_parameters get_optimizer_group get_sp_size get_total_train_batch_size get_tp_size
    hyperparameter_search metrics_format set_initial_training_values store_flos
    _build_accelerator_args _defer_fsdp_gradient_reduction _determine_best_metric _finalize_training
    _finish_current_push _get_collator_with_removed_columns _get_grad_norm _get_num_items_in_batch _get_output_dir
    _has_mixed_mesh_grads _hp_search_setup _init_training_state _issue_warnings_after_load _load_callback_state
    _load_optimizer_and_scheduler _load_rng_state _load_scaler _mixed_mesh_grad_norm _move_model_to_device
    _prepare_context_parallel_inputs _prepare_for_training _push_from_checkpoint _reject_skip_prepare_without_labels
    _report_to_hp_search _save_optimizer_and_scheduler _save_rng_state _save_scaler _send_telemetry
    _sync_replicated_trainable_parameters _track_num_input_tokens _tune_save_checkpoint _update_auto_batch_size
    _validate_args
"""
_REMEDIES = {
    **dict.fromkeys(_METHODS.split(), "assign what this trainer calls (log, evaluate, predict, save_model, train)"),
    **NEVER_CALLED,
    **_ATTRIBUTES,
}
# Their value in transformers' trainer before train(); setting it again asks for nothing.
_NONE = """
    label_smoother neftune_noise_alpha model_init chat_template _formatting_func _signature_columns
"""
_EMPTY = frozenset(_NONE.split())
# No attribute of HF's trainer either, so a subclass may mean its own; said, in case it does not.
_NOT_HFS = {
    "tokenizer": "trainer.processing_class = my_tokenizer",
    "formatting_func": "MLXSFTTrainer(formatting_func=…)",
    "peft_config": "MLXSFTTrainer(peft_config=…)",
}


def check_assignment(trainer: Any, name: str, value: Any) -> bool:
    """Refuse an attribute that nothing would read.

    Args:
        trainer: The constructed trainer.
        name: The attribute's.
        value: What it is set to; what it is already is no change.

    Returns:
        Whether the assignment changes nothing and is to be left out.

    Raises:
        SettingError: Names the attribute, and what to write.
    """
    if name in _NOT_HFS:
        logger.warning(f"trainer.{name} is no attribute of HF's trainer, and nothing reads it: {_NOT_HFS[name]}")
    remedies = {**_REMEDIES, **trainer.remedies}
    if name not in remedies:
        return False
    missing = object()
    if getattr(trainer, name, missing) is value or (value is None and name in _EMPTY and not started(trainer)):
        return True
    if name == "label_names" and value == ["labels"]:
        return True
    raise _refuse(name, value, remedies)


def check_presets(trainer: Any) -> None:
    """Refuse methods that a subclass has put on the trainer before its constructor ran.

    Raises:
        SettingError: Names the method, and what to write.
    """
    for name, value in vars(trainer).items():
        if name in NEVER_CALLED or name in _METHODS.split():
            raise _refuse(name, value, _REMEDIES)


def _refuse(name: str, value: Any, remedies: Mapping[str, str]) -> SettingError:
    return SettingError(
        f"trainer.{name} = {_show(value)}",
        "an attribute that this trainer reads (args, data_collator, train_dataset, eval_dataset, compute_metrics, "
        "preprocess_logits_for_metrics, processing_class)",
        remedies[name],
    )


def started(trainer: Any) -> bool:
    """Whether ``train()`` was called: the optimizer and its state then live on, as in transformers."""
    return trainer._loop is not None


def _show(value: Any) -> str:
    return getattr(value, "__name__", None) or f"a {type(value).__name__}"
