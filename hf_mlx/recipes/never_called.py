"""Methods of transformers' and TRL's trainers that subclasses override and that no MLX step would call."""

from __future__ import annotations

# transformers 5.23 ``Trainer`` and trl 1.16 ``SFTTrainer``, with what to write instead.
_STEP = "the loss and the step are compiled here: choose them in SFTConfig(loss_type=…, label_smoothing_factor=…, …)"
_DATA = "prepare the rows before: train_dataset=…, formatting_func=…, data_collator=…, train_sampling_strategy=…"
_OPTIM = 'choose by name: SFTConfig(optim="adamw_torch", lr_scheduler_type="cosine", …)'
_EVAL = "compute_metrics=… and preprocess_logits_for_metrics=…, or override evaluate()"
_SAVE = "override save_model(), or add a TrainerCallback with on_save"

_STEP_METHODS = """
    training_step compute_loss_context_manager autocast_smart_context_manager get_batch_samples
    _inner_training_loop _run_epoch _clip_grad_norm _prepare_input _prepare_inputs _maybe_log_save_evaluate _wrap_model
"""
_DATA_METHODS = """
    _prepare_dataset _remove_unused_columns _set_signature_columns_if_needed
"""
_OPTIM_METHODS = """
    _get_learning_rate
"""
NEVER_CALLED = {
    **dict.fromkeys(_STEP_METHODS.split(), _STEP),
    **dict.fromkeys(_DATA_METHODS.split(), _DATA),
    **dict.fromkeys(_OPTIM_METHODS.split(), _OPTIM),
    **dict.fromkeys(("evaluation_loop", "prediction_loop", "prediction_step", "_evaluate"), _EVAL),
    **dict.fromkeys(("_save", "_save_checkpoint", "_load_from_checkpoint", "_load_best_model"), _SAVE),
}
