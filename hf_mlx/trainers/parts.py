"""What the parts of a trainer share: the attributes that its constructor sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..checkpoints.interrupt import Interrupt
from ..data.order import Steps
from ..feed import Feed
from ..loop.run import Loop
from ..processes.world import World
from ..recipes.recipe import Recipe
from ..reports.recorder import Recorder
from ..session import Session
from ..settings.clipping import GradClip
from ..settings.plan import TrainPlan
from ..surface.bases import Base
from ..surface.checkpoints import Checkpoints
from ..surface.evaluation import Evaluation
from ..surface.hub import HubRepo
from ..surface.memory import MemoryMeter
from ..surface.startup import StartClock


class Parts:
    """Attributes of a constructed trainer."""

    recipe: Recipe
    args: Any
    state: Any
    control: Any
    callback_handler: Any
    accelerator: Any
    processing_class: Any
    compute_metrics: Callable | None
    preprocess_logits_for_metrics: Callable | None
    train_dataset: Any
    eval_dataset: Any
    plan: TrainPlan
    ledger: Any
    grad_clip: GradClip
    steps: Steps
    data: Feed
    session: Session
    hub: HubRepo
    world: World
    is_in_train: bool = False
    #: What may not be set on this trainer beside what no trainer lets be set: name to what to write.
    remedies: Mapping[str, str] = {}

    _base: Base
    _model: Any
    _clock: StartClock
    _memory: MemoryMeter
    _recorder: Recorder
    _evaluate_loader: Evaluation
    _tokens_before = 0
    _interrupt: Interrupt | None = None
    _loop: Loop | None = None
    _checkpoints: Checkpoints | None = None

    @property
    def model(self) -> Any:
        """The user's own object, with the weights trained so far; for a name, an :class:`MLXCausalLM`."""
        return self._model
