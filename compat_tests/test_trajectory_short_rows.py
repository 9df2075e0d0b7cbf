"""Rows of one token or of none, a formatter beside tokens, keywords without effect: TRL goes on, and so does this."""

import pytest
from datasets import Dataset, Features, List, Value
from pairs import assert_same_curve, run_both, run_mlx, tiny_model
from sampling import sampled
from trl import SFTConfig

from hf_mlx import explain
from hf_mlx.errors import DataError

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("uncompiled")]

# As in test_trajectory_families: the promise of the library in fp32.
RELATIVE, WEIGHTS = 1e-4, 1e-3
SETTINGS = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "num_train_epochs": 2,
    "logging_steps": 1,
    "max_length": 24,
    "train_sampling_strategy": "sequential",
}
WHOLE = {"max_length": None}
FREE = {"max_length": None, "padding_free": True}
PACKED, SPLIT = {"packing": True}, {"packing": True, "packing_strategy": "bfd_split"}
WRAPPED = {"packing": True, "packing_strategy": "wrapped"}
EMPTY = [[5, 6, 7], [], [8, 9, 10], [11, 12], [13, 14], []]
SHORT = [[5, 6, 7], [4], [8], [9], [10, 11]]
ONES = [[5], [4], [8], [9]]
ALONE = {"per_device_train_batch_size": 1}


def text(*rows):
    return [{"text": row} for row in rows]


def pairs(*rows):
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows]


def ids(rows):
    return Dataset.from_dict({"input_ids": rows}, features=Features({"input_ids": List(Value("int64"))}))


CASES = {
    **{f"empty rows, {name}": (ids(EMPTY), s) for name, s in {"cut": {}, "whole": WHOLE}.items()},
    **{f"empty rows, {name}": (ids(EMPTY), s) for name, s in {"packed": PACKED, "wrapped": WRAPPED}.items()},
    "empty rows, split": (ids(EMPTY), SPLIT),
    "empty rows, one a batch": (ids(EMPTY), ALONE),
    **{f"short rows, {name}": (ids(SHORT), s) for name, s in {"cut": {}, "whole": WHOLE, "free": FREE}.items()},
    **{f"short rows, {name}": (ids(SHORT), s) for name, s in {"packed": PACKED, "wrapped": WRAPPED}.items()},
    "short rows, split": (ids(SHORT), SPLIT),
    "short rows, one a batch": (ids(SHORT), ALONE),
    "short rows, free, one a batch": (ids(ONES), {**FREE, **ALONE}),
    "short rows, accumulated": (ids(SHORT), {"gradient_accumulation_steps": 2}),
    "short rows, smoothed": (ids(SHORT), {"label_smoothing_factor": 0.1}),
    "only short rows": (ids(ONES), {}),
    "empty texts": (text("", "a b c", "", ""), {}),
    "empty texts, packed": (text("", "a b c", "", ""), PACKED),
    "empty completions": (pairs(("a", ""), ("", "b c"), ("", ""), ("a", "b")), {}),
    "keywords without effect": (
        text("a b", "c d e"),
        {"dataset_kwargs": {"add_special_tokens": False, "append_concat_token": True}},
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("base"), hidden_size=32, intermediate_size=48)


FEW = (
    "empty rows, cut", "empty rows, wrapped", "empty rows, split", "short rows, free", "short rows, packed",
    "short rows, accumulated", "short rows, smoothed", "only short rows", "empty texts", "empty completions",
    "keywords without effect",
)  # fmt: skip


@pytest.mark.parametrize("name", sampled(CASES, *FEW))
def test_the_run_is_trl_s(name, model):
    rows, settings = CASES[name]
    theirs, ours = run_both(model, {**SETTINGS, **settings}, rows, None)
    assert assert_same_curve(theirs, ours, relative=RELATIVE, weights=WEIGHTS) >= 10


def test_a_stream_of_them(model):
    settings = {**SETTINGS, "max_steps": 3, "num_train_epochs": 1}
    for rows in (EMPTY, SHORT):
        theirs, ours = run_both(model, settings, ids(rows).to_iterable_dataset(), None)
        assert assert_same_curve(theirs, ours, relative=RELATIVE, weights=WEIGHTS) >= 10


def test_a_formatter_beside_tokens_is_not_called(model):
    rows = ids([[5, 6, 7], [8, 9, 10], [11, 12], [13, 14]])
    theirs, ours = run_both(model, SETTINGS, rows, None, formatting_func=lambda row: 1 / 0)
    assert assert_same_curve(theirs, ours, relative=RELATIVE, weights=WEIGHTS) >= 10


@pytest.mark.parametrize("settings", [{**WHOLE, **ALONE}, FREE])
def test_a_batch_without_a_token_is_refused_before_training(settings, model):
    with pytest.raises(DataError, match=r"row 1 of the train dataset.*no token"):
        run_mlx(model, {**SETTINGS, **settings}, ids(EMPTY), None)


def test_keywords_without_effect_are_in_the_ledger(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, dataset_kwargs={"add_special_tokens": False})
    entry = explain(args)["dataset_kwargs"]
    assert "add_special_tokens" in entry.reason and "without effect" in entry.reason
