"""What a script sets on a constructed trainer: it counts from the next ``train()`` or ``evaluate()``, or is refused."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from ..checkpoints.files import check_output_dir
from ..errors import MissingDependency, SettingError
from ..settings.changes import Asked
from ..surface.assignments import check_assignment, started
from ..surface.requests import check_evaluation
from ..surface.together import check_own, tell_accelerate
from ..surface.wording import in_its_words
from .own import Own

logger = logging.getLogger(__name__)


class Live(Own):
    """Assignments, and the settings as they are when they are needed: transformers 5.23 reads them late."""

    _asked: Asked
    _is_built: bool = False

    @in_its_words
    def __setattr__(self, name: str, value: Any) -> None:
        if not self._is_built:
            super().__setattr__(name, value)
        elif name == "data_collator":
            self._set_collator(value)
        elif name in ("train_dataset", "eval_dataset"):
            self._set_rows(name, value)
        elif not check_assignment(self, name, value):
            super().__setattr__(name, value)

    def _set_own(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _build_done(self) -> None:
        """From here on assignments are the script's."""
        self._is_built = True

    @property
    def data_collator(self) -> Any:
        """The script's own collator, or the one that trl's trainer would have made for these settings."""
        if self.data.collator is not None:
            return self.data.collator
        try:
            from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
        except ImportError as error:
            raise MissingDependency("trainer.data_collator", "trl, whose collator it is", "pip install trl") from error
        return DataCollatorForLanguageModeling(
            pad_token_id=self.processing_class.pad_token_id,
            padding_free=self.data.is_padding_free,
            pad_to_multiple_of=self.plan.data.pad_to_multiple_of,
        )

    def _set_collator(self, collator: Any) -> None:
        if not callable(collator):
            raise SettingError(
                f"trainer.data_collator = {collator!r}",
                "a function of a list of prepared rows",
                "trainer.data_collator = my_collator, which returns input_ids, labels and attention_mask",
            )
        self.data.adopt_collator(collator)

    def _set_rows(self, name: str, dataset: Any) -> None:
        """Rows that were assigned are taken as they are: trl prepares those of its constructor alone."""
        if name == "eval_dataset":
            self._set_own(eval_dataset=self.data.adopt_eval(dataset))
            return
        if dataset is None:
            raise SettingError("trainer.train_dataset = None", "rows to train on", "trainer.train_dataset = my_dataset")
        self._set_own(train_dataset=self.data.adopt_train(dataset))

    def _settle(self, *, training: bool) -> None:
        """Bring the plan, and what was built from it, up to what the script has set since.

        Args:
            training: ``train()`` is about to begin, rather than an evaluation on its own.

        Raises:
            SettingError: A setting that comes too late, or is invalid; nothing was changed.
        """
        if self.is_in_train:
            return
        plan, ledger = self._asked.resolve_again(self.args, self.plan)
        tell_accelerate(self.args, self.world)
        if training:
            check_evaluation(self.args, self.eval_dataset, self.recipe.name)
            if self.world.is_main:
                check_output_dir(self.args.output_dir)
        if plan.optim != self.plan.optim and started(self):
            logger.warning(
                "The optimizer's settings changed after train(): it lives on with those it was made with, and so does "
                "its base learning rate, as in transformers. A new trainer has a new optimizer."
            )
            plan = replace(plan, optim=self.plan.optim)
        if plan != self.plan:
            self.session.adopt_plan(plan)
            self.data.adopt_plan(plan)
            self.accelerator.gradient_accumulation_steps = plan.batch.gradient_accumulation_steps
            self._set_own(plan=plan, grad_clip=plan.clip)
        self._settle_loss()
        check_own(self, self.plan.model.tensor_parallel)
        self._asked.keep(self.args, ledger)
        self._set_own(ledger=ledger)
        self.hub.args = self.args
