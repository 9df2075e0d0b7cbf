"""Public methods of HF's trainer that stand inside its own training loop, which is compiled here: refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from ..errors import SettingError
from ..surface.wording import reword

NO_SEARCH = "a new trainer for each trial: MLXSFTTrainer(args=SFTConfig(learning_rate=trial_value), …).train()"
_INSIDE = "what is outside of the compiled step"


def refuse(remedy: str) -> Callable[[Callable], Callable]:
    """Let a method raise a :class:`~hf_mlx.errors.SettingError` that says what to write instead."""

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def refused(self: Any, *args: Any, **kwargs: Any) -> Any:
            error = SettingError(f"trainer.{method.__name__}(…)", _INSIDE, remedy)
            reword(error, self.recipe.name, self.recipe.config.name)
            raise error

        return refused

    return decorate


class Refused:
    """The methods with upstream's signatures; each raises a :class:`~hf_mlx.errors.SettingError`."""

    @refuse("trainer.train()")
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward of one batch."""

    @refuse("trainer.predict(dataset), or trainer.model(**inputs)")
    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: Any, ignore_keys: list[str] | None = None
    ) -> Any:
        """Loss, logits and labels of one batch."""

    @refuse("trainer.evaluate(dataset), or trainer.predict(dataset)")
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """One pass over an evaluation loader."""

    @refuse("for batch in trainer.get_train_dataloader(): …")
    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of one optimizer step."""

    @refuse(NO_SEARCH)
    def hyperparameter_search(
        self,
        hp_space: Any = None,
        compute_objective: Any = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: Any = None,
        hp_name: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Trains again and again with other settings."""

    @refuse("MLXSFTTrainer(model=model_init(), …)")
    def call_model_init(self, trial: Any = None) -> Any:
        """Makes a model by ``model_init``."""
