"""The process in which the self-test's checks run: what it finds goes to its parent, a line of JSON at a time.

``python -m hf_mlx.self_test.worker NAME...``
"""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

#: Begins each line that is meant for the parent; libraries print as well.
MARK = "hf-mlx-self-test "
#: Asks the process where it is, also while it waits in a driver; its answer goes to stderr.
ASK = signal.SIGUSR1


def main(names: Sequence[str]) -> None:
    """Run the checks of these names."""
    from ..models.doctor import environment
    from .checks import CHECKS
    from .report import run_checks

    faulthandler.register(ASK)
    _tell(environment=environment())
    chosen = {name: CHECKS[name] for name in names}
    for name, check in run_checks(chosen, announce=lambda name: _tell(begins=name, cpu=time.process_time())):
        _tell(name=name, check=asdict(check))
    _tell(done=True)


def _tell(**message: Any) -> None:
    # Not what a check has put in its place.
    print(f"{MARK}{json.dumps(message)}", file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    from ..backends import prepare_backend

    prepare_backend()
    main(sys.argv[1:])
