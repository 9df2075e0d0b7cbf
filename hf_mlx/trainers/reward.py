"""MLXRewardTrainer: trl's ``RewardTrainer``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..adapters.dropout import KeyedDropout
from ..errors import MissingDependency
from ..recipes.reward import REWARD
from ..settings.plan import ScoreLossPlan
from ..surface.references import check_rows
from ..surface.scored import check_scored_object, is_scored
from .base import TrainerBase, handed_over
from .refused import refuse


class MLXRewardTrainer(TrainerBase):
    """Training of reward models on MLX with the interface of ``trl.RewardTrainer``.

    The model is a causal language model's backbone with ``score``, a Linear layer of one output, on the last token of
    each row that is not the padding token. A base without a score gets the one that torch draws for the run's seed. A
    setting that cannot be honoured is refused before anything is loaded.

    Args:
        model: Hub id or local folder of a causal language model or of a ``*ForSequenceClassification``; or such a
            transformers model with ``num_labels=1``, or a PeftModel around one, which is trained as it is and has the
            trained weights written back into it.
        args: ``RewardConfig``; None is TRL's default configuration.
        data_collator: Called with a list of prepared rows; returns ``input_ids`` and ``attention_mask``, all chosen
            rows first, and maybe ``margin``.
        train_dataset: ``datasets.Dataset``, ``IterableDataset`` or a list of dicts with ``chosen`` and ``rejected``,
            and maybe ``prompt`` and ``margin``; or with ``chosen_ids`` and ``rejected_ids``.
        eval_dataset: Likewise, or a dict of datasets.
        processing_class: Tokenizer; None loads the model's own.
        compute_metrics: Called with a ``transformers.EvalPrediction`` of rewards (2N, 1), and ``()`` for the labels.
        callbacks: ``transformers.TrainerCallback`` instances or classes.
        optimizers: A torch optimizer over the model's parameters and a torch schedule, which then take the steps;
            ``(None, None)`` makes those that ``args`` names, inside the compiled step.
        optimizer_cls_and_kwargs: A torch optimizer's class and its keywords.
        preprocess_logits_for_metrics: Called with the rewards of each batch that is predicted.
        quantization_config: None: a reward model's base stays in floating point here.
        peft_config: ``peft.LoraConfig``; with ``task_type="SEQ_CLS"`` the score is trained and saved beside it. None
            fine-tunes all weights, or the adapter of a PeftModel.
        max_grad_value: Elementwise clip; wins over ``args.max_grad_norm``.
        finetune_last_n_layers: Put adapters on the last n blocks only.
        strict: Also refuse settings that are honoured another way with other numbers.
        **keywords: TRL's older constructor keywords (``tokenizer``, ``max_length``), deprecated.

    Attributes:
        plan, ledger, args, state, control, callback_handler: As of :class:`~hf_mlx.MLXSFTTrainer`.
        train_dataset, eval_dataset: The prepared rows.

    Raises:
        HFMLXError: One of its subclasses, before any training.
    """

    recipe = REWARD
    loss_is_scaled_for_ga = False
    #: As in TRL: the loss needs no labels.
    can_return_loss = True
    #: What may not be set on the trainer, with what to write instead.
    remedies: Mapping[str, str] = {"loss_is_scaled_for_ga": "leave it as it is: the loss is compiled"}

    @staticmethod
    def trains(model: Any) -> bool:
        """Whether ``model`` is of a class that this trainer trains; a name is, until it is loaded."""
        return is_scored(model)

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        max_grad_value: float | None = None,
        finetune_last_n_layers: int | None = None,
        strict: bool = False,
        **keywords: Any,
    ) -> None:
        check_scored_object(model)
        super().__init__(**handed_over(locals()))

    @refuse("trainer.evaluate(rows), or trainer.predict(rows)")
    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch."""

    @property
    def label_names(self) -> list[str]:
        """None."""
        return []

    @property
    def data_collator(self) -> Any:
        """The script's own collator, or the one that trl's trainer would have made for these settings."""
        if self.data.collator is not None:
            return self.data.collator
        try:
            from trl.trainer.reward_trainer import DataCollatorForPreference
        except ImportError as error:
            raise MissingDependency("trainer.data_collator", "trl, whose collator it is", "pip install trl") from error
        return DataCollatorForPreference(
            pad_token_id=self.processing_class.pad_token_id, pad_to_multiple_of=self.plan.data.pad_to_multiple_of
        )

    def _read(self, train_dataset: Any, *others: Any) -> None:
        check_rows(train_dataset)
        super()._read(train_dataset, *others)

    def _enter(self, peft_config: Any) -> None:
        super()._enter(peft_config)
        assert isinstance(self.plan.loss, ScoreLossPlan)
        if self.plan.loss.disable_dropout:
            for module in self.session.loaded.model.modules():
                if isinstance(module, KeyedDropout):
                    module.p = 0.0

    def _begin(self, callbacks: list | None) -> None:
        super()._begin(callbacks)
        self._model.add_model_tags(["trl", "reward-trainer"])
