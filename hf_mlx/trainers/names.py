"""Public names of transformers' trainer that scripts read and that have one answer here."""

from __future__ import annotations

from typing import Any

from .live import Live


class Names(Live):
    """What HF's trainer also says about itself: one process, one device, labels under their usual name."""

    is_deepspeed_enabled = False
    is_fsdp_enabled = False
    is_model_parallel = False
    can_return_loss = False

    @property
    def label_names(self) -> list[str]:
        """The column that holds the labels."""
        return ["labels"]

    @property
    def model_wrapped(self) -> Any:
        """``trainer.model``: nothing is wrapped around it."""
        return self.model

    @property
    def optimizer(self) -> Any:
        """The optimizer of the run; None before ``train()``, as in transformers."""
        return self.callback_handler.optimizer

    @property
    def lr_scheduler(self) -> Any:
        """The schedule of the run; None before ``train()``, as in transformers."""
        return self.callback_handler.lr_scheduler

    def get_num_trainable_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(value.size for value in self.session.step.params.values())

    def get_total_train_batch_size(self, args: Any = None) -> int:
        """Rows of one optimizer step.

        Args:
            args: Whose accumulation counts; None is ``trainer.args``.
        """
        return self.plan.batch.train_batch_size * (args or self.args).gradient_accumulation_steps
