"""Torch parameters that stand for trained arrays: those of the user's object, or copies of a named model's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..checkpoints.parameters import make_parameters
from ..errors import SettingError
from ..models.bridge import TorchModel
from ..session import Session
from ..training.optimizers.contract import Arrays
from .parameters import Parameters


@dataclass(frozen=True)
class Ties:
    """Which torch parameter of an optimizer stands for which trained array.

    Attributes:
        parameters: Parameters of the optimizer that are trained, by the names of :attr:`to_torch`.
        to_torch: MLX arrays by name → arrays in torch's layouts by torch's names.
        from_torch: The way back.
        moved: Called with the new arrays by torch's names, once they are in the parameters.
    """

    parameters: Mapping[str, Any]
    to_torch: Callable[[Arrays], Mapping[str, mx.array]]
    from_torch: Callable[[Mapping[str, mx.array]], Arrays]
    moved: Callable[[Mapping[str, mx.array]], None]


# Ties, and what is no parameter of the model.
Tied = tuple[Ties, list[Any]]


def tie_object(source: TorchModel, session: Session, held: Mapping[str, Any], parameters: Iterable[Any]) -> Tied:
    """Ties between parameters of the user's object and what is trained.

    Args:
        source: The user's model.
        session: Trains its copy.
        held: The trained tensors of the object, under the names of its files.
        parameters: Of an optimizer.

    Raises:
        SettingError: A trained parameter is no single tensor of the files (fused experts).
    """
    by_place = {value.data_ptr(): name for name, value in held.items()}
    live = {id(parameter): name for name, parameter in source.model.named_parameters()}
    tied: dict[str, Any] = {}
    unknown: list[Any] = []
    for parameter in parameters:
        name = by_place.get(parameter.data_ptr())
        if id(parameter) not in live:
            unknown.append(parameter)
        elif name is not None and held[name].shape == parameter.shape:
            tied[name] = parameter
        elif parameter.requires_grad:
            raise SettingError(
                f"an optimizer over {live[id(parameter)]}, which the model's files hold in another layout",
                "parameters that are one tensor of the files each",
                'SFTConfig(optim="adamw_torch"), or an adapter: peft_config=LoraConfig(target_modules="all-linear")',
            )
    stored = make_parameters(session.adapter, session.loaded, list(session.step.params))
    return Ties(tied, stored.to_hf, stored.from_hf, lambda moved: None), unknown


def tie_copies(copies: Parameters, parameters: Iterable[Any]) -> Tied:
    """Ties between copies that were handed out and what is trained.

    Args:
        copies: Of a model that was named.
        parameters: Of an optimizer.
    """
    loans = {id(copy): loan for loan in copies.lent.out if (copy := loan.held()) is not None}
    unknown = [parameter for parameter in parameters if id(parameter) not in loans]
    found = [(loans[id(parameter)], parameter) for parameter in parameters if id(parameter) in loans]
    trained = {loan.path: (loan, parameter) for loan, parameter in found if loan.trained}

    def to_torch(arrays: Arrays) -> dict[str, mx.array]:
        return {path: copies.to_stored(loan.name, path, arrays[path]) for path, (loan, _) in trained.items()}

    def from_torch(tensors: Mapping[str, mx.array]) -> Arrays:
        return {path: trained[path][0].to_array(value) for path, value in tensors.items()}

    def moved(tensors: Mapping[str, mx.array]) -> None:
        for path, value in tensors.items():
            # What is in a copy now was not written by the script.
            trained[path][0].array = value

    return Ties({path: parameter for path, (_, parameter) in trained.items()}, to_torch, from_torch, moved), unknown
