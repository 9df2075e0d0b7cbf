"""What a checkpoint's broken file raises, whichever module finds it."""

from __future__ import annotations

from ..errors import CheckpointError
from ..intake import Intake


class DamagedCheckpoint(CheckpointError):
    """A folder that was not written to its end, or was changed since."""


FILES = Intake(
    DamagedCheckpoint,
    "resume from another checkpoint: trainer.train(resume_from_checkpoint=True) takes the newest complete one",
)
