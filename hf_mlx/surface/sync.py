"""A reference that follows its policy: trl's ``SyncRefModelCallback``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def sync_callback(every: int, move: Callable[[], None]) -> Any:
    """A callback that calls ``move`` at the end of each ``every``-th step, as trl 1.16 ``SyncRefModelCallback``."""
    from transformers import TrainerCallback

    class SyncRefModelCallback(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % every == 0:
                move()

    return SyncRefModelCallback()
