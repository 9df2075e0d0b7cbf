"""Constructor arguments of trainers as older scripts wrote them: ``tokenizer=``, formatting functions of batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from .talk import Talk

# Columns that trl of today trains on in place of a text.
_OTHER_ROWS = ("messages", "conversations", "prompt", "completion", "input_ids", "chosen", "rejected")
_BITS = ("quantization_config", "load_in_4bit", "load_in_8bit")


def translate_keywords(given: Mapping[str, Any], talk: Talk, *, trainer: str, older: bool) -> dict[str, Any]:
    """Today's keyword arguments of a trainer.

    Args:
        given: As the script wrote them.
        talk: Says what is done another way.
        trainer: Upstream's name of it.
        older: The trainer itself takes the keywords of older releases.
    """
    given = dict(given)
    if "model" in given:
        given["model"] = _unwrapped(given["model"], talk)
    if trainer == "SFTTrainer" and given.get("peft_config") is not None and hasattr(given.get("model"), "peft_config"):
        given["peft_config"] = None
        talk.once("peft_config beside a PeftModel: the model's own adapter is trained, as trl did before 0.20")
    _make_loadable(given, talk)
    if not older and "tokenizer" in given:
        given.setdefault("processing_class", given.pop("tokenizer"))
        talk.once("tokenizer= of Trainer left in transformers 5.0; it is now processing_class=")
    if given.get("dataset_text_field"):
        _keep_text(given, talk)
    function = given.get("formatting_func")
    if function is not None and _wants_batches(function, given.get("train_dataset")):
        talk.once("formatting_func returns lists: it is called with whole batches, as trl called it before 0.21")
        field = given.get("dataset_text_field") or getattr(given.get("args"), "dataset_text_field", None) or "text"
        for name in ("train_dataset", "eval_dataset"):
            given[name] = _formatted(given.get(name), function, field)
        given["formatting_func"] = None
    return given


def _keep_text(given: dict[str, Any], talk: Talk) -> None:
    """``dataset_text_field=`` of the trainer named what is trained, whatever else a row has."""
    field = given["dataset_text_field"]

    def keep(dataset: Any) -> Any:
        if isinstance(dataset, Mapping):
            return {name: keep(part) for name, part in dataset.items()}
        columns = getattr(dataset, "column_names", None) or []
        if field not in columns or not set(columns) & set(_OTHER_ROWS):
            return dataset
        talk.once(f"dataset_text_field={field!r}: that column alone is trained, as trl did before 0.15")
        return dataset.select_columns(field)

    for name in ("train_dataset", "eval_dataset"):
        if given.get(name) is not None and given.get("formatting_func") is None:
            given[name] = keep(given[name])


def _unwrapped(model: Any, talk: Talk) -> Any:
    """The model itself, where torch compiled it or was to spread it over devices."""
    inside = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
    name = type(model).__name__
    if name not in inside or not type(model).__module__.startswith("torch."):
        return model
    talk.once(f"{name}: the model inside is trained; the step is compiled by MLX, and runs on one device")
    return _unwrapped(getattr(model, inside[name]), talk)


def _make_loadable(given: dict[str, Any], talk: Talk) -> None:
    """``model_init_kwargs`` without what only CUDA has; what is quantised is read by the trainer."""
    from .loading import portable_kwargs

    def translate(kwargs: Any) -> Any:
        if not isinstance(kwargs, Mapping):
            return kwargs
        bits = {name: kwargs[name] for name in _BITS if kwargs.get(name) is not None}
        left, _, notes = portable_kwargs({name: value for name, value in kwargs.items() if name not in _BITS})
        for note in notes:
            talk.once(note)
        return left | bits

    if "model_init_kwargs" in given:
        given["model_init_kwargs"] = translate(given["model_init_kwargs"])
    args = given.get("args")
    if getattr(args, "model_init_kwargs", None):
        args.model_init_kwargs = translate(args.model_init_kwargs)  # type: ignore[union-attr]


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
