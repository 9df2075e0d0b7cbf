"""Runs scripts one after the other, each as ``__main__`` with its own arguments; what one prints goes to a file."""

import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

side, model, rows, output, *names = sys.argv[1:]
for name in names:
    # The script as it was written, or the same run in today's names for plain TRL on a CPU.
    script = Path(__file__).parent / f"{name}.py"
    folder = Path(output) / name
    folder.mkdir(parents=True)
    flags = script.with_suffix(".flags").read_text().split() if script.with_suffix(".flags").exists() else []
    sys.argv = [str(script), side, model, rows, str(folder), *flags]
    with (folder / "printed.txt").open("w") as file, redirect_stdout(file):
        runpy.run_path(str(script), run_name="__main__")
