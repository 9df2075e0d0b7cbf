"""MLXDPOTrainer: trl's ``DPOTrainer``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..adapters.dropout import KeyedDropout
from ..checkpoints.trees import read_tree, write_tree
from ..errors import SettingError
from ..intake import lies
from ..recipes.dpo import DPO
from ..surface.references import check_moving, check_reference, check_rows, choose_reference, keep_adapter, precompute
from ..surface.sync import sync_callback
from ..training.pairs import PairObjective, Reference
from ..training.reference import StartCopy, move_towards
from .base import handed_over
from .pair_names import PairNames
from .refused import refuse

logger = logging.getLogger(__name__)

# A reference that has moved, beside a checkpoint's own files.
_MOVED = "hf_mlx_reference"


class MLXDPOTrainer(PairNames):
    """Direct preference optimization on MLX with the interface of ``trl.DPOTrainer``.

    The reference is the policy as it was: without its adapter where ``peft_config`` made one, with a frozen copy of the
    start where the policy is a PeftModel or trained in full, or ``ref_model``. It runs inside the policy's compiled
    step. A setting that cannot be honoured is refused before anything is loaded.

    Args:
        model: Hub id or local folder of a causal language model; or a transformers model or PeftModel, which is
            trained as it is and has the trained weights written back into it.
        ref_model: A transformers model, hub id or folder; None takes the policy as it was.
        args: ``DPOConfig``; None is TRL's default configuration.
        data_collator: Called with a list of prepared rows; returns ``input_ids``, ``attention_mask`` and
            ``completion_mask``, all chosen rows first.
        train_dataset: ``datasets.Dataset``, ``IterableDataset`` or a list of dicts with ``chosen`` and ``rejected``,
            and mostly ``prompt``.
        eval_dataset: Likewise, or a dict of datasets.
        processing_class: Tokenizer; None loads the model's own.
        compute_metrics: Called with a ``transformers.EvalPrediction`` of logits and token ids.
        callbacks: ``transformers.TrainerCallback`` instances or classes.
        optimizers: A torch optimizer over the model's parameters and a torch schedule, which then take the steps;
            ``(None, None)`` makes those that ``args`` names, inside the compiled step.
        quantization_config: ``transformers.BitsAndBytesConfig`` or a dict; MLX affine quantisation takes its place.
        peft_config: ``peft.LoraConfig``; None fine-tunes all weights, or the adapter of a PeftModel.
        max_grad_value: Elementwise clip; wins over ``args.max_grad_norm``.
        finetune_last_n_layers: Put adapters on the last n blocks only.
        strict: Also refuse settings that are honoured another way with other numbers.
        **keywords: TRL's older constructor keywords (``tokenizer``, ``beta``, ``max_length``, …), deprecated.

    Attributes:
        plan: The frozen :class:`~hf_mlx.settings.plan.TrainPlan`.
        ledger: What each setting does here.
        args, state, control, callback_handler: As in ``transformers.Trainer``.
        train_dataset, eval_dataset: The prepared rows.

    Raises:
        HFMLXError: One of its subclasses, before any training.
    """

    recipe = DPO
    counts_in_evaluation = False

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        max_grad_value: float | None = None,
        finetune_last_n_layers: int | None = None,
        strict: bool = False,
        **keywords: Any,
    ) -> None:
        check_reference(model, ref_model)
        self.ref_model = ref_model
        super().__init__(**handed_over(locals(), "ref_model"))

    @refuse("DPOConfig(precompute_ref_log_probs=True): trainer.train_dataset then has the reference's columns")
    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """The reference's log-probabilities of a batch."""

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether the routers' load is balanced, and ``aux_loss`` logged."""
        return self.session.routers is not None

    @property
    def _objective(self) -> PairObjective:
        objective = self.session.step.objective
        assert isinstance(objective, PairObjective)
        return objective

    def _read(self, train_dataset: Any, *others: Any) -> None:
        check_rows(train_dataset)
        check_moving(self.plan)
        super()._read(train_dataset, *others)

    def _enter(self, peft_config: Any) -> None:
        super()._enter(peft_config)
        loss = self._loss
        if loss.disable_dropout:
            for module in self.session.loaded.model.modules():
                if isinstance(module, KeyedDropout):
                    module.p = 0.0
        self._hold_to(choose_reference(self.session, self._base, self.ref_model, new_adapter=peft_config is not None))
        self.data.share_rows = self._objective.shares_prompts
        if self.session.adapter is not None and isinstance(self._objective.reference, StartCopy):
            keep_adapter(self._model)
            # What is in the object from here on is no write of the script's.
            self._base.write_back()
        if loss.precompute:
            self.train_dataset = self._with_reference(self.train_dataset, "train")
            self.eval_dataset = self._with_references(self.eval_dataset)

    def _begin(self, callbacks: list | None) -> None:
        super()._begin(callbacks)
        self._model.add_model_tags(["trl", "dpo"])
        if self._loss.sync_steps is not None:
            self.callback_handler.add_callback(sync_callback(self._loss.sync_steps, self._move_reference))

    def _hold_to(self, reference: Reference | None) -> None:
        self._objective.reference = reference
        self.session.retrace()

    def _move_reference(self) -> None:
        arrays = self._objective.captured
        assert arrays is not None, "a reference that moves has arrays of its own"
        move_towards(arrays, self.session.step.params, self._loss.mixup_alpha)

    def _write_checkpoint(self, folder: Path) -> None:
        super()._write_checkpoint(folder)
        if (arrays := self._objective.captured) is not None:
            write_tree(arrays, folder, _MOVED)

    def _read_checkpoint(self, folder: Path) -> None:
        super()._read_checkpoint(folder)
        if (arrays := self._objective.captured) is None:
            return
        if lies(folder / f"{_MOVED}.json"):
            arrays |= read_tree(folder, _MOVED)
        else:
            logger.warning(f"{folder} holds no reference: it starts where the model did, as when TRL resumes.")

    def _settle(self, *, training: bool) -> None:
        super()._settle(training=training)
        lent = isinstance(self._objective.reference, StartCopy) and self.session.adapter is None
        if training and lent and self._loss.precompute:
            # The weights that it shares with the policy are about to be others.
            self._hold_to(None)

    def _eval_rows(self, dataset: Any) -> Any:
        rows = super()._eval_rows(dataset)
        if dataset is None or isinstance(dataset, str) or not self._loss.precompute:
            return rows
        if self._objective.reference is None:
            raise SettingError(
                "Cannot compute reference log-probs for a dataset passed to evaluate() after training has started "
                "with precompute_ref_log_probs=True",
                "rows that the constructor has seen: the reference is not kept while all weights train (as in TRL)",
                "MLXDPOTrainer(..., eval_dataset=rows), ref_model=…, or DPOConfig(precompute_ref_log_probs=False)",
            )
        return self._with_references(rows)

    def _with_references(self, datasets: Any) -> Any:
        if datasets is None:
            return None
        if isinstance(datasets, dict):
            return {name: self._with_reference(rows, name) for name, rows in datasets.items()}
        return self._with_reference(datasets, "eval")

    def _with_reference(self, dataset: Any, name: str) -> Any:
        batch = self.plan.batch
        own = batch.train_batch_size if name == "train" else batch.eval_batch_size
        return precompute(dataset, self.session, self.data, name, self._loss.precompute_batch_size or own)
