"""Preference rows: ours are trl's DPOTrainer's, one by one."""

from __future__ import annotations

import copy
import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from row_tokenizers import ALTERNATING, CHATML, STYLED, bpe, trl_template
from trl import DPOTrainer

from hf_mlx.data.preference import ID_COLUMNS, prepare_preference
from hf_mlx.errors import DataError
from hf_mlx.settings.plan import DataPlan

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def user(text: str) -> list[dict[str, str]]:
    return [turn("user", text)]


def answer(text: str) -> list[dict[str, str]]:
    return [turn("assistant", text)]


CHAT = [
    {"prompt": user("how" + " so" * i), "chosen": answer(f"{i} of them"), "rejected": answer("none " * (i % 3 + 1))}
    for i in range(5)
]
TEXT = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    {"prompt": "One and ", "chosen": "one</s>", "rejected": "two"},
    {"prompt": "wor", "chosen": "ld peace", "rejected": "d play"},
    {"prompt": "", "chosen": "a", "rejected": ""},
    {"prompt": "same", "chosen": " x", "rejected": " x"},
]
IMPLICIT = [
    {"chosen": "The sky is blue", "rejected": "The sky is green"},
    {"chosen": "abc", "rejected": "abd"},
    {"chosen": "ab ", "rejected": "cd"},
    {"chosen": "equal", "rejected": "equal"},
    {"chosen": "nested", "rejected": "nested and more"},
    {"chosen": "a  b", "rejected": "a  c"},
    {"chosen": "x", "rejected": "y"},
]
IMPLICIT_CHAT = [
    {"chosen": user(f"q {i}") + answer(f"yes {i}"), "rejected": user(f"q {i}") + answer("no")} for i in range(3)
]
MANY_TURNS = [{"chosen": c["prompt"] + answer("hm") + user("and?") + c["chosen"],
               "rejected": c["prompt"] + answer("hm") + user("and?") + c["rejected"]} for c in CHAT]  # fmt: skip
CASES: dict[str, tuple[list[dict[str, Any]], Any, dict[str, Any]]] = {
    "text": (TEXT, {}, {}),
    "text with bos": (TEXT, {"bos": True}, {}),
    "conversation": (CHAT, {"template": CHATML}, {}),
    "conversation, another template": (CHAT, {"template": ALTERNATING}, {}),
    "template that drops its thoughts": (CHAT, {"template": trl_template("qwen3")}, {}),
    "implicit prompt": (IMPLICIT, {}, {}),
    "implicit prompt with bos": (IMPLICIT, {"bos": True}, {}),
    "implicit prompt of a conversation": (IMPLICIT_CHAT, {"template": CHATML}, {}),
    "implicit prompt of several turns": (MANY_TURNS, {"template": CHATML}, {}),
    "tools": ([{**row, "tools": [TOOL]} for row in CHAT], {"template": STYLED}, {}),
    "tools as JSON": ([{**row, "tools": json.dumps([TOOL])} for row in CHAT], {"template": STYLED}, {}),
    "template variables": (
        [{**row, "chat_template_kwargs": {"style": f"terse {i}"}} for i, row in enumerate(CHAT)],
        {"template": STYLED},
        {},
    ),
    "other columns stay": ([{**row, "score": i, "source": "web"} for i, row in enumerate(TEXT)], {}, {}),
    "prompts that fill the row": (CHAT, {"template": CHATML}, {"max_length": 17}),
    "keep_end drops none": (CHAT, {"template": CHATML}, {"max_length": 17, "truncation_mode": "keep_end"}),
    "no limit": (TEXT, {}, {"max_length": None}),
}


def theirs(rows: Any, tokenizer: Any, settings: dict[str, Any]) -> Any:
    """What the constructor of trl's trainer makes of ``rows``."""
    args = SimpleNamespace(**{"dataset_num_proc": None, "max_length": 1024, "truncation_mode": "keep_start"} | settings)
    return DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, args, "train")


def ours(rows: Any, tokenizer: Any, settings: dict[str, Any]) -> Any:
    return prepare_preference(rows, copy.deepcopy(tokenizer), DataPlan(**settings), name="train").dataset


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("streamed", [False, True])
def test_rows_equal_trls(case, streamed):
    rows, options, settings = CASES[case]
    tokenizer = bpe(**options)

    def source() -> Any:
        return (
            IterableDataset.from_generator(lambda: iter(copy.deepcopy(rows))) if streamed else Dataset.from_list(rows)
        )

    want, got = list(theirs(source(), tokenizer, settings)), list(ours(source(), tokenizer, settings))
    assert len(want) == len(got) > 0
    for a, b in zip(want, got, strict=True):
        assert a == b
        assert all(isinstance(b[column], list) for column in ID_COLUMNS)
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


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "an image": ([{**TEXT[0], "image": "x.png"}], "'image'"),
    "images": ([{**CHAT[0], "images": ["x.png"]}], "'images'"),
    "no rejected": ([{"prompt": "a", "chosen": "b"}], "'rejected'"),
    "None in a row": ([TEXT[0], {"prompt": "a", "chosen": None, "rejected": "b"}], "row 1 .*'chosen'"),
    "an empty answer with its prompt inside": ([{"chosen": "", "rejected": "b"}], "row 0 .*'chosen'"),
    "a text among conversations": (
        [{"prompt": user("a"), "chosen": "b", "rejected": "c"}],
        "row 0 .*'chosen'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_rows_are_named(case):
    rows, words = REFUSED[case]
    with pytest.raises(DataError, match=words):
        ours(rows, bpe(CHATML), {})


def test_a_set_without_a_row_that_fits_is_refused():
    with pytest.raises(DataError, match=r"every prompt alone fills max_length=2"):
        ours(CHAT, bpe(CHATML), {"max_length": 2})
