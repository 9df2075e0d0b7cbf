"""``hf-mlx run``: an unedited TRL script, trained by MLX."""

from __future__ import annotations

import argparse
import builtins
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import SettingError
from ..processes.launcher import TENSOR_PARALLEL, read_launcher
from ..reports.place import VARIABLE


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to ``hf-mlx``."""
    parser = subparsers.add_parser(
        "run",
        help="run a TRL script unedited, trained by MLX",
        description="Run SCRIPT as python would, with trl.SFTTrainer trained by MLX. What is done another way than "
        "upstream is printed once, to standard error, and so is the name of any other trainer, which torch trains.",
    )
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="hold the model on N processes together, each of which has a part; they are started on this machine where "
        "no launcher has started them",
    )
    add_flags(parser)
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="the Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments")
    parser.set_defaults(run=run, needs_mlx=False)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that ``run`` and ``sft`` share."""
    parser.add_argument("--strict", action="store_true", help="refuse settings that are honoured with other numbers")
    parser.add_argument(
        "--dry-run", action="store_true", help="print plan, ledger, parameters, steps and memory; train nothing"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="also write the last run's curves, settings and rows as HTML"
    )


def place_report(options: argparse.Namespace) -> None:
    """A script's output_dir holds what upstream writes there: a report only where one is asked for."""
    if options.report is not None:
        os.environ[VARIABLE] = str(options.report.absolute())
    os.environ.setdefault(VARIABLE, "0")


def run(options: argparse.Namespace) -> int:
    """Run the script; returns its exit status."""
    from ..bystanders import Bystanders
    from ..stand_in import install, say

    script: Path = options.script
    if not script.is_file():
        raise SettingError(f"SCRIPT {script}", "a Python file", "hf-mlx run train.py --your-own flags")
    if options.tensor_parallel != 1:
        _split(options)
    place_report(options)
    bystanders = Bystanders(say, strict=options.strict)

    def built() -> None:
        bystanders.trained = True

    imports, talk = install(strict=options.strict, dry_run=options.dry_run, on_built=built)
    imports.after("transformers.trainer", bystanders.watch)
    sys.argv = [str(script), *options.arguments]
    sys.path[0:0] = [str(script.resolve().parent)]
    try:
        status = execute(script, talk)
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
        status = 0
    finally:
        talk.summary()
    # An error of the script's own says enough.
    return 1 if status == 0 and bystanders.end() else status


def _split(options: argparse.Namespace) -> None:
    """Be one of the processes that hold the model together, or become their launcher.

    Raises:
        SettingError: There are others of them, or fewer than two are asked for.
    """
    ways = options.tensor_parallel
    if ways < 2:
        raise SettingError(
            f"--tensor-parallel {ways}", "two processes or more", f"hf-mlx run --tensor-parallel 2 {options.script}"
        )
    os.environ[TENSOR_PARALLEL] = str(ways)
    launched = read_launcher()
    if launched is None:
        command = start_processes(options, ways)
        sys.stdout.flush()
        os.execv(command[0], command)


def start_processes(options: argparse.Namespace, ways: int) -> list[str]:
    """The command line of ``hf-mlx launch`` for the options of ``hf-mlx run``."""
    asked = [flag for flag, given in {"--strict": options.strict, "--dry-run": options.dry_run}.items() if given]
    asked += ["--report", str(options.report)] if options.report is not None else []
    launch = [sys.executable, "-m", "hf_mlx.cli.main", "launch", "-n", str(ways), "--tensor-parallel"]
    return [*launch, *asked, str(options.script), *options.arguments]


def execute(script: Path, talk: Any) -> int:
    """Run a file as ``__main__``, as ``python FILE`` does; an error prints the script's own traceback.

    Args:
        script: The file; a notebook's cells one after the other.
        talk: Says which of a notebook's own lines are not run.

    Returns:
        0, or 1 after an uncaught exception. ``SystemExit`` passes through.
    """
    from ..stand_in import Shell, compile_script

    module = ModuleType("__main__")
    module.__file__ = str(script)
    vars(module)["__builtins__"] = builtins
    sys.modules["__main__"] = module
    try:
        code, is_notebook = compile_script(script)
    except SyntaxError as error:
        sys.excepthook(type(error), error.with_traceback(None), None)
        return 1
    if is_notebook:
        shell = Shell(talk, vars(module))
        vars(module)["get_ipython"] = lambda: shell
    try:
        exec(code, vars(module))
    except Exception as error:
        trace = error.__traceback__
        # This function's own frame is not part of the script.
        error.__traceback__ = trace.tb_next if trace else None
        sys.excepthook(type(error), error, error.__traceback__)
        # As the interpreter leaves it: what the process ends with.
        sys.last_type, sys.last_value, sys.last_traceback = type(error), error, error.__traceback__
        if (together := sys.modules.get("hf_mlx.processes.world")) is not None:
            together.report_failure(error)
        return 1
    return 0
