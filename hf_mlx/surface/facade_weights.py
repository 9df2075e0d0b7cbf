"""Parameters of ``trainer.model`` for a model named by a string: copies under HF's names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ..adapters.adapter import Adapter
from ..models.load import LoadedModel
from .loans import Loans
from .parameters import GradientCopies, Parameters
from .ties import Tied, tie_copies


class IncompatibleKeys(NamedTuple):
    """torch's result of ``load_state_dict``."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Weights:
    """What is read of and written into parameters.

    Parameters come out as copies under HF's names (PEFT's where an adapter is attached), one at a time: torch
    tensors where torch is installed, else MLX arrays. What is written into a copy of a trained parameter is taken over
    before the next step, evaluation or save; a frozen one cannot be written.
    """

    loaded: LoadedModel
    adapter: Adapter | None
    settle: Callable[[], None]
    _parameters: Parameters

    @property
    def gradients(self) -> GradientCopies:
        """What ``grad`` of the copies is while a step's are lent."""
        return self._parameters.gradients

    @property
    def lent(self) -> Loans:
        """The copies of parameters that are out."""
        return self._parameters.lent

    def tie(self, parameters: list[Any]) -> Tied:
        """Ties between copies in an optimizer and what is trained."""
        return tie_copies(self._parameters, parameters)

    def parameter_paths(self) -> dict[str, str]:
        """HF's name to MLX path."""
        return self._parameters.paths

    @property
    def dtype(self) -> Any:
        """Of the first floating parameter: a torch dtype where torch is loaded, else an MLX one."""
        found, torch = self._parameters.dtype(), sys.modules.get("torch")
        return found if torch is None else getattr(torch, str(found).rsplit(".", 1)[-1])

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """(name, copy) of every parameter, in HF's order; ``requires_grad`` is set on torch's."""
        for name in self._parameters.paths:
            yield name, self._parameters.copy(name)

    def parameters(self) -> Iterator[Any]:
        """The copies of :meth:`named_parameters`."""
        return (value for _, value in self.named_parameters())

    def parameters_at(self, paths: Iterable[str]) -> list[Any]:
        """Copies of those at these MLX paths."""
        return self._parameters.copies_at(paths)

    def get_parameter(self, target: str) -> Any:
        """A copy of one parameter.

        Raises:
            AttributeError: There is none of that name.
        """
        if target not in self._parameters.paths:
            raise AttributeError(f"{type(self).__name__} has no parameter {target!r}; named_parameters() lists them")
        return self._parameters.copy(target)

    def state_dict(self, *, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """Copies of all parameters by name, tied ones under each of their names, and torch's buffers.

        Args:
            prefix: Of every name.
            keep_vars: Give the parameters themselves, rather than their tensors.
        """
        held = self._held()
        return {prefix + name: value if keep_vars else getattr(value, "data", value) for name, value in held.items()}

    def _held(self) -> dict[str, Any]:
        return dict(self.named_parameters())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Write trained parameters by name.

        Args:
            state_dict: Name to tensor.
            strict: Whether every name must be there, and no other.
            assign: Of no effect: values are copied.

        Returns:
            Names that are missing and names that are unknown, as torch's.

        Raises:
            RuntimeError: With ``strict``, names are missing or unknown (as torch's).
        """
        held = self._held()
        missing = [name for name in held if name not in state_dict]
        unexpected = [name for name in state_dict if name not in held]
        if strict and (missing or unexpected):
            raise RuntimeError(f"load_state_dict: missing {missing[:3]}, unexpected {unexpected[:3]}")
        for name, copy in held.items():
            if name in state_dict:
                getattr(copy, "data", copy)[...] = state_dict[name]
        self.settle()
        return IncompatibleKeys(missing, unexpected)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the parameters hold (a quantised weight counts as what it stands for)."""
        return self._parameters.count(only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all), as PEFT counts them."""
        return self.num_parameters(only_trainable=True), self.num_parameters()

    def print_trainable_parameters(self) -> None:
        """PEFT's line (peft 0.21 ``PeftModel.print_trainable_parameters``)."""
        trained, held = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {held:,d} || trainable%: {100 * trained / held:.4f}")
