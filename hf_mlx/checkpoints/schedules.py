"""Whether the schedule of a checkpoint is one that this run can go on with."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..intake import has_type, show
from ..settings.plan import TrainPlan
from .damage import FILES
from .state_files import OPTIMIZER, SCHEDULER, TORCH_NAMES

logger = logging.getLogger(__name__)


def compare_schedules(
    schedule: Mapping[str, Any], plan: TrainPlan, folder: Path, *, updates: int | None, recorded: int | None
) -> None:
    """Refuse a schedule that this run cannot go on with; says once what of the plan has no effect.

    Args:
        schedule: The state that was read.
        plan: Of this run.
        folder: Where it was read.
        updates: Steps that the optimizer's state counts; None where it counts none.
        recorded: Steps of the optimizer by our own record; None in a checkpoint of another library.

    Raises:
        CheckpointError: Of another kind, or of another step than the optimizer.
    """
    by_metric = "num_bad_epochs" in schedule
    if not by_metric:
        _check_schedule(schedule, folder)
    if by_metric != (plan.schedule.name in ("reduce_lr_on_plateau", "greedy")):
        raise CheckpointError(
            f"{folder}: the state of another schedule than lr_scheduler_type={plan.schedule.name!r}",
            "the schedule that the checkpoint was written with",
            "set lr_scheduler_type as in that run",
        )
    if by_metric:
        return
    # Where train() was called again, the optimizer has gone on counting and the schedule has begun anew.
    made = schedule["last_epoch"]
    fits = updates is None or (updates >= made if recorded is None else updates == recorded)
    if not fits:
        raise CheckpointError(
            f"{folder}: an optimizer after {updates} steps beside a schedule after {schedule['last_epoch']}",
            f"{TORCH_NAMES[OPTIMIZER]} and {TORCH_NAMES[SCHEDULER]} of the same step",
            "resume from another checkpoint of that run",
        )
    before, now = schedule["base_lrs"][0], plan.optim.learning_rate
    if before != now:
        logger.warning(
            f"learning_rate={now:g} has no effect on a resumed run, here as in transformers: the schedule goes on "
            f"from the checkpoint's {before:g}. For another one begin a new run from these weights."
        )


def _check_schedule(schedule: Mapping[str, Any], folder: Path) -> None:
    rates, steps = schedule.get("base_lrs"), schedule.get("last_epoch")
    if not (isinstance(rates, list) and rates and all(has_type(x, float) and 0 <= x < math.inf for x in rates)):
        raise FILES.refuse(folder, f"a schedule with base_lrs={show(rates)}", "base_lrs: a list of learning rates")
    if not has_type(steps, int) or not has_type(schedule.get("_step_count", 1), int):
        raise FILES.refuse(folder, f"a schedule with last_epoch={show(steps)}", "last_epoch: a number of steps")
