"""Preference rows: ours are trl's DPOTrainer's, one by one."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from pair_rows import CASES, CHAT, REFUSED, Case, assert_same_rows, source
from row_tokenizers import CHATML, bpe
from trl import DPOTrainer

from hf_mlx.data.preference import ID_COLUMNS, prepare_preference
from hf_mlx.errors import DataError
from hf_mlx.settings.plan import DataPlan

IMPLICIT = [
    {"chosen": "The sky is blue", "rejected": "The sky is green"},
    {"chosen": "abc", "rejected": "abd"},
    {"chosen": "ab ", "rejected": "cd"},
    {"chosen": "equal", "rejected": "equal"},
    {"chosen": "nested", "rejected": "nested and more"},
    {"chosen": "a  b", "rejected": "a  c"},
    {"chosen": "x", "rejected": "y"},
]
ALL_CASES: dict[str, Case] = {
    **CASES,
    "implicit prompt": (IMPLICIT, {}, {}),
    "implicit prompt with bos": (IMPLICIT, {"bos": True}, {}),
    "prompts that fill the row": (CHAT, {"template": CHATML}, {"max_length": 17}),
    "keep_end drops none": (CHAT, {"template": CHATML}, {"max_length": 17, "truncation_mode": "keep_end"}),
}
ALL_REFUSED = {
    **REFUSED,
    "images": ([{**CHAT[0], "images": ["x.png"]}], "'images'"),
    "an empty answer with its prompt inside": ([{"chosen": "", "rejected": "b"}], "row 0 .*'chosen'"),
}


def theirs(rows: Any, tokenizer: Any, settings: dict[str, Any]) -> Any:
    """What the constructor of trl's trainer makes of ``rows``."""
    args = SimpleNamespace(**{"dataset_num_proc": None, "max_length": 1024, "truncation_mode": "keep_start"} | settings)
    return DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, args, "train")


def ours(rows: Any, tokenizer: Any, settings: dict[str, Any]) -> Any:
    return prepare_preference(rows, copy.deepcopy(tokenizer), DataPlan(**settings), name="train").dataset


@pytest.mark.parametrize("case", ALL_CASES)
@pytest.mark.parametrize("streamed", [False, True])
def test_rows_equal_trls(case, streamed):
    rows, options, settings = ALL_CASES[case]
    tokenizer = bpe(**options)
    want, got = (list(made(source(rows, streamed=streamed), tokenizer, settings)) for made in (theirs, ours))
    assert_same_rows(want, got, ID_COLUMNS)
    dropped = len(rows) - len(got)
    assert (dropped > 0) == (case == "prompts that fill the row"), dropped


def test_random_implicit_prompts():
    draw = random.Random(7)
    rows = []
    for _ in range(200):
        front = "".join(draw.choices("ab ", k=draw.randint(0, 4)))
        rows.append({k: front + "".join(draw.choices("ab ", k=draw.randint(1, 3))) for k in ("chosen", "rejected")})
    want, got = (list(f(Dataset.from_list(rows), bpe(), {})) for f in (theirs, ours))
    assert len(want) == 200 and want == got


@pytest.mark.parametrize("case", ALL_REFUSED)
def test_bad_rows_are_named(case):
    rows, words = ALL_REFUSED[case]
    with pytest.raises(DataError, match=words):
        ours(rows, bpe(CHATML), {})


def test_a_set_without_a_row_that_fits_is_refused():
    with pytest.raises(DataError, match=r"every prompt alone fills max_length=2"):
        ours(CHAT, bpe(CHATML), {"max_length": 2})
