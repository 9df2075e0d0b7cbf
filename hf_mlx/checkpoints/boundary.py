"""Where a run stands between two optimizer steps: all that HF's TrainerState has no place for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..data.order import Steps
from ..settings.plan import BatchPlan
from .random_states import RandomStates

# What is still to be done at a boundary, in this order.
ACTIONS = ("log", "evaluate", "save")


Layout = tuple[int, ...]


def make_layout(steps: Steps, plan: BatchPlan) -> Layout:
    """Steps of an epoch, micro-batches of a step, rows of a micro-batch, and the processes where there are several.

    It is what a position is counted in.
    """
    several = () if plan.processes == 1 else (plan.processes,)
    return steps.updates_per_epoch, plan.gradient_accumulation_steps, plan.train_batch_size, *several


@dataclass
class Boundary:
    """A moment of a run from which it can go on exactly.

    Attributes:
        epoch, update: The epoch and how many optimizer steps of it are done.
        phase: ``"stepped"``: ``on_step_end`` is due. ``"acting"``: ``due`` is. ``"ended"``: ``due`` is, of the
            epoch's end.
        due: Which of :data:`ACTIONS` are still to be done.
        epoch_stop, training_stop: A callback asked to end the epoch or the training.
        layout: See :func:`make_layout`.
        last_logged: Step of the last log entry of the training loss.
        learning_rate: Of the last step.
        pending: Of each step since then ``loss``, ``grad_norm``, ``micro_batches`` and the metrics by name (scalars,
            may be lazy).
        progress: The session's counters.
        history: How many entries of ``log_history`` belong to it; None for all.
        seen: ``num_input_tokens_seen`` and ``total_flos`` of the TrainerState.
        draws: Micro-batches that dropout and noise were drawn for; None counts those of the position.
        random: The random states.
        epoch_order: The order's generator as it was when the epoch began; None at a boundary of epochs.
        carry: Gradients and metrics that a stream's end left for the next step.
        offset: Steps made before the schedule began afresh; 0 unless weights alone were resumed.
        updates: Steps that the optimizer's state has seen: more than the schedule where ``train()`` was called again.
    """

    epoch: int
    update: int
    layout: Layout
    last_logged: int
    progress: dict[str, Any]
    random: RandomStates
    phase: str = "acting"
    due: tuple[str, ...] = ()
    epoch_stop: bool = False
    training_stop: bool = False
    learning_rate: float = 0.0
    pending: list[dict[str, Any]] = field(default_factory=list)
    seen: dict[str, float] = field(default_factory=dict)
    draws: int | None = None
    history: int | None = None
    epoch_order: dict[str, Any] | None = None
    carry: Any = None
    offset: int = 0
    updates: int | None = None

    def to_tree(self) -> dict[str, Any]:
        """For ``hf_mlx_state``; reads the lazy scalars."""
        tree = {name: value for name, value in asdict_shallow(self).items() if name != "random"}
        tree["pending"] = [{name: float(step[name]) for name in step} for step in self.pending]
        tree["random"] = self.random.to_tree()
        return tree

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any], random: RandomStates) -> Boundary:
        """What :meth:`to_tree` returned."""
        values = {name: value for name, value in tree.items() if name != "random"}
        if any(not isinstance(step, Mapping) for step in values["pending"]) or "entropy" in _means(values):
            _rename(values)
        values["pending"] = [dict(step) for step in values["pending"]]
        values["layout"], values["due"] = tuple(values["layout"]), tuple(values["due"])
        return cls(**values, random=random)

    @classmethod
    def from_hf(cls, state: Mapping[str, Any], layout: Layout, random: RandomStates) -> Boundary:
        """From a TrainerState alone, as transformers positions a resumed run."""
        step, history = state["global_step"], state.get("log_history") or []
        tokens = [entry.get("num_tokens", entry.get("eval_num_tokens")) for entry in history]
        known = [value for value in tokens if value is not None]
        return cls(
            epoch=step // layout[0],
            update=step % layout[0],
            layout=layout,
            last_logged=step,
            progress={"num_tokens": int(known[-1]) if known else 0},
            random=random,
        )


def _means(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return values["progress"].get("means") or {}


def _rename(values: dict[str, Any]) -> None:
    """Read what was written before metrics had names: four of them, in one order, routers or not."""
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "micro_batches", "aux_loss")
    values["pending"] = [dict(zip(names, step, strict=True)) for step in values["pending"]]
    means = dict(_means(values))
    if means:
        counted, accuracy = means.pop("micro_batches"), means.pop("accuracy")
        sums = {"entropy": means["entropy"], "mean_token_accuracy": accuracy, "aux_loss": means.get("aux_loss")}
        known = {name: value for name, value in sums.items() if value is not None and counted}
        values["progress"] = {**values["progress"], "means": {"sums": known, "micro_batches": counted}}
    if values.get("carry") is not None:
        grads, measured = values["carry"]
        values["carry"] = grads, {"mean_token_accuracy" if k == "accuracy" else k: v for k, v in measured.items()}


def asdict_shallow(value: Any) -> dict[str, Any]:
    """The fields of a dataclass; unlike :func:`dataclasses.asdict` nothing inside is copied."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}
