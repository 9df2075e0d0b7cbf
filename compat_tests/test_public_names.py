"""Public names, signatures and attribute writes of each trainer beside those of the trainer that it stands for."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import lm_pairs
import pairs
import preference_pairs
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from hf_mlx import MLXDPOTrainer, MLXRewardTrainer, MLXSFTTrainer, MLXTrainer
from hf_mlx.errors import HFMLXError


@dataclass(frozen=True)
class Pair:
    """A trainer and the one it stands for.

    Attributes:
        theirs, ours, config: The classes.
        rows: What both are constructed with.
        named: Whether the model is named, rather than handed over.
        least: How many public names of theirs there are at least.
    """

    theirs: type
    ours: type
    config: type
    rows: list[dict[str, Any]]
    named: bool
    least: int


PAIRS = {
    "SFT": Pair(SFTTrainer, MLXSFTTrainer, SFTConfig, pairs.text_rows(6), True, 90),
    "transformers": Pair(Trainer, MLXTrainer, TrainingArguments, lm_pairs.token_rows(6), False, 85),
    "DPO": Pair(DPOTrainer, MLXDPOTrainer, DPOConfig, preference_pairs.preference_rows("text", 6), True, 90),
    "Reward": Pair(
        RewardTrainer, MLXRewardTrainer, RewardConfig, preference_pairs.preference_rows("text", 6), True, 85
    ),
}

# Signatures that differ on purpose, with the reason.
OTHER_SIGNATURES = {"create_model_card": "trl's take further front matter as well"}
# What our constructors take beyond theirs.
OWN_KEYWORDS = {"max_grad_value", "finetune_last_n_layers", "strict", "loss"}
# What a script may set on a constructed trainer; everything else is refused by name.
WRITABLE = {
    "args": copy.copy,
    "compute_metrics": lambda before: len,
    "control": copy.copy,
    "data_collator": copy.copy,
    "eval_dataset": lambda before: None,
    "is_in_train": lambda before: before,
    "loss_is_scaled_for_ga": lambda before: True,
    "optimizer_cls_and_kwargs": lambda before: (type("SGD", (), {}), {}),
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
    # A config that is made later takes accelerate's state from under upstream's trainer.
    for cls in (pair.ours, pair.theirs):
        with pairs._quiet():
            args = pair.config(output_dir=str(folder / cls.__name__), **pairs.SILENT)
            held = str(model) if pair.named else lm_pairs.load(model)
            made.append(cls(model=held, args=args, train_dataset=Dataset.from_list(pair.rows)))
    return (pair, made[1], made[0])


def test_every_public_name_is_here(built):
    pair, theirs, ours = built
    assert sorted(public(pair.theirs) - public(pair.ours)) == []
    assert sorted(public(theirs) - public(ours)) == []
    assert len(public(theirs)) >= pair.least


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
    assert differing == (OTHER_SIGNATURES.keys() if pair.theirs is not Trainer else set())
    assert compared >= 45


def test_constructors_take_what_theirs_take_in_their_order(built):
    pair, *_ = built
    theirs, ours = (parameters(cls.__init__) for cls in (pair.theirs, pair.ours))
    assert ours[: len(theirs)] == theirs
    assert {name for name, *_ in ours[len(theirs) :]} <= OWN_KEYWORDS | {""}
    assert len(theirs) >= 13


def parameters(method: Any) -> list[tuple[Any, ...]]:
    # What ``*`` and ``**`` collect is the same under any name.
    found = inspect.signature(method).parameters.values()
    return [(p.name if p.kind < p.VAR_POSITIONAL or p.kind is p.KEYWORD_ONLY else "", p.kind, p.default) for p in found]


def test_values_are_theirs(built):
    pair, theirs, ours = built
    plain = (bool, int, float, str, list, type(None))
    compared = 0
    for name in sorted(public(theirs)):
        value = getattr(theirs, name)
        if isinstance(value, plain):
            assert getattr(ours, name) == value, name
            compared += 1
    assert compared >= (28 if pair.theirs is RewardTrainer else 29)


def test_every_attribute_is_written_or_refused(built):
    pair, theirs, ours = built
    methods = {name for name in public(pair.theirs) if inspect.isfunction(getattr(pair.theirs, name))}
    attributes = sorted(public(theirs) - methods)
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
    assert written == WRITABLE.keys() - (
        {"loss_is_scaled_for_ga"} if pair.theirs in (DPOTrainer, RewardTrainer) else set()
    )
    assert len(attributes) >= 35


REFUSED = {
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


def test_accelerator_answers_as_theirs(built):
    _, theirs, ours = built
    answers = []
    for trainer in (theirs, ours):
        accelerator = trainer.accelerator
        accelerator.log({"x": 1.0}, step=1)
        accelerator.wait_for_everyone()
        with accelerator.main_process_first(), accelerator.accumulate(trainer.model), accelerator.autocast():
            answers.append(
                {
                    "names": (
                        accelerator.is_main_process,
                        accelerator.is_local_main_process,
                        accelerator.num_processes,
                    ),
                    "state": (accelerator.state.num_processes, accelerator.state.process_index),
                    "gathered": accelerator.gather(torch.ones(2)).tolist(),
                    "reduced": accelerator.reduce(torch.ones(2)).tolist(),
                    "weights": sorted(accelerator.get_state_dict(trainer.model)),
                    "unwrapped": accelerator.unwrap_model(trainer.model) is trainer.model,
                    "tracker": type(accelerator.get_tracker("wandb")).__name__,
                    "decorated": accelerator.on_main_process(len)([1, 2]),
                    "has": hasattr(accelerator, "no_such_name"),
                }
            )
    tied = {"lm_head.weight"}
    assert set(answers[0].pop("weights")) - tied == set(answers[1].pop("weights")) - tied
    assert answers[0] == answers[1]
    with pytest.raises(HFMLXError, match=r"trainer\.accelerator\.backward"):
        ours.accelerator.backward(None)


def test_a_name_or_a_parameter_that_theirs_gains_is_noticed(built):
    pair, *_ = built

    class Gains(pair.theirs):
        def brand_new(self) -> None: ...

        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", newer=None) -> None: ...

    assert sorted(public(Gains) - public(pair.ours)) == ["brand_new"]
    assert parameters(Gains.evaluate) != parameters(pair.ours.evaluate)


@pytest.mark.parametrize("name", ["transformers", "DPO"])
def test_older_constructor_keywords_mean_what_they_meant(name, tmp_path):
    pair = PAIRS[name]
    model = pairs.tiny_model("llama", tmp_path / "base", hidden_size=32, intermediate_size=48)
    older = {"tokenizer": pairs.tokenizer()}
    if name == "DPO":
        older |= {
            "beta": 0.3,
            "loss_type": ["ipo"],
            "max_length": 16,
            "padding_value": None,
            "is_encoder_decoder": False,
        }
    args = pair.config(output_dir=str(tmp_path / "out"), **pairs.SILENT)
    held = str(model) if pair.named else lm_pairs.load(model)
    with pytest.warns(DeprecationWarning, match="tokenizer= of .*processing_class="):
        trainer = pair.ours(model=held, args=args, train_dataset=Dataset.from_list(pair.rows), **older)
    assert trainer.processing_class is older["tokenizer"]
    if name == "DPO":
        assert (trainer.beta, trainer.loss_types, trainer.plan.data.max_length) == (0.3, ["ipo"], 16)
    else:
        assert trainer.data_collator.tokenizer is older["tokenizer"]
    with pytest.raises(HFMLXError, match="packing"):
        pair.ours(model=held, args=args, train_dataset=Dataset.from_list(pair.rows), packing=True)
