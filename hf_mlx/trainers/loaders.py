"""The trainer's data loaders as torch objects, and a script's own in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..data.own_loader import OwnLoader
from ..errors import MissingDependency
from ..surface.upstream import upstream_trainer
from .live import Live

# What decides the order and the batches of training, and of evaluation.
_TRAIN = ("get_train_dataloader", "_get_train_sampler", "_get_dataloader")
_EVAL = ("get_eval_dataloader", "_get_eval_sampler", "_get_dataloader")
_TEST = ("get_test_dataloader", "_get_eval_sampler", "_get_dataloader")


class Loaders(Live):
    """``get_train_dataloader`` and its kin, made by transformers' own code from this trainer's rows and collator.

    Training itself reads its batches without torch, in the same order. Where a subclass or the script overrides one of
    these methods, the loader that they give is what is trained on.
    """

    def get_train_dataloader(self) -> Any:
        """The training batches as a torch ``DataLoader`` that yields dicts of tensors."""
        make = _hf("get_train_dataloader")
        # torch may have been imported just now.
        self.data.rng.join()
        return make(self)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The batches of an evaluation set.

        Args:
            eval_dataset: Prepared rows, the name of one of several sets, or None for the trainer's own.
        """
        return _hf("get_eval_dataloader")(self, eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The batches of prepared rows, in their order."""
        return _hf("get_test_dataloader")(self, test_dataset)

    @property
    def _train_batch_size(self) -> int:
        return self.plan.batch.train_batch_size

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Callable[[Any], Any] | None = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        make = _hf("_get_dataloader")
        return make(self, dataset, description, batch_size, sampler_fn, is_training, dataloader_key)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return _hf("_get_train_sampler")(self, train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return _hf("_get_eval_sampler")(self, eval_dataset)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return _hf("_remove_unused_columns")(self, dataset, description)

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Any:
        return _hf("_get_collator_with_removed_columns")(self, data_collator, description)

    @property
    def _signature_columns(self) -> list[str]:
        return list(self.data.columns)

    def _set_signature_columns_if_needed(self) -> None:
        pass

    def _own_train_loader(self) -> OwnLoader | None:
        """The loader of a script that overrides how it is made, or None."""
        if not self._overrides(_TRAIN):
            return None
        self.data.rng.join()
        loader = self.get_train_dataloader()
        return self.data.adopt_loader(loader, "get_train_dataloader")

    def _own_eval_loader(self, dataset: Any) -> OwnLoader | None:
        """The same for the batches of an evaluation; ``dataset`` is what ``get_eval_dataloader`` takes."""
        if not self._overrides(_EVAL):
            return None
        self.data.rng.join()
        loader = self.get_eval_dataloader(dataset)
        return self.data.adopt_loader(loader, "get_eval_dataloader", training=False)

    def _own_test_loader(self, dataset: Any) -> OwnLoader | None:
        """The same for the batches of a prediction."""
        if not self._overrides(_TEST):
            return None
        self.data.rng.join()
        loader = self.get_test_dataloader(dataset)
        return self.data.adopt_loader(loader, "get_test_dataloader", training=False)

    def _overrides_loaders(self) -> bool:
        return self._overrides((*_TRAIN, *_EVAL, *_TEST))

    def _overrides(self, names: tuple[str, ...]) -> bool:
        return any(name in vars(self) or getattr(type(self), name) is not getattr(Loaders, name) for name in names)

    def _count_steps(self, loader: OwnLoader | None) -> None:
        """Count the steps of a run over ``loader``, or over the trainer's own batches."""
        count = self.data.count_steps(self.train_dataset) if loader is None else self.data.count_loader_steps(loader)
        self._set_own(steps=count)


class LaterLoader:
    """A loader that is made when somebody looks at it: most callbacks never do.

    Args:
        make: Makes a torch ``DataLoader``.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._made: Any = None

    @property
    def _loader(self) -> Any:
        if self._made is None:
            self._made = self._make()
        return self._made

    def __iter__(self) -> Any:
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._loader, name)


def _hf(name: str) -> Callable:
    """A method of transformers' trainer, which reads what it needs from ours under the same names."""
    try:
        return getattr(upstream_trainer(), name)
    except ImportError as error:
        raise MissingDependency(f"trainer.{name}()", "torch, whose DataLoader it makes", "pip install torch") from error
