"""Losses, optimizers and schedules of the script's own: transformers' hooks, which the trainer calls where they are."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from ..errors import MissingDependency, SettingError
from ..settings.plan import LossPlan
from ..surface.own_loss import OwnLoss, check_supported, takes_items
from ..surface.own_optimizer import check_optimizer, make_host_optimizer
from ..surface.upstream import upstream_trainer
from ..surface.upstream_losses import hf_loss
from ..training.schedule import make_schedule
from ..training.schedules.contract import Schedule
from ..training.schedules.host import HostSchedule
from .parts import Parts

logger = logging.getLogger(__name__)

_LOSS_NOTICE = (
    "The loss is the script's own ({name}): MLX computes the logits, torch the loss and its gradient by them, MLX the "
    "rest. It is exact, and costs all logits (rows x length x vocabulary) and one more forward pass a micro-batch."
)
_OLD_LOSS = (
    "{name} does not take num_items_in_batch, as transformers before 4.46 called it: its loss is taken for the mean of "
    "a micro-batch, and divided by the micro-batches of the step."
)
_OPTIMIZER_NOTICE = (
    "The optimizer is the script's own (torch's {name}): MLX computes and clips the gradients, torch takes the step on "
    "{count:,} numbers that go there and back each time{heavy}."
)
_BOTH_NOTICE = (
    "create_optimizer_and_scheduler() is the script's own and is called, as transformers did up to version 4; "
    "transformers 5.23 calls create_optimizer() and create_scheduler() alone, and would train without it."
)
_OPTIMIZER_HOOKS = (
    "create_optimizer", "create_scheduler", "create_optimizer_and_scheduler", "get_optimizer_cls_and_kwargs",
    "get_decay_parameter_names",
)  # fmt: skip


class Own(Parts):
    """What a script may put in the place of the compiled loss, optimizer and schedule.

    Attributes:
        optimizer_cls_and_kwargs: A torch optimizer's class and its keywords, or None.
        loss_is_scaled_for_ga: As in transformers: whether ``compute_loss`` returns a loss of the whole window.
    """

    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None
    loss_is_scaled_for_ga: bool | None = None
    #: Whether ``num_items_in_batch`` reaches ``compute_loss`` in evaluation.
    counts_in_evaluation: bool = True
    _created_lr_scheduler: bool = False
    _own_optimizer: Any = None
    _own_scheduler: Any = None
    _loss_func: Callable | None = None
    _native_loss: Callable | None = None
    _said: set[str]
    _metrics: dict[str, Any]

    @property
    def optimizer(self) -> Any:
        """The optimizer of the run, or the script's own; None before ``train()``, as in transformers."""
        return self._own_optimizer if self._brings_optimizer() else self.callback_handler.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Any) -> None:
        if optimizer is not None and not hasattr(optimizer, "param_groups"):
            raise _not_an(optimizer, "optimizer", "torch.optim.AdamW(trainer.model.parameters())")
        self._own_optimizer = optimizer

    @property
    def lr_scheduler(self) -> Any:
        """The schedule of the run, or the script's own; None before ``train()``, as in transformers."""
        return self._own_scheduler if self._brings_optimizer() else self.callback_handler.lr_scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, scheduler: Any) -> None:
        if scheduler is not None and not hasattr(scheduler, "step"):
            raise _not_an(scheduler, "lr_scheduler", "torch.optim.lr_scheduler.StepLR(trainer.optimizer, 10)")
        self._own_scheduler = scheduler

    @property
    def compute_loss_func(self) -> Callable | None:
        """Called with outputs, labels and ``num_items_in_batch``, or None."""
        return self._loss_func

    @compute_loss_func.setter
    def compute_loss_func(self, function: Callable | None) -> None:
        if function is not None and not callable(function):
            raise _not_an(function, "compute_loss_func", "my_loss, a function of outputs, labels, num_items_in_batch")
        self._loss_func = function

    @property
    def model_accepts_loss_kwargs(self) -> bool:
        """Whether the model's class divides its loss by the tokens of the whole window."""
        return self.session.loaded.accepts_loss_kwargs

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch in torch, as transformers computes it.

        Called where a subclass overrides it or ``compute_loss_func`` is given; the compiled step has its own.
        """
        loss, outputs = hf_loss(self, model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Set ``optimizer`` and ``lr_scheduler``, where they are not set; called where one of them is the script's."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps=num_training_steps)

    def create_optimizer(self, model: Any = None) -> Any:
        """A torch optimizer over the model's parameters, as transformers makes it of ``args``."""
        return _upstream().create_optimizer(self, model)  # pyright: ignore[reportArgumentType]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A torch schedule over ``optimizer``, as transformers makes it of ``args``."""
        return _upstream().create_scheduler(self, num_training_steps, optimizer)  # pyright: ignore[reportArgumentType]

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """The torch optimizer that ``args.optim`` names, and its keywords."""
        return _upstream().get_optimizer_cls_and_kwargs(args, model)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Names of the parameters that weight decay applies to."""
        return self._base.decayed_names(self.session)

    def say_once(self, line: str) -> None:
        """Log a warning, the first time that it is due."""
        if line not in self._said:
            self._said.add(line)
            logger.warning(line)

    def _start_own(self, optimizers: tuple[Any, Any], keywords: dict[str, Any]) -> None:
        """Take what the constructor was given."""
        self._said = set()
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self.optimizer, self.lr_scheduler = optimizers
        self._native_loss = keywords.pop("loss", None)
        for name in ("compute_loss_func", "optimizer_cls_and_kwargs"):
            setattr(self, name, keywords.pop(name, None))
        if self.optimizer_cls_and_kwargs is not None and self._own_optimizer is not None:
            raise SettingError(
                "optimizers= together with optimizer_cls_and_kwargs=",
                "one way to an optimizer (transformers' trainer raises too)",
                "optimizers=(my_optimizer, my_schedule)",
            )
        check_optimizer(self._own_optimizer, self._own_scheduler)

    def _take_own_metrics(self) -> dict[str, float]:
        """What ``compute_loss`` measured since the last log, as trl 1.16 ``SFTTrainer.log`` averages it."""
        mode = self.session.progress.mode
        means = {name: sum(values) / len(values) for name, values in self._metrics[mode].items()}
        self._metrics[mode].clear()
        return means if mode == "train" else {f"eval_{name}": value for name, value in means.items()}

    def _own_name(self) -> str | None:
        """The script's loss, by name; None where the compiled one is meant."""
        if "compute_loss" in vars(self):
            return "trainer.compute_loss"
        if not _is_houses(type(self).compute_loss):
            return f"{type(self).__name__}.compute_loss"
        return None if self.compute_loss_func is None else "compute_loss_func"

    def _settle_loss(self) -> None:
        """Train and evaluate by the script's loss from here on, where there is one."""
        name = self._own_name()
        if self._native_loss is not None:
            _check_native(self._native_loss, name, self.plan.loss)
            if self.session.native_loss is not self._native_loss:
                self.session.adopt_native_loss(self._native_loss)
        if name is None:
            if self.session.host_loss is not None:
                self.session.adopt_loss(None)
        else:
            check_supported(self.session)
            if self.session.host_loss is None:
                self.session.adopt_loss(OwnLoss(self, counts_in_evaluation=self.counts_in_evaluation))
            self.say_once(_LOSS_NOTICE.format(name=name))
            if not takes_items(self.compute_loss):
                self.say_once(_OLD_LOSS.format(name=name))
        self.data.collation.keeps_batches = name is not None

    def _brings_optimizer(self) -> bool:
        own = (self._own_optimizer, self._own_scheduler, self.optimizer_cls_and_kwargs)
        if any(part is not None for part in own):
            return True
        hooks = (_is_houses(getattr(type(self), name)) for name in _OPTIMIZER_HOOKS)
        return not all(hooks) or any(name in vars(self) for name in _OPTIMIZER_HOOKS)

    def _make_schedule(self) -> Schedule:
        """The optimizer of this call of ``train()``, put to work, and its schedule."""
        if not self._brings_optimizer():
            return make_schedule(self.plan.schedule, self.plan.optim, self.steps.total_steps)
        self._base.write_back()
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        if _is_houses(type(self).create_optimizer_and_scheduler) and (
            "create_optimizer_and_scheduler" not in vars(self)
        ):
            self.create_optimizer()
            self.create_scheduler(num_training_steps=self.steps.total_steps)
        else:
            self.say_once(_BOTH_NOTICE)
            self.create_optimizer_and_scheduler(num_training_steps=self.steps.total_steps)
        if self.optimizer is None or self.lr_scheduler is None:
            missing = "optimizer" if self.optimizer is None else "lr_scheduler"
            raise SettingError(
                f"trainer.{missing} is None after create_optimizer_and_scheduler()",
                "an optimizer and a schedule",
                f"self.{missing} = …, in create_{missing.removeprefix('lr_')}()",
            )
        check_optimizer(self.optimizer, self.lr_scheduler)
        host = make_host_optimizer(self.optimizer, self._base, self.session)
        self.session.step.adopt(host, self.plan.clip)
        heavy = "" if self.session.adapter is not None else ": all weights, so this is slow; an adapter costs little"
        name = type(self.optimizer).__name__
        self.say_once(_OPTIMIZER_NOTICE.format(name=name, count=host.count(), heavy=heavy))
        return HostSchedule(self.lr_scheduler, self.optimizer)


def _check_native(loss: Any, own: str | None, plan: Any) -> None:
    if not isinstance(plan, LossPlan):
        raise SettingError(
            "loss= in a trainer of pairs", "one of the losses of its configuration", 'DPOConfig(loss_type="sigmoid")'
        )
    others = {own: own, "label_smoothing_factor": plan.label_smoothing_factor, 'loss_type="dft"': plan.kind == "dft"}
    other = next((name for name, given in others.items() if given), None)
    if not callable(loss) or other is not None:
        raise SettingError(
            f"loss= together with {other}" if other else f"loss= of type {type(loss).__name__}",
            "one loss: a function of logits, labels and mask in mlx.core",
            "MLXSFTTrainer(loss=my_loss) without it",
        )


def _upstream() -> Any:
    try:
        return upstream_trainer()
    except ImportError as error:
        raise MissingDependency("an optimizer of torch's", "torch", "pip install torch") from error


def _is_houses(function: Callable) -> bool:
    return function.__module__.startswith("hf_mlx.")


def _not_an(value: Any, name: str, remedy: str) -> SettingError:
    return SettingError(
        f"trainer.{name} = a {type(value).__name__}",
        "one that torch has, or that is written for it",
        f"trainer.{name} = {remedy}",
    )
