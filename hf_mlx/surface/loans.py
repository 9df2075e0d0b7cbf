"""Copies of parameters that were handed out under HF's names, until it is known whether somebody wrote into them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..models.torch_arrays import to_mlx
from ..models.torch_hooks import check_tensor_hooks
from ..session import Session
from .writes import differs, refuse_frozen, refuse_toggled, refuse_within, take_over

# Copies of frozen weights that are kept alive to be compared; beyond it they are compared while somebody holds them.
_KEPT = 2**30


@dataclass
class Loan:
    """One copy.

    Attributes:
        name: HF's.
        path: MLX's.
        array: What the copy held when it was last looked at.
        trained: Whether the parameter is trained.
        to_array: Turns a copy's value into the MLX parameter.
        copy: The copy itself, while it is kept.
        held: Finds it as long as somebody else keeps it.
    """

    name: str
    path: str
    array: mx.array
    trained: bool
    to_array: Callable[[mx.array], mx.array]
    copy: Any
    held: Callable[[], Any]


@dataclass
class Loans:
    """All copies that are out.

    Attributes:
        out: Of each, what is known of it.
        fresh: Those handed out since they were last looked at, by name: they are handed out again.
        kept: Bytes of frozen weights that are kept alive.
    """

    out: list[Loan] = field(default_factory=list)
    fresh: dict[str, Any] = field(default_factory=dict)
    kept: int = 0

    def add(self, loan: Loan) -> None:
        """Remember a copy."""
        if not loan.trained:
            self.kept += loan.array.nbytes
            if self.kept > _KEPT:
                loan.copy = None
        self.out.append(loan)
        if loan.copy is not None:
            self.fresh[loan.name] = loan.copy

    def settle(self) -> None:
        """Forget the copies that nobody holds any more."""
        self.kept = 0
        self.fresh.clear()
        for loan in self.out:
            loan.copy = None
        self.out = [loan for loan in self.out if loan.held() is not None]


def find_later(copy: Any) -> Callable[[], Any]:
    """A way to the copy that does not keep it; MLX's arrays are kept."""
    return (lambda: None) if isinstance(copy, mx.array) else weakref.ref(copy)


def take_over_loans(session: Session, loans: Loans, event: str) -> None:
    """Train on from what was written into copies, or into the MLX model itself.

    Args:
        session: Trains the model.
        loans: The copies that are out.
        event: The callbacks' event that has just been; empty between two.

    Raises:
        TrainingError: Into what is not trained, where no step would see it in time, or requires_grad was set.
        SettingError: A hook was set on a copy.
    """
    written: dict[str, mx.array] = {}
    names: dict[str, str] = {}
    params = session.step.params
    for path, value in session.step.objective.slots.read().items():
        if value is not params[path] and differs(value, params[path]):
            written[path], names[path] = value, session.hf_name(path)
    for loan in loans.out:
        copy = loan.copy if loan.copy is not None else loan.held()
        if copy is None:
            continue
        if getattr(copy, "requires_grad", loan.trained) != loan.trained:
            refuse_toggled(loan.name, not loan.trained, event)
        check_tensor_hooks(loan.name, copy)
        if differs(copy, loan.array):
            loan.array = copy if isinstance(copy, mx.array) else to_mlx(copy)
            if not loan.trained:
                refuse_frozen(loan.name, event)
            written[loan.path], names[loan.path] = loan.to_array(loan.array), loan.name
    loans.settle()
    if written:
        refuse_within(event, next(iter(names.values())))
        take_over(session, written)
