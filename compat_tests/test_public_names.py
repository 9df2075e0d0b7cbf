"""Public names, signatures and attribute writes of each trainer beside those of the trainer that it stands for."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import pairs
import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import HFMLXError


@dataclass(frozen=True)
class Pair:
    """A trainer and the one it stands for.

    Attributes:
        theirs, ours, config: The classes.
        rows: What both are constructed with.
    """

    theirs: type
    ours: type
    config: type
    rows: list[dict[str, Any]]


PAIRS = {"SFT": Pair(SFTTrainer, MLXSFTTrainer, SFTConfig, pairs.text_rows(6))}

# Signatures that differ on purpose, with the reason.
OTHER_SIGNATURES = {
    "create_model_card": "takes further front matter as well",
}
# What a script may set on a constructed trainer; everything else is refused by name.
WRITABLE = {
    "args": copy.copy,
    "compute_metrics": lambda before: len,
    "control": copy.copy,
    "data_collator": copy.copy,
    "eval_dataset": lambda before: None,
    "is_in_train": lambda before: before,
    "preprocess_logits_for_metrics": lambda before: max,
    "processing_class": copy.copy,
    "state": copy.copy,
    "train_dataset": lambda before: before.select(range(5)),
}


def public(thing: Any) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


@pytest.fixture(scope="module", params=PAIRS)
def built(request, tmp_path_factory):
    pair, folder = PAIRS[request.param], tmp_path_factory.mktemp(request.param)
    model = pairs.tiny_model("llama", folder / "base", hidden_size=32, intermediate_size=48)
    made = []
    for cls in (pair.theirs, pair.ours):
        with pairs._quiet():
            args = pair.config(output_dir=str(folder / cls.__name__), **pairs.SILENT)
            made.append(cls(str(model), args, train_dataset=Dataset.from_list(pair.rows)))
    return (pair, *made)


def test_every_public_name_is_here(built):
    pair, theirs, ours = built
    assert sorted(public(pair.theirs) - public(pair.ours)) == []
    assert sorted(public(theirs) - public(ours)) == []
    assert len(public(theirs)) >= 90


def test_signatures_are_theirs(built):
    pair, *_ = built
    differing, compared = set(), 0
    for name in sorted(public(pair.theirs)):
        if not callable(getattr(pair.theirs, name)):
            continue
        assert callable(getattr(pair.ours, name)), name
        shapes = [parameters(getattr(cls, name)) for cls in (pair.theirs, pair.ours)]
        compared += 1
        if shapes[0] != shapes[1]:
            differing.add(name)
    assert differing == OTHER_SIGNATURES.keys()
    assert compared >= 45


def parameters(method: Any) -> list[tuple[Any, ...]]:
    # What ``*`` and ``**`` collect is the same under any name.
    found = inspect.signature(method).parameters.values()
    return [(p.name if p.kind < p.VAR_POSITIONAL or p.kind is p.KEYWORD_ONLY else "", p.kind, p.default) for p in found]


def test_values_are_theirs(built):
    _, theirs, ours = built
    plain = (bool, int, float, str, list, type(None))
    compared = 0
    for name in sorted(public(theirs)):
        value = getattr(theirs, name)
        if isinstance(value, plain):
            assert getattr(ours, name) == value, name
            compared += 1
    assert compared >= 30


def test_every_attribute_is_written_or_refused(built):
    _, theirs, ours = built
    attributes = [name for name in sorted(public(theirs)) if not inspect.ismethod(getattr(theirs, name))]
    attributes = [name for name in attributes if not inspect.isfunction(getattr(theirs, name))]
    written = set()
    for name in attributes:
        before = getattr(ours, name)
        value = WRITABLE[name](before) if name in WRITABLE else object()
        try:
            setattr(ours, name, value)
        except HFMLXError as error:
            assert f"trainer.{name} = " in str(error)
            continue
        assert getattr(ours, name) is value or name == "train_dataset", name
        written.add(name)
        if name != "eval_dataset":
            setattr(ours, name, before)
    assert written == WRITABLE.keys()
    assert len(attributes) >= 35


REFUSED = {
    "compute_loss": (None, {}),
    "training_step": (),
    "prediction_step": (None, {}, True),
    "evaluation_loop": (None, "Evaluation"),
    "get_batch_samples": (None, 1, "cpu"),
    "hyperparameter_search": (),
    "call_model_init": (),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_methods_say_what_to_write(name, built):
    with pytest.raises(HFMLXError, match=rf"trainer\.{name}"):
        getattr(built[2], name)(*REFUSED[name])


def test_methods_answer_as_theirs(built):
    _, theirs, ours = built
    answers = []
    for trainer in (theirs, ours):
        with pytest.raises(ValueError, match="optimizer is None"):
            trainer.get_learning_rates()
        loader = [0] * 7
        optimizer, keywords = trainer.get_optimizer_cls_and_kwargs(trainer.args)
        answers.append(
            {
                "sizes": (trainer.get_cp_size(), trainer.get_sp_size(), trainer.get_tp_size()),
                "rows": trainer.get_total_train_batch_size(trainer.args),
                "parameters": trainer.get_num_trainable_parameters(),
                "examples": trainer.num_examples(loader),
                "values": trainer.set_initial_training_values(trainer.args, loader),
                "metrics": type(trainer).metrics_format({"train_runtime": 3.5, "total_flos": 3e9, "loss": 0.12345}),
                "decayed": sorted(trainer.get_decay_parameter_names(trainer.model)),
                "optimizer": (optimizer, keywords),
                "contexts": [c is not None for c in (trainer.compute_loss_context_manager(),)],
            }
        )
    assert answers[0] == answers[1]
