"""Writes docs/architectures.md from what a test run measured."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from architecture_checks import Comparison

from hf_mlx.models.architectures import can_pack

_HEAD = """# Architectures

Written by `make compat`; do not edit. Each model type below was built tiny with transformers {transformers} (every
parameter perturbed, fp32), saved, loaded here with mlx-lm {mlx_lm} and compared with torch. Differences are relative
to the largest value: of the logits, and of each gradient tensor (the worst one counts).

- **verified** ({verified}): compared as below; weights go back under Hugging Face's names bit for bit.
- **refused** ({refused}): loading raises `ModelError` with the reason.
- Every other type that mlx-lm implements loads with one warning, which names `hf-mlx doctor MODEL`: that command
  compares logits and gradients with torch on your own checkpoint.

| model type | logits | worst gradient | packing |
|---|---|---|---|
"""


def write_table(path: Path, rows: dict[str, Comparison], refused: dict[str, str]) -> None:
    """Writes the page: one line for each verified type, then the refusals with their reasons."""
    lines = [
        f"| {name} | {_digits(row.logits)} | {_digits(row.gradient)} | {'yes' if can_pack(name) else 'no'} |"
        for name, row in sorted(rows.items())
    ]
    head = _HEAD.format(
        transformers=version("transformers"), mlx_lm=version("mlx-lm"), verified=len(rows), refused=len(refused)
    )
    tail = ["", "| refused | why |", "|---|---|", *(f"| {n} | {why} |" for n, why in sorted(refused.items())), ""]
    path.parent.mkdir(exist_ok=True)
    path.write_text(head + "\n".join([*lines, *tail]), encoding="utf-8")


def _digits(value: float) -> str:
    # A power of ten that bounds it: the table must not change with the order of a sum.
    return next(f"< 1e-{n}" for n in range(9, -9, -1) if value < 10.0**-n)
