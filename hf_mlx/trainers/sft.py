"""MLXSFTTrainer: trl's ``SFTTrainer``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..recipes.sft import SFT
from ..surface.upstream_losses import trl_loss
from .base import TrainerBase, handed_over


class MLXSFTTrainer(TrainerBase):
    """Supervised fine-tuning on MLX with the interface of ``trl.SFTTrainer``.

    Settings are resolved into a frozen plan before anything is loaded; a setting that cannot be honoured is refused.
    Gradients are clipped as :func:`~hf_mlx.resolve_grad_clip` says; ``TrainingArguments(max_grad_norm=0)`` means off.

    Args:
        model: Hub id or local folder of a causal language model; or a transformers model or PeftModel, which is
            trained as it is and has the trained weights written back into it.
        args: ``TrainingArguments`` or ``SFTConfig``; None is TRL's default configuration.
        data_collator: Called with a list of prepared rows; returns ``input_ids``, ``labels`` and ``attention_mask``
            as numpy arrays or torch tensors.
        train_dataset: ``datasets.Dataset``, ``IterableDataset`` or a list of dicts.
        eval_dataset: Likewise, or a dict of datasets.
        processing_class: Tokenizer; None loads the model's own.
        compute_loss_func: A loss in torch of outputs, labels and ``num_items_in_batch``.
        compute_metrics: Called with a ``transformers.EvalPrediction``.
        callbacks: ``transformers.TrainerCallback`` instances or classes.
        optimizers: A torch optimizer over the model's parameters and a torch schedule, which then take the steps;
            ``(None, None)`` makes those that ``args`` names, inside the compiled step.
        optimizer_cls_and_kwargs: A torch optimizer's class and its keywords, which takes the steps.
        preprocess_logits_for_metrics: Called with the logits and labels of each evaluation batch.
        quantization_config: ``transformers.BitsAndBytesConfig`` or a dict; MLX affine quantisation takes its place.
        peft_config: ``peft.LoraConfig``; None fine-tunes all weights, or the adapter of a PeftModel.
        formatting_func: Row to text.
        max_grad_value: Elementwise clip; wins over ``args.max_grad_norm``.
        finetune_last_n_layers: Put adapters on the last n blocks only.
        strict: Also refuse settings that are honoured another way with other numbers.
        loss: A loss in MLX that stays inside the compiled step, of ``logits`` (R, W, V) float32, ``labels`` (R, W)
            int32 and ``mask`` (R, W) bool, shifted already: ``logits[r, w]`` predicts ``labels[r, w]``. Returns a loss
            for each position, (R, W); where ``mask`` is True they are added up and divided by the scored tokens of the
            optimizer step, as the compiled loss is. Labels are 0 where ``mask`` is False. A row may hold several
            documents, and a micro-batch may come in pieces of rows. All logits are computed.
        **keywords: TRL's older constructor keywords (``tokenizer``, ``max_seq_length``, …), deprecated.

    Attributes:
        plan: The frozen :class:`~hf_mlx.settings.plan.TrainPlan`.
        ledger: What each setting does here.
        grad_clip: The clip in force.
        args, state, control, callback_handler: As in ``transformers.Trainer``.
        train_dataset, eval_dataset: The prepared rows.

    Raises:
        HFMLXError: One of its subclasses, before any training.
    """

    recipe = SFT

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable | None = None,
        *,
        max_grad_value: float | None = None,
        finetune_last_n_layers: int | None = None,
        strict: bool = False,
        loss: Callable | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(**handed_over(locals()))

    counts_in_evaluation = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch in torch with its metrics, as ``trl.SFTTrainer`` computes it.

        Called where a subclass overrides it or ``compute_loss_func`` is given; the compiled step has its own.
        """
        return trl_loss(self, model, inputs, num_items_in_batch, return_outputs=return_outputs)
