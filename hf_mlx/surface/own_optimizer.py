"""A torch optimizer of the script's own, fed with MLX's gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..errors import SettingError
from ..models.torch_arrays import to_mlx, to_torch
from ..session import Session
from ..settings.plan import OptimPlan
from ..training.optimizers.contract import Arrays, Optimizer
from .ties import Ties

_BUILD = "torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=…)"


class HostOptimizer(Optimizer):
    """:class:`~hf_mlx.training.optimizers.contract.Optimizer` that is torch's.

    Args:
        optimizer: The script's.
        ties: Its parameters and the trained arrays.
    """

    on_host = True

    def __init__(self, optimizer: Any, ties: Ties) -> None:
        super().__init__(OptimPlan("adamw"), frozenset())
        self.torch, self._ties, self._stale = optimizer, ties, True

    def count(self) -> int:
        """Numbers that cross over at each step."""
        return sum(parameter.numel() for parameter in self._ties.parameters.values())

    def slots(self, param: mx.array) -> Mapping[str, tuple[int, ...]]:
        return {}

    def hyper(self, step: int, lr: float) -> dict[str, float]:
        return {}

    def apply(self, param: Any, grad: Any, state: Any, hyper: Any, weight_decay: float) -> Any:
        raise NotImplementedError

    def forget_host(self) -> None:
        self._stale = True

    def step_on_host(self, params: Arrays, grads: Arrays) -> Arrays:
        import torch

        ties = self._ties
        if self._stale:
            self._write(params)
        by_name = ties.to_torch(grads)
        for name, parameter in ties.parameters.items():
            parameter.grad = to_torch(by_name[name]).to(parameter.device, parameter.dtype)
        if callable(getattr(self.torch, "train", None)):
            # Schedule-free optimizers have two modes.
            self.torch.train()
        with torch.enable_grad():
            self.torch.step()
        self.torch.zero_grad(set_to_none=True)
        tensors = {name: to_mlx(parameter) for name, parameter in ties.parameters.items()}
        ties.moved(tensors)
        left = {} if len(tensors) == len(by_name) else {k: v for k, v in ties.to_torch(params).items() if k in by_name}
        return {**params, **ties.from_torch({**left, **tensors})}

    def _write(self, params: Arrays) -> None:
        import torch

        held = self._ties.to_torch(params)
        with torch.no_grad():
            for name, parameter in self._ties.parameters.items():
                parameter.copy_(to_torch(held[name]))
        self._ties.moved({name: held[name] for name in self._ties.parameters})
        self._stale = False


def make_host_optimizer(optimizer: Any, base: Any, session: Session) -> HostOptimizer:
    """The step's optimizer for torch's ``optimizer``.

    Args:
        optimizer: The script's, over parameters of ``trainer.model``.
        base: The model as it was handed over, which knows its parameters.
        session: Trains them.

    Raises:
        SettingError: Its parameters are not the model's, or none of them is trained.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    ties, unknown = base.tie(parameters)
    if unknown:
        shape = tuple(unknown[0].shape)
        raise SettingError(
            f"an optimizer over a parameter of shape {shape} that is none of trainer.model "
            f"({len(unknown)} of {len(parameters)})",
            "the parameters of the model that is trained, which MLX has the gradients of",
            f"{_BUILD}, of the same model that the trainer was given (with peft_config=: override create_optimizer)",
        )
    if not ties.parameters:
        raise SettingError(
            "an optimizer over frozen parameters alone",
            "parameters that are trained: with peft_config= those of the adapter, which the trainer makes",
            "get_peft_model(model, peft_config) first, or override create_optimizer(): self.model.named_parameters()",
        )
    return HostOptimizer(optimizer, ties)


def check_optimizer(optimizer: Any, schedule: Any) -> None:
    """Refuse what is no torch optimizer, or a schedule without one.

    Raises:
        SettingError: Of another library, or a schedule whose optimizer is not given.
    """
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise SettingError(
            f"an optimizer of type {type(optimizer).__module__}.{type(optimizer).__name__}",
            "a torch optimizer, or one that is chosen by name",
            'optimizers=(torch.optim.AdamW(model.parameters()), None), or SFTConfig(optim="adamw_torch")',
        )
    if schedule is not None and optimizer is None:
        raise SettingError(
            f"a schedule of type {type(schedule).__name__} without its optimizer",
            "both: a torch schedule sets the learning rate of the optimizer that it was made for",
            "optimizers=(my_optimizer, my_schedule), or override create_scheduler(num_training_steps, optimizer=None)",
        )
