"""One of the processes that hold one model together: ``tensor_worker.py MODELS OUT CASES.json``; see ``rank_runs``.

CASES.json has cases by name, and names of scenarios. OUT.<rank> gets what each logged; adapters lie beside it.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # Any of its names prepares MLX, which the processes are asked of.
    from compiling import is_uncompiled, uncompiled_if
    from tensor_cases import play
    from tensor_scenarios import perform

    from hf_mlx import MLXSFTTrainer  # noqa: F401
    from hf_mlx.processes.world import the_world

    models, out, cases = Path(sys.argv[1]), sys.argv[2], json.loads(Path(sys.argv[3]).read_text())
    made = {}
    for name, case in cases.items():
        with uncompiled_if(is_uncompiled(name)):
            made[name] = perform(name, models, f"{out}-{name}") if case is None else play(case, models, f"{out}-{name}")
        Path(f"{out}.{the_world().rank}").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
