"""``trainer.optimizer`` and ``trainer.lr_scheduler``: the run's update rule and schedule as torch shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from ..checkpoints.optimizer_state import group_options
from ..errors import TrainingError
from ..training.optim import Optimizer
from ..training.schedules.contract import GROUPS, Schedule

_LATER = "the step that train() makes"


class OptimizerView:
    """What callbacks get as ``optimizer``: two groups of parameters, with weight decay and without.

    The learning rate of a group may be set: the next step is made with it and, as in torch, the schedule then sets its
    own again. Other entries are there to be read; the step refuses those that were changed.

    Args:
        optimizer: The update rule.
        schedule: Gives the rate of each step.
        parameters: The trained parameters of a group, with weight decay (True) or without, as the model shows them.
        counts: How many parameters each of the two groups holds.

    Attributes:
        param_groups: Dicts of ``params``, ``lr``, ``weight_decay`` and what the optimizer goes by, as torch's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        parameters: Callable[[bool], Sequence[Any]],
        counts: tuple[int, int],
    ) -> None:
        self._counts = counts
        rate, plan = schedule.lr(0), optimizer.plan
        self.defaults = {"lr": rate, "weight_decay": plan.weight_decay, **group_options(plan, fused=False)}
        self.param_groups: list[dict[str, Any]] = [
            {
                "params": _Parameters(partial(parameters, decayed), count),
                **self.defaults,
                "weight_decay": plan.weight_decay if decayed else 0.0,
                "initial_lr": rate,
            }
            for decayed, count in zip((True, False), counts, strict=True)
        ]
        self.show(rate)

    def show(self, rate: float) -> None:
        """Set the schedule's rate in every group, as torch's scheduler does after a step."""
        self._shown = rate
        for group in self.param_groups:
            group["lr"] = rate
        self._fixed = [{k: v for k, v in group.items() if k not in ("lr", "params")} for group in self.param_groups]

    def rate(self, scheduled: float) -> float:
        """The rate of the step that is about to be made.

        Args:
            scheduled: The schedule's.

        Raises:
            TrainingError: The groups' rates differ, or another of their entries was changed.
        """
        for group, before in zip(self.param_groups, self._fixed, strict=True):
            for name, value in before.items():
                if group.get(name) != value:
                    raise TrainingError(
                        f"optimizer.param_groups[…][{name!r}] = {group.get(name)!r}",
                        f"{name}={value!r}, which the step is compiled with; lr alone may be set during a run",
                        f"def create_optimizer(self, model=None): return super().create_optimizer(model), in the "
                        f"trainer: torch's own then takes the steps, and {name} may change at any time; or "
                        f"{_write(name, group.get(name))} from the start",
                    )
        # A group without parameters is there, as in torch, and changes nothing.
        pairs = zip(self.param_groups, self._counts, strict=True)
        rates = {float(group["lr"]) for group, count in pairs if count}
        if len(rates) > 1:
            raise TrainingError(
                f"optimizer.param_groups with the learning rates {sorted(rates)}",
                "one learning rate for all groups of this optimizer",
                'for group in optimizer.param_groups: group["lr"] = rate; groups with rates of their own: override '
                "create_optimizer() (super's is torch's own, which then takes the steps)",
            )
        found = rates.pop() if rates else scheduled
        return scheduled if found == self._shown else found

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Refused: no gradient is kept from step to step.

        Raises:
            TrainingError: Always.
        """
        raise TrainingError("optimizer.zero_grad()", _LATER, "leave it out: gradients begin at zero in each step")

    def step(self, closure: Any = None) -> None:
        """Refused: the step is compiled with its optimizer.

        Raises:
            TrainingError: Always.
        """
        raise TrainingError("optimizer.step()", _LATER, "leave it out: train() makes the steps")

    def state_dict(self) -> dict[str, Any]:
        """Refused: moments are written with a checkpoint.

        Raises:
            TrainingError: Always.
        """
        raise TrainingError(
            "optimizer.state_dict()", "moments as a checkpoint keeps them", 'torch.load("checkpoint-N/optimizer.pt")'
        )


class _Parameters(Sequence):
    """The parameters of a group, which are looked up when somebody asks for them."""

    def __init__(self, find: Callable[[], Sequence[Any]], count: int) -> None:
        self._find = find
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._find()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._find())


class SchedulerView:
    """What callbacks get as ``lr_scheduler``.

    Args:
        schedule: The run's.
        done: Optimizer steps that it has seen.
    """

    optimizer: Any = None

    def __init__(self, schedule: Schedule, done: Callable[[], int]) -> None:
        self.schedule = schedule
        self._done = done

    @property
    def last_epoch(self) -> int:
        """Steps done, under torch's name."""
        return self._done()

    @property
    def base_lrs(self) -> tuple[float, ...]:
        """The rate that each group's schedule starts from."""
        return (getattr(self.schedule, "base_lr", self.schedule.lr(0)),) * GROUPS

    def get_last_lr(self) -> list[float]:
        """The rate of the next step, for each group."""
        return [self.schedule.lr(self._done())] * GROUPS

    def state_dict(self) -> dict[str, Any]:
        """What ``scheduler.pt`` of a checkpoint holds."""
        return self.schedule.state_dict(self._done())

    def step(self, *args: Any) -> None:
        """Refused: it moves by itself.

        Raises:
            TrainingError: Always.
        """
        raise TrainingError("lr_scheduler.step()", _LATER, "leave it out, or set lr in optimizer.param_groups")


def _write(name: str, value: Any) -> str:
    if name == "betas" and isinstance(value, (tuple, list)) and len(value) == 2:
        return f"SFTConfig(adam_beta1={value[0]!r}, adam_beta2={value[1]!r})"
    return f"SFTConfig({'adam_epsilon' if name == 'eps' else name}={value!r})"
