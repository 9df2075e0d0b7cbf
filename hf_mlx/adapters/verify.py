"""Proof from outside: PEFT loads the exported adapter and computes what the MLX model computes."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import AdapterError, MissingDependency
from ..intake import lies
from ..settings.plan import ModelPlan
from ..version import find_version
from .files import write_files, write_text
from .source import CONFIG, FILES, read_config_file

RECEIPT = "verification.json"
# fp32 on both sides; thirty layers summed in another order stay below this, a wrong adapter does not.
TOLERANCE = 1e-4

_PROMPTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "Once upon a time, in a small village,",
    "1, 1, 2, 3, 5, 8,",
)
_PACKAGES = ("hf-mlx", "mlx", "mlx-lm", "transformers", "peft", "torch", "safetensors")


@dataclass(frozen=True)
class Report:
    """What :func:`verify_adapter` found; logits are compared in fp32, over every position of every prompt.

    Attributes:
        adapter: The adapter's folder.
        base: The base both sides loaded.
        revision: Its revision, as adapter_config.json records it.
        keys: Tensors in the adapter file.
        prompts: How many prompts were compared.
        largest_difference: Largest absolute logit difference, MLX against PEFT.
        relative_difference: The same over the largest absolute logit.
        adapter_effect: Largest absolute logit change from the base to the adapted model in PEFT; 0 is a no-op.
        missing: Keys PEFT expected and did not find.
        unexpected: Keys in the file that PEFT does not hold.
        versions: Package versions.
    """

    adapter: str
    base: str
    revision: str | None
    keys: int
    prompts: int
    largest_difference: float
    relative_difference: float
    adapter_effect: float
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    versions: dict[str, str]

    @property
    def ok(self) -> bool:
        """Every key in its place and the logits equal within :data:`TOLERANCE`, relative."""
        return not self.missing and not self.unexpected and self.relative_difference <= TOLERANCE

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "FAILED"
        faults = "".join(
            f", {len(v)} {n} keys" for n, v in (("missing", self.missing), ("extra", self.unexpected)) if v
        )
        return (
            f"{verdict}: {self.adapter}: {self.keys} tensors in PEFT{faults}; largest logit difference "
            f"{self.largest_difference:.2e} ({self.relative_difference:.1e} relative) on {self.prompts} prompts, "
            f"where the adapter moves logits by {self.adapter_effect:.2e}"
        )


def verify_adapter(
    folder: str | Path,
    base: str | Path | None = None,
    *,
    prompts: Sequence[str] | Sequence[Sequence[int]] | None = None,
) -> Report:
    """Load an adapter here and in PEFT, compare logits, print one line and write a receipt beside it.

    Args:
        folder: The adapter.
        base: Folder or hub id of the base; None takes the one in adapter_config.json.
        prompts: Texts, or token ids where the base has no tokenizer; four short texts by default.

    Returns:
        The report; ``report.ok`` is the verdict.

    Raises:
        AdapterError: The adapter is broken (see :func:`hf_mlx.import_adapter`), or names no base.
        MissingDependency: torch or peft is not installed.
    """
    folder = Path(folder).expanduser()
    config = read_config_file(folder)
    _need_peft()
    source = str(base if base is not None else config.get("base_model_name_or_path") or "")
    if not source:
        raise AdapterError(
            f"{folder / CONFIG}: base_model_name_or_path={config.get('base_model_name_or_path')!r}",
            "the base model it was trained on",
            'verify_adapter(dir, "owner/base-model")',
        )
    revision = config.get("revision") if base is None else None
    rows, ours, torch_class, resized = _mlx_logits(folder, source, revision, prompts)
    if not all(np.isfinite(logits).all() for logits in ours):
        raise FILES.refuse(folder, f"on {source} it gives logits that are NaN or infinite", "finite weights in both")
    with FILES.understood(folder, "an adapter and a base that PEFT and transformers load"):
        plain, theirs, keys, missing, unexpected = _peft_logits(folder, source, revision, rows, torch_class, resized)
    difference = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    largest = max(float(np.abs(b).max()) for b in theirs)
    report = Report(
        adapter=str(folder),
        base=source,
        revision=config.get("revision"),
        keys=keys,
        prompts=len(rows),
        largest_difference=difference,
        relative_difference=difference / largest,
        adapter_effect=max(_change(a, b) for a, b in zip(plain, theirs, strict=False)),
        missing=missing,
        unexpected=unexpected,
        versions=dict(_versions()),
    )
    receipt = json.dumps({"ok": report.ok, "tolerance": TOLERANCE, **asdict(report)}, indent=2)
    write_files(folder, {RECEIPT: lambda path: write_text(path, receipt + "\n")})
    print(report)
    return report


def _change(before: np.ndarray, after: np.ndarray) -> float:
    # A resized model has other columns; those of both are compared.
    columns = min(before.shape[-1], after.shape[-1])
    return float(np.abs(before[..., :columns] - after[..., :columns]).max())


def _mlx_logits(
    folder: Path, source: str, revision: str | None, prompts: Any
) -> tuple[list[list[int]], list, str, int | None]:
    """Rows of ids, our logits, the torch class, and the tokens that the adapter's model was resized to.

    Where it has new tokens, the last row is made of those.
    """
    import mlx.core as mx

    from ..models.load import load_model
    from ..models.vocabulary import count_rows
    from .read import read_adapter

    loaded = load_model(source, ModelPlan(revision=revision))
    rows, before = _token_rows(prompts, loaded.path, loaded.config), count_rows(loaded)
    adapter = read_adapter(folder, loaded)
    after = count_rows(loaded)
    if prompts is None:
        rows = [[token for token in row if token < after] or [0] for row in rows]
        rows += [list(range(before, min(after, before + 16)))] if after > before else []
    logits = [np.array(loaded.model(mx.array([row])).astype(mx.float32)) for row in rows]
    return rows, logits, adapter.torch_class, after if loaded.resized else None


def _peft_logits(
    folder: Path, source: str, revision: str | None, rows: list[list[int]], torch_class: str, resized: int | None
):
    import torch
    import transformers
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    def logits(model: Any, rows: list[list[int]]) -> list[np.ndarray]:
        with torch.no_grad():
            return [model(torch.tensor([row])).logits.float().numpy() for row in rows]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = (
            getattr(transformers, torch_class).from_pretrained(source, revision=revision, dtype=torch.float32).eval()
        )
        known = model.get_input_embeddings().weight.shape[0]
        plain = logits(model, [row for row in rows if max(row) < known])
        if resized is not None:
            # As the script did that trained it; every row then comes from the adapter's file.
            model.resize_token_embeddings(resized, mean_resizing=False)
        adapted = PeftModel.from_pretrained(model, str(folder)).eval()
        theirs = logits(adapted, rows)
        # What is loaded beside the adapter's own: ends of the vocabulary.
        held = set(get_peft_model_state_dict(adapted)) | set(adapted.state_dict())
    with safe_open(folder / "adapter_model.safetensors", framework="numpy") as file:
        keys = set(file.keys())
    missing = tuple(sorted({key for warning in caught for key in _missing_keys(str(warning.message))}))
    # Per-expert keys are fused on loading, so only the others can be compared by name.
    unexpected = tuple(sorted(key for key in keys - held if not re.search(r"\.experts\.\d+\.", key)))
    return plain, theirs, len(keys), missing, unexpected


def _missing_keys(message: str) -> list[str]:
    # peft.peft_model.PeftModel.load_adapter: "Found missing adapter keys while loading the checkpoint: [...]".
    return re.findall(r"'([^']+)'", message) if "missing adapter keys" in message else []


def _token_rows(prompts: Any, path: Path, config: dict[str, Any]) -> list[list[int]]:
    chosen = list(prompts) if prompts is not None else list(_PROMPTS)
    if not all(isinstance(prompt, str) for prompt in chosen):
        return [[int(token) for token in prompt] for prompt in chosen]
    if not any(lies(path / name) for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        if prompts is not None:
            raise AdapterError(
                f"text prompts for {path}, which has no tokenizer",
                "token ids, or a base with its tokenizer",
                "verify_adapter(dir, base, prompts=[[1, 2, 3]])",
            )
        vocabulary = (config.get("text_config") or config)["vocab_size"]
        return np.random.RandomState(0).randint(0, vocabulary, (len(_PROMPTS), 16)).tolist()
    from ..models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path, ModelPlan())
    return [tokenizer(prompt)["input_ids"] for prompt in chosen]


def _need_peft() -> None:
    try:
        import peft
        import torch
    except ImportError as error:
        raise MissingDependency(
            f"verify_adapter without {error.name}",
            "torch and peft, which load the adapter for the comparison",
            'pip install "hf-mlx[hf]"',
        ) from error
    del peft, torch


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        if (version := find_version(package)) is not None:
            yield package, version
