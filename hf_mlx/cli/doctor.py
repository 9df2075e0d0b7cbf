"""``hf-mlx doctor``: one checkpoint, here and in torch."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the ``doctor`` command."""
    parser = subparsers.add_parser(
        "doctor",
        help="compare a model's logits and one gradient with torch, on your own checkpoint",
        description="Load a model here and in torch (fp32), compare logits and one gradient, and report device, "
        "versions and BLAS.",
    )
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from ..models.doctor import diagnose
    from ..settings.plan import ModelPlan

    diagnosis = diagnose(arguments.model, ModelPlan(revision=arguments.revision))
    print(diagnosis)
    return 0 if diagnosis.ok else 1
