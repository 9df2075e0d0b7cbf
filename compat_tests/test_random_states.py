"""Random states around a run: what a script draws from Python, numpy and torch is what it draws beside transformers."""

import random

import mlx.core as mx
import numpy as np
import pytest
import torch
from lm_pairs import load
from pairs import SILENT, _quiet, assert_same_log, tiny_model, untimed
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

from hf_mlx import MLXTrainer
from hf_mlx.errors import SettingError

RELATIVE = 1e-4
LENGTH = 12
SEEDS = {
    "none": lambda: None,
    "torch": lambda: torch.manual_seed(123),
    "numpy": lambda: np.random.seed(5),
    "python": lambda: random.seed(5),
    "all": lambda: set_seed(77),
    "draws": lambda: (torch.rand(5), np.random.rand(3), random.random()),
}
DRAWS = {
    "python": lambda: random.randrange(1, LENGTH),
    "numpy": lambda: int(np.random.randint(1, LENGTH)),
    "torch": lambda: int(torch.randint(1, LENGTH, ())),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(autouse=True)
def uncompiled():
    # What is drawn is looked at, not what is computed.
    mx.disable_compile()
    yield
    mx.enable_compile()


def rows():
    pick = random.Random(0)
    made = [[pick.randrange(5, 200) for _ in range(LENGTH)] for _ in range(12)]
    return [{"input_ids": ids, "labels": list(ids)} for ids in made]


def collator(draw):
    """Leaves a drawn part of each batch unscored."""

    def collate(given):
        batch = default_data_collator(given)
        batch["labels"][:, : DRAWS[draw]()] = -100
        return batch

    return default_data_collator if draw is None else collate


def run(cls, folder, *, inside=None, between="none", draw=None, **settings):
    """The log of a run, and what each generator gives after it; ``inside`` seeds in model_init."""
    # What the process did before must not count, as it does not upstream.
    set_seed(4)
    with _quiet() as output:
        options = {"max_steps": 4, "per_device_train_batch_size": 3, "logging_steps": 1, "learning_rate": 1e-3}
        args = TrainingArguments(output_dir=output, **{**SILENT, **options, **settings})

        def model_init():
            SEEDS[inside]()
            return load(folder)

        given = {"model": load(folder)} if inside is None else {"model_init": model_init}
        trainer = cls(args=args, train_dataset=rows(), data_collator=collator(draw), **given)
        drawn = [DRAWS[name]() for name in DRAWS]
        SEEDS[between]()
        trainer.train()
        drawn += [DRAWS[name]() for name in DRAWS]
    return untimed(trainer.state.log_history), drawn


CASES = (
    [{"inside": seed} for seed in SEEDS]
    + [{"between": seed} for seed in SEEDS]
    + [{"draw": draw} for draw in DRAWS]
    + [{"inside": "all", "draw": draw, "between": "all"} for draw in DRAWS]
    + [{"between": "torch", "data_seed": 4}, {"inside": "torch", "data_seed": 4}]
    + [{"between": "torch", "train_sampling_strategy": "group_by_length"}]
)
SAMPLE = (1, 4, 7, 12, 14, 15, 20)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if at in SAMPLE else pytest.mark.wide) for at, case in enumerate(CASES)],
    ids=lambda case: "-".join(f"{key}={value}" for key, value in case.items()),
)
def test_seeds_and_draws_of_a_script(folder, case):
    """In model_init, between construction and train(), and in the collator; the order of the rows goes with torch's."""
    (theirs, drawn), (ours, also) = (run(cls, folder, **case) for cls in (Trainer, MLXTrainer))
    assert_same_log(theirs, ours, relative=RELATIVE)
    assert len(ours) == 5
    assert also == drawn and len(drawn) == 2 * len(DRAWS)


def test_a_seed_moves_the_rows(folder):
    plain, moved = (run(MLXTrainer, folder, between=seed)[0] for seed in ("none", "torch"))
    assert [entry.get("loss") for entry in plain] != [entry.get("loss") for entry in moved]


def test_model_init_gets_the_trial(folder):
    with _quiet() as output:
        args = TrainingArguments(output_dir=output, **SILENT)
        seen = []
        MLXTrainer(args=args, model_init=lambda trial: seen.append(trial) or load(folder), train_dataset=rows())
        assert seen == [None]
        with pytest.raises(SettingError, match="model_init should have 0 or 1 argument"):
            MLXTrainer(args=args, model_init=lambda a, b: load(folder), train_dataset=rows())
        with pytest.raises(SettingError, match="model_init should not return None"):
            MLXTrainer(args=args, model_init=lambda: None, train_dataset=rows())
