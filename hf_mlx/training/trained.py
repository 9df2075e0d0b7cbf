"""What a step trains and how it is kept: the arrays, the optimizer's state and gradients that wait for their update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import mlx.core as mx

from ..settings.clipping import GradClip
from .bundles import LARGEST, Bundles
from .clip import clip_gradients, clip_whole, norm_of, square_sum
from .exchange import GradientExchange
from .measured import Held, StepMetrics
from .objective import Objective
from .optim import Optimizer
from .optimizers.contract import Arrays, State


class Trained:
    """Trainable arrays in bundles, with what updates them.

    Attributes:
        objective: Its slots hold the arrays.
        optimizer: The update rule.
        clip: The clip in force.
        exchange: Adds the gradients of a window up over several processes; None for one process.
        draws: Micro-batches trained so far.
    """

    objective: Objective
    optimizer: Optimizer
    clip: GradClip
    exchange: GradientExchange | None
    draws: int
    traces: int

    _names: list[str]
    _computed_in: Callable[[], Mapping[str, mx.Dtype]]
    _carry: tuple[Arrays, Arrays] | None
    _bundles: Bundles
    _params: Arrays
    _state: State
    _views: Arrays
    _viewed: Arrays | None = None
    _bound: tuple[Arrays | None, int] = (None, 0)
    _whole: tuple[Arrays, State] | None = None
    _holds: WeakSet[Held]
    _left: list[Any]

    @property
    def params(self) -> Arrays:
        """Flat {MLX name: array}: views of what is kept; another dict after each update."""
        if self._whole is not None:
            return self._whole[0]
        if self._viewed is not self._params:
            self._views, self._viewed = self._bundles.unpack(self._params), self._params
        return self._views

    @property
    def state(self) -> dict[str, Arrays]:
        """The optimizer's state, {torch's name: {MLX name: array}}: views of what is kept."""
        if self._whole is not None:
            return self._whole[1]
        return {slot: self._bundles.unpack(arrays) for slot, arrays in self._state.items()}

    @contextmanager
    def joined(self, what: str) -> Iterator[None]:
        """A block in which parameters and state are whole where processes hold parts of them; all of them enter it.

        Args:
            what: What for, for messages.
        """
        split = None if self.exchange is None else self.exchange.split
        if split is None or self._whole is not None:
            yield
            return
        params, state = split.join(self.params, what), {k: split.join(v, what) for k, v in self.state.items()}
        try:
            self._whole = params, state
            self._bind()
            yield
        finally:
            self._whole = None
            self._bind()

    @property
    def carry(self) -> tuple[Arrays, Arrays] | None:
        """Gradients by MLX name and metrics that are accumulated towards the next update, or None."""
        return None if self._carry is None else (self._bundles.unpack(self._carry[0]), self._carry[1])

    @carry.setter
    def carry(self, carry: tuple[Arrays, Arrays] | None) -> None:
        if carry is None:
            self._carry = None
            return
        measured = ("loss", "micro_batches", *self.objective.metrics)
        self._carry = self._bundles.pack(carry[0]), {name: carry[1][name] for name in measured}

    def collect(self) -> tuple[Arrays, Arrays]:
        """The gradients that are carried, by MLX name, clipped, as torch's are before ``optimizer.step()``.

        Returns:
            The gradients; and what the window measured, their norm before the clip included.
        """
        grads, sums = self._clip(self._carry)
        return self._bundles.unpack(grads), sums

    def apply(self, grads: Arrays, sums: Arrays, step: int, lr: float) -> StepMetrics:
        """Update with gradients that are clipped already; the window is done.

        Args:
            grads: Those of :meth:`collect`, or what was made of them.
            sums: What it measured.
            step: Counts from 1; enters the bias corrections.
            lr: Learning rate of this step.
        """
        try:
            sums = self._update_clipped(self._bundles.pack(grads), sums, self._hyper(step, lr))
        finally:
            self._bind()
        self._carry = None
        return StepMetrics.split(sums)

    def take_carried(self) -> StepMetrics | None:
        """What the carry measured since it was last taken; its gradients stay. None when nothing is carried."""
        if self._carry is None:
            return None
        grads, sums = self._carry
        self._carry = grads, {key: mx.zeros_like(value) for key, value in sums.items()}
        return StepMetrics.split(sums)

    def load(self, params: Arrays, state: dict[str, Arrays]) -> None:
        """Replace parameters and optimizer state, e.g. by those of a checkpoint.

        Args:
            params: Flat {MLX name: array}, in any order.
            state: {torch's name: {MLX name: array}}.
        """
        params = {name: params[name] for name in self._names}
        if self._whole is not None and self.exchange is not None and self.exchange.split is not None:
            cut, self._whole = self.exchange.split.cut, (params, state)
            params, state = cut(params), {slot: cut(arrays) for slot, arrays in state.items()}
        bundles = self._arrange(params)
        if bundles != self._bundles:
            # A trace holds where each array lies.
            carry, self._bundles = self.carry, bundles
            self.carry = carry
            self._compile()
        self._params = self._bundles.pack(params)
        self._state = {slot: self._bundles.pack(arrays) for slot, arrays in state.items()}
        self._left = []
        self.optimizer.forget_host()
        self._bind()

    def adopt(self, optimizer: Optimizer, clip: GradClip) -> None:
        """Go on with another update rule or clip; another optimizer begins with an empty state."""
        params = self.params
        state = self.state if optimizer is self.optimizer else optimizer.init(params)
        self.optimizer, self.clip = optimizer, clip
        self._compile()
        self.load(params, state)

    def begin_update(self, *then: Any) -> None:
        """Begin the last update where it is only described; nothing else needs to ask for it before it reads arrays.

        Args:
            then: What comes after it, which the host orders together with it.
        """
        while len(self._left) > 1:
            self._begin_stage()
        update, self._left = self._left, []
        # MLX begins with what it is asked for last.
        mx.async_eval(*then, update)

    def _begin_stage(self) -> None:
        """Begin the next of the gradients that are left; an update writes over those that nobody else holds."""
        if len(self._left) > 1:
            mx.async_eval(self._left.pop(0))

    def hold(self) -> Held:
        """What :meth:`restore` goes back to, until an update lets large arrays go."""
        held = Held(self._params, self._state, self._carry, self.draws)
        self._holds.add(held)
        return held

    def restore(self, held: Held) -> None:
        """Undo what was done since ``held``; of an update that has let the old arrays go, nothing."""
        if held.taken:
            return
        self._params, self._state, self._carry, self.draws = held.params, held.state, held.carry, held.draws
        self._left = []
        self._bind()

    def _compile(self) -> None:
        raise NotImplementedError

    def _wrap(self, function: Callable) -> Callable:
        raise NotImplementedError

    def _compile_update(self) -> None:
        self._clip = self._wrap(self._clip_carried)
        self._updated = self._wrap(self._update_packed)
        self._measure = self._wrap(self._measure_carried)

    def _arrange(self, params: Arrays) -> Bundles:
        largest = LARGEST if self.optimizer.elementwise else 0
        kinds = {} if self.exchange is None else self.exchange.kinds
        return Bundles(params, self.optimizer.decay, self._computed_in(), largest, kinds)

    @property
    def _replaces(self) -> bool:
        return replaces(self.optimizer, self._params.values())

    def _bind(self) -> None:
        # Tracing leaves placeholders in the model; put arrays back whatever happened.
        self.objective.slots.bind(self.params)
        self._bound = self._params, self.traces

    def _bind_what_moved(self) -> None:
        """:meth:`_bind`, unless nothing was updated or traced since: it makes a view of each array."""
        if self._bound[0] is not self._params or self._bound[1] != self.traces:
            self._bind()

    def _begin_left(self, *then: Any) -> None:
        # The last update; and what processes exchange before the step itself, on every one.
        if self.exchange is not None:
            self.begin_update()
            self.exchange.begin()
        self.begin_update(*then)

    def _update_clipped(self, grads: Arrays, sums: Arrays, hyper: Arrays) -> Arrays:
        """Update with gradients as they are kept, in the compiled function or by the script's own optimizer."""
        if self.optimizer.on_host:
            # The optimizer moves for good, so what can fail must have been computed by then.
            mx.eval(grads, sums)
            moved = self.optimizer.step_on_host(self.params, self._bundles.unpack(grads))
            self._params = self._bundles.pack(moved)
        elif self._replaces:
            moved = self._updated(self._params, grads, self._state, hyper)
            del grads
            self._replace(*moved)
            return sums
        else:
            self._params, self._state = self._updated(self._params, grads, self._state, hyper)
        mx.async_eval(self._params, self._state, sums)
        return sums

    def _replace(self, params: Arrays, state: State) -> None:
        """Take what an update makes; old arrays go as new ones come: only pending work and the carry hold them."""
        self._let_go()
        self._take(params, state)

    def _take(self, params: Arrays, state: State, left: Sequence[Any] = ()) -> None:
        """Take what an update makes, which :meth:`begin_update` begins after the stages that are ``left`` before it."""
        self._params, self._state, self._carry, self._left = params, state, None, [*left, (params, state)]
        self._bind()

    def _let_go(self) -> None:
        """Let the arrays go that were held; from here on there is no way back."""
        for held in list(self._holds):
            held.give_up()

    def _update_packed(self, *given: Any) -> tuple[Arrays, Any]:
        return self.optimizer.update(*given)

    def _hyper(self, step: int, lr: float) -> Arrays:
        return {key: mx.array(value, mx.float32) for key, value in self.optimizer.hyper(step, lr).items()}

    def _gather(self, carry: tuple[Arrays, Arrays]) -> tuple[Arrays, Arrays, mx.array, Arrays]:
        """Gradients and metrics of a whole window, of all processes; the norm of the gradients, and what each adds."""
        if self.exchange is not None:
            return *self.exchange(*carry), {}
        squares = {name: square_sum(grad) for name, grad in carry[0].items()}
        return *carry, norm_of(squares.values()), squares

    def _measure_carried(self, carry: Any) -> tuple[Arrays, Arrays, Arrays, Arrays]:
        """The gradients, the factor that clips them if there is one, what the window measured, and their squares."""
        grads, metrics, norm, squares = self._gather(carry)
        grads, scale = clip_gradients(grads, self.clip, norm)
        return grads, {} if scale is None else {"scale": scale}, {**metrics, "grad_norm": norm}, squares

    def _clip_carried(self, carry: Any) -> tuple[Arrays, Arrays]:
        grads, metrics, norm, _ = self._gather(carry)
        return clip_whole(grads, self.clip, norm), {**metrics, "grad_norm": norm}


def replaces(optimizer: Optimizer, arrays: Iterable[mx.array]) -> bool:
    """Whether there are arrays too large to exist twice, so that an update lets the old ones go, kind by kind.

    Args:
        optimizer: One that looks at whole matrices, or that is the script's own, moves all at once.
        arrays: What is trained.
    """
    return optimizer.elementwise and not optimizer.on_host and any(array.size > LARGEST for array in arrays)
