"""Constructor arguments of trainers as older scripts wrote them: ``tokenizer=``, formatting functions of batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from .talk import Talk


def translate_keywords(given: Mapping[str, Any], talk: Talk, *, older: bool) -> dict[str, Any]:
    """Today's keyword arguments of a trainer.

    Args:
        given: As the script wrote them.
        talk: Says what is done another way.
        older: The trainer itself takes the keywords of older releases.
    """
    given = dict(given)
    if not older and "tokenizer" in given:
        given.setdefault("processing_class", given.pop("tokenizer"))
        talk.once("tokenizer= of Trainer left in transformers 5.0; it is now processing_class=")
    function = given.get("formatting_func")
    if function is not None and _wants_batches(function, given.get("train_dataset")):
        talk.once("formatting_func returns lists: it is called with whole batches, as trl called it before 0.21")
        field = given.get("dataset_text_field") or getattr(given.get("args"), "dataset_text_field", None) or "text"
        for name in ("train_dataset", "eval_dataset"):
            given[name] = _formatted(given.get(name), function, field)
        given["formatting_func"] = None
    return given


def _wants_batches(function: Callable, dataset: Any) -> bool:
    """Whether a function makes a list of texts from lists of columns, and no text of one row."""
    if not hasattr(dataset, "map"):
        return False
    rows = list(islice(iter(dataset), 2))
    if not rows or not isinstance(rows[0], Mapping):
        return False
    try:
        if not isinstance(function(dict(rows[0])), list):
            return False
    except Exception:
        # Columns of one row are not lists; whatever that leads to says nothing yet.
        pass
    try:
        texts = function({name: [row[name] for row in rows] for name in rows[0]})
    except Exception:
        return False
    return isinstance(texts, list) and all(isinstance(text, str) for text in texts)


def _formatted(dataset: Any, function: Callable, field: str) -> Any:
    if isinstance(dataset, Mapping):
        return {name: _formatted(part, function, field) for name, part in dataset.items()}
    if dataset is None:
        return None
    columns = dataset.column_names or list(next(iter(dataset)))
    return dataset.map(lambda batch: {field: function(batch)}, batched=True, remove_columns=columns)
