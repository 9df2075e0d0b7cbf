from __future__ import annotations

import os

from recording import Recorder, note


class SummaryWriter(Recorder):
    def __init__(self, log_dir: str | None = None) -> None:
        note("tensorboard.SummaryWriter", os.path.dirname(log_dir or ""))
        super().__init__("tensorboard")
