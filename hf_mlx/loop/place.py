"""Where a run stands: epochs, updates and random states, as a checkpoint keeps them and a resumed run finds them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..checkpoints.boundary import ACTIONS, Boundary, make_layout
from ..checkpoints.random_states import RandomStates
from ..data.collate import Batch
from ..data.order import Steps
from ..feed import Feed, Loader
from ..session import Session
from ..training.inputs import HostInputs
from ..training.means import Means, Progress
from .host import Host
from .pending import Pending


class Place:
    """The position of a run between two optimizer steps.

    Args:
        host: The trainer.
        session: Model, step and counters.
        data: Its generator gives the order.
        steps: Counts of the run.

    Attributes:
        boundary: The last moment between two steps that the run can go on from; None while a step is under way.
        resumed: The boundary that this call goes on from, until what was due there is done.
        epoch, update: The epoch and how many optimizer steps of it are done.
        learning_rate: Of the last step.
        offset: Steps made before the optimizer and the schedule began afresh.
    """

    boundary: Boundary | None = None
    resumed: Boundary | None = None

    def __init__(self, host: Host, session: Session, data: Feed, steps: Steps) -> None:
        self._host = host
        self._session = session
        self._data = data
        self._steps = steps
        self._epoch_order: dict[str, Any] | None = None
        self.epoch = self.update = self.offset = 0
        self.learning_rate = 0.0

    def resume(self, boundary: Boundary) -> None:
        """Go on from ``boundary`` instead of beginning."""
        self.resumed, self.offset, self.learning_rate = boundary, boundary.offset, boundary.learning_rate
        session = self._session
        means = Means(**boundary.progress.get("means", {}))
        session.progress = Progress(**{**boundary.progress, "means": means})
        draws = boundary.draws
        if draws is None:
            draws = boundary.epoch * self._steps.batches_per_epoch + boundary.update * boundary.layout[1]
        session.step.carry, session.step.draws = boundary.carry, draws

    def open_epoch(self, loader: Loader, epoch: int, done: int) -> Iterator[tuple[Batch, HostInputs]]:
        """The epoch's micro-batches from update ``done`` on, with the random states of that moment."""
        rng, resumed = self._data.rng, self.resumed
        self.epoch, self.update = epoch, done
        if resumed is not None and done == 0:
            resumed.random.restore(rng)
        elif resumed is not None and resumed.epoch_order is not None:
            rng.set_state(resumed.epoch_order)
        self._epoch_order = rng.get_state()
        skip = done * self._session.plan.batch.gradient_accumulation_steps
        batches = self._data.train_batches(loader, epoch, skip)
        if resumed is not None and done > 0:
            resumed.random.restore(rng)
        return batches

    def end_epoch_again(self, resumed: Boundary) -> None:
        """Stand where an epoch had ended."""
        self.epoch, self.update = resumed.epoch, resumed.update
        resumed.random.restore(self._data.rng)

    def mark(self, pending: Pending, phase: str = "acting", *, saving: bool = False) -> None:
        """Remember this moment, from which the run can go on."""
        state, control, session = self._host.state, self._host.control, self._session
        due = () if saving else tuple(action for action in ACTIONS if getattr(control, f"should_{action}"))
        finished = state.global_step >= state.max_steps
        self.boundary = Boundary(
            epoch=self.epoch,
            update=self.update,
            phase=phase,
            due=due if phase != "stepped" else (),
            epoch_stop=control.should_epoch_stop,
            training_stop=control.should_training_stop and not finished,
            layout=make_layout(self._steps, session.plan.batch),
            last_logged=pending.last_logged,
            learning_rate=self.learning_rate,
            pending=pending.to_dicts(),
            progress=session.progress.to_dict(),
            seen={"num_input_tokens_seen": state.num_input_tokens_seen, "total_flos": state.total_flos},
            draws=session.step.draws,
            history=len(state.log_history),
            random=RandomStates.capture(self._data.rng),
            epoch_order=self._epoch_order,
            carry=session.step.carry,
            offset=self.offset,
            updates=session.step.updates,
        )
