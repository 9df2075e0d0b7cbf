"""``hf-mlx doctor``: one checkpoint, here and in torch; or this machine, against stored numbers."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..errors import SettingError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the ``doctor`` command."""
    parser = subparsers.add_parser(
        "doctor",
        help="compare a model's logits and one gradient with torch, or test this machine",
        description="Load a model here and in torch (fp32), compare logits and one gradient, and report device, "
        "versions and BLAS. With --self-test instead: train a tiny model on this machine and compare every loss and "
        "gradient norm with TRL's, packed rows with unpacked ones, quantised products, a checkpoint and an adapter "
        "with what was saved; it downloads nothing. Ends with status 1 when a number is wrong.",
    )
    parser.add_argument("model", nargs="?", help="folder or hub id")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--self-test", action="store_true", help="test this machine instead of a model")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="with --self-test: also write the report as JSON, for an issue"
    )
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", help="with --self-test: how long one check may take (180)"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.self_test:
        return _self_test(arguments)
    alone = next((flag for flag in ("report", "limit") if getattr(arguments, flag)), None)
    if arguments.model is None or alone:
        given = "hf-mlx doctor without a model" if arguments.model is None else f"--{alone} without --self-test"
        raise SettingError(
            given, "a model, or --self-test", "hf-mlx doctor OWNER/MODEL, or hf-mlx doctor --self-test --report FILE"
        )
    from ..models.doctor import diagnose
    from ..settings.plan import ModelPlan

    diagnosis = diagnose(arguments.model, ModelPlan(revision=arguments.revision))
    print(diagnosis)
    return 0 if diagnosis.ok else 1


def _self_test(arguments: argparse.Namespace) -> int:
    if arguments.model is not None or arguments.revision is not None:
        raise SettingError(
            "--self-test with a model",
            "one of them: the self-test makes its own model",
            "hf-mlx doctor --self-test, then hf-mlx doctor OWNER/MODEL",
        )
    target: Path | None = arguments.report
    if target and (target.is_dir() or not target.absolute().parent.is_dir()):
        raise SettingError(
            f"--report {target}", "a file in a folder that exists", "hf-mlx doctor --self-test --report report.json"
        )
    # MLX asks at its first product: fp32 is to be compared as fp32.
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    from ..self_test.watch import LIMIT, run_self_test

    limit = LIMIT if arguments.limit is None else arguments.limit
    if not 0 < limit <= 86_400:
        raise SettingError(f"--limit {limit:g}", "seconds, more than none", "hf-mlx doctor --self-test --limit 180")
    report = run_self_test(announce=lambda name: print(f"{name} ...", file=sys.stderr, flush=True), limit=limit)
    print(report)
    if target:
        target.write_text(report.to_json() + "\n", encoding="utf-8")
        print(f"wrote {target}")
    return 0 if report.ok else 1
