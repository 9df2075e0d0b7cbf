"""``hf-mlx compare``: where two traced runs part, and why."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from ..traces.compare import compare_traces


def add_parser(subparsers: Any) -> None:
    """Add the ``compare`` command."""
    parser: ArgumentParser = subparsers.add_parser(
        "compare",
        help="find the first step at which two traced runs differ",
        description="Compare two traces written by TraceCallback: the first step that differs, by how much, and the "
        "likely cause. The exit status is 0 if they are the same within the tolerance, else 1.",
    )
    parser.add_argument("a", help="trace of one run (.jsonl)")
    parser.add_argument("b", help="trace of the other run (.jsonl)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="relative difference that counts (default: %(default)s)"
    )
    parser.set_defaults(run=_run, needs_mlx=False)


def _run(arguments: Namespace) -> int:
    comparison = compare_traces(arguments.a, arguments.b, tolerance=arguments.tolerance)
    print(comparison)
    return 0 if comparison else 1
