"""The first training rows of a run, as text with what is trained marked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from ..data.batch import IGNORE
from ..data.preview import read_row
from .run import Sample

_ROWS, _TOKENS = 3, 400
_ANSWERS = ("chosen_ids", "rejected_ids")


def read_samples(dataset: Any, tokenizer: Any) -> tuple[Sample, ...]:
    """The first rows of a prepared dataset.

    Args:
        dataset: Only a ``datasets.Dataset`` without a transform is looked into: reading another one may change it.
        tokenizer: Without one there are no samples.
    """
    from datasets import Dataset

    if tokenizer is None or not isinstance(dataset, Dataset) or dataset.format["type"] is not None:
        return ()
    return tuple(
        sample for number in range(min(_ROWS, len(dataset))) for sample in _read(number, dataset[number], tokenizer)
    )


def _read(number: int, row: Mapping[str, Any], tokenizer: Any) -> Iterator[Sample]:
    if row.get("input_ids"):
        ids = list(row["input_ids"])
        labels = list(row.get("labels") or ids)
        yield _cut(f"row {number}", {**row, "input_ids": ids, "labels": labels}, tokenizer)
    elif all(row.get(name) is not None for name in _ANSWERS):
        # A reward model scores whole rows.
        prompt, word = list(row.get("prompt_ids") or ()), "trained" if "prompt_ids" in row else "scored"
        for name in _ANSWERS:
            answer = list(row[name])
            whole = {"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer}
            yield _cut(f"row {number}, {name.split('_')[0]}", whole, tokenizer, word)


def _cut(title: str, row: Mapping[str, Any], tokenizer: Any, word: str = "trained") -> Sample:
    size = len(row["input_ids"])
    part = {name: list(row[name])[:_TOKENS] for name in ("input_ids", "labels")}
    tokens = read_row(part, tokenizer)
    stretches = [
        ("".join(token.text for token in run), trained) for trained, run in groupby(tokens, key=lambda one: one.trained)
    ]
    trained = sum(label != IGNORE for label in row["labels"])
    more = f", the first {_TOKENS} shown" if size > _TOKENS else ""
    return Sample(f"{title}: {size} tokens, {trained} {word}{more}", tuple(stretches))
