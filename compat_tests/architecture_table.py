"""Writes docs/architectures.md from what two test runs measured: the comparison of one pass, and that of training.

Each run knows its own half, so both halves are kept in a JSON file beside the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from architecture_checks import Comparison
from training_checks import Training

from hf_mlx.models.architectures import KNOWN_WRONG, VERIFIED, can_pack

_ROOT = Path(__file__).parents[1] / "docs"
DOCS = _ROOT / "architectures.md"
MEASURED = _ROOT / "architectures.json"

_HEAD = """# Architectures

Written by `make compat`; do not edit. Each model type below was built tiny with transformers {transformers} (every
parameter perturbed, fp32), saved, loaded here with mlx-lm {mlx_lm} and compared with torch. Differences are relative
to the largest value: of the logits, and of each gradient tensor (the worst one counts).

- **verified** ({verified}): compared as below; weights go back under Hugging Face's names bit for bit.
- **refused** ({refused}): loading raises `ModelError` with the reason.
- Every other type that mlx-lm implements loads with one warning, which names `hf-mlx doctor MODEL`: that command
  compares logits and gradients with torch on your own checkpoint.

**`all-linear`** ({whole} of {trained} types): three steps of `LoraConfig(target_modules="all-linear")` in fp32 at a
learning rate of 1e-3, here and in trl {trl}; the larger difference of loss and gradient norm. Experts and routers that
PEFT turns into `target_parameters`, latent attention that MLX holds by head, and vision towers that no text reaches are
adapted, drawn and saved as PEFT does. Where PEFT itself cannot, what is left out stands beside the figure, and
`all-linear` alone is refused with that line.
An option of `config.json` that would compute something else here is refused by its key; weights that do not fit
are refused with the options that differ from their class's defaults.
**Adapter**: our export has exactly the keys that trl saves, and torch with PEFT {peft} gives it our eval loss, to the
difference shown. ¹ Beside `transformers.Trainer`, because trl {trl} cannot train the type.

| model type | all-linear | adapter | logits | worst gradient | packing |
|---|---|---|---|---|---|
"""


def record(measured: Path, page: Path, *, passes: Any = None, training: Any = None) -> None:
    """Takes in what was measured of one half, and writes the page once both are whole.

    Args:
        measured: The JSON file.
        page: The Markdown page.
        passes: Model type to :class:`Comparison`.
        training: Model type to :class:`Training`.
    """
    kept = json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else {}
    if passes is not None:
        kept["passes"] = _merged(kept, "passes", {name: _pass_cells(name, row) for name, row in passes.items()})
    if training is not None:
        kept["training"] = _merged(kept, "training", {name: _training_cells(row) for name, row in training.items()})
    measured.parent.mkdir(parents=True, exist_ok=True)
    measured.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if all(kept.get(half, {}).keys() == VERIFIED.keys() for half in ("passes", "training")):
        page.write_text(_render(kept), encoding="utf-8")


def _merged(kept: Mapping[str, Any], half: str, rows: dict[str, list[str]]) -> dict[str, list[str]]:
    """Rows of a run over the older ones, of the types that are verified still."""
    whole = {**kept.get(half, {}), **rows}
    return {name: whole[name] for name in sorted(whole) if name in VERIFIED}


def _render(kept: Mapping[str, Mapping[str, list[str]]]) -> str:
    passes, training = kept["passes"], kept["training"]
    empty = ["", ""]
    lines = [f"| {name} | {' | '.join([*training.get(name, empty), *cells])} |" for name, cells in passes.items()]
    trl = version("trl")
    head = _HEAD.format(
        transformers=version("transformers"),
        mlx_lm=version("mlx-lm"),
        trl=trl,
        peft=version("peft"),
        verified=len(passes),
        refused=len(KNOWN_WRONG),
        trained=len(training),
        whole=sum("without" not in cells[0] for cells in training.values()),
    )
    tail = ["", "| refused | why |", "|---|---|", *(f"| {n} | {why} |" for n, why in sorted(KNOWN_WRONG.items())), ""]
    return head + "\n".join([*lines, *tail])


def _pass_cells(name: str, row: Comparison) -> list[str]:
    return [_digits(row.logits), _digits(row.gradient), "yes" if can_pack(name) else "no"]


def _training_cells(row: Training) -> list[str]:
    mark = "" if row.peer == "trl" else " ¹"
    left = f" without {row.excluded}" if row.excluded else ""
    return [_digits(max(row.loss, row.grad_norm)) + left + mark, _digits(row.evaluation)]


def _digits(value: float) -> str:
    # A power of ten that bounds it: the table must not change with the order of a sum.
    return next(f"< 1e-{n}" for n in range(6, -9, -1) if value < 10.0**-n)
