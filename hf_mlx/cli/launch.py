"""``hf-mlx launch``: ``hf-mlx run`` on several processes, started by ``mlx.launch``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ..errors import SettingError
from ..processes.launcher import TENSOR_PARALLEL
from .run import add_flags

_BACKENDS = ("ring", "jaccl", "jaccl-ring", "mpi", "nccl")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to ``hf-mlx``."""
    parser = subparsers.add_parser(
        "launch",
        help="run a TRL script on several processes or machines, which train one model",
        description="Start SCRIPT with mlx.launch as `hf-mlx run` runs it, on -n processes of this machine or on the "
        "machines of --hostfile. Each process reads its part of every batch; the numbers are those of torchrun.",
    )
    parser.add_argument("-n", dest="processes", type=int, default=None, help="processes on each host")
    parser.add_argument("--hosts", help="addresses, separated by commas; the ring takes IPs")
    parser.add_argument("--hostfile", type=Path, help="hosts in a JSON file, as mlx.distributed_config writes it")
    parser.add_argument("--backend", choices=_BACKENDS, help="how they exchange; MLX chooses where it is left out")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="set for every process")
    parser.add_argument("--python", help="the interpreter on every machine; this one where it is left out")
    parser.add_argument("--cwd", help="the folder to run in on every machine")
    parser.add_argument("--starting-port", type=int, help="first port of the ring")
    parser.add_argument(
        "--tensor-parallel",
        action="store_true",
        help="hold one model together, of which each process has a part, and read the same rows: for a base that fits "
        "no single machine",
    )
    add_flags(parser)
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="the Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments")
    parser.set_defaults(run=run, needs_mlx=False)
    return parser


def run(options: argparse.Namespace) -> int:
    """Become ``mlx.launch``, which starts the processes and hands on what they print.

    Raises:
        SettingError: There is no such script, or nothing says on how many processes.
    """
    command = make_command(options)
    sys.stdout.flush()
    os.execv(command[0], command)


def make_command(options: argparse.Namespace) -> list[str]:
    """The command line of ``mlx.launch``: its own flags, ``--``, and the command of each process."""
    script: Path = options.script
    if not script.is_file():
        raise SettingError(f"SCRIPT {script}", "a Python file", "hf-mlx launch -n 2 train.py --your-own flags")
    if options.processes is None and options.hosts is None and options.hostfile is None:
        raise SettingError(
            "hf-mlx launch without -n, --hosts and --hostfile",
            "how many processes there are, or where",
            f"hf-mlx launch -n 2 {script}, or hf-mlx run {script} for one",
        )
    if options.processes is not None and options.processes < 1:
        raise SettingError(f"-n {options.processes}", "at least one process", f"hf-mlx launch -n 2 {script}")
    if options.hostfile is not None and not options.hostfile.is_file():
        raise SettingError(
            f"--hostfile {options.hostfile}",
            "a JSON file of hosts",
            "mlx.distributed_config --hosts mac1,mac2 --output-hostfile hosts.json",
        )
    flags = {
        "-n": options.processes,
        "--hosts": options.hosts,
        "--hostfile": options.hostfile,
        "--backend": options.backend,
        "--python": options.python,
        "--cwd": options.cwd,
        "--starting-port": options.starting_port,
    }
    launcher = [sys.executable, "-m", "hf_mlx.processes.starter"]
    launcher += [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]
    environ = [*options.env, *([f"{TENSOR_PARALLEL}=all"] if options.tensor_parallel else [])]
    launcher += [word for setting in environ for word in ("--env", setting)]
    asked = [flag for flag, given in {"--strict": options.strict, "--dry-run": options.dry_run}.items() if given]
    asked += ["--report", str(options.report)] if options.report is not None else []
    # What follows -- is the processes' own: mlx.launch would take a script's -n for its own.
    process = [options.python or sys.executable, "-m", "hf_mlx.cli.main", "run", *asked, str(script)]
    return [*launcher, "--", *process, *options.arguments]
