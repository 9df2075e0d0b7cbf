"""Rows of pairs that preference and reward training read, and how they are compared with TRL's."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from row_tokenizers import ALTERNATING, CHATML, STYLED, trl_template

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
IMPLICIT_CHAT = [
    {"chosen": user(f"q {i}") + answer(f"yes {i}"), "rejected": user(f"q {i}") + answer("no")} for i in range(3)
]
MANY_TURNS = [{"chosen": c["prompt"] + answer("hm") + user("and?") + c["chosen"],
               "rejected": c["prompt"] + answer("hm") + user("and?") + c["rejected"]} for c in CHAT]  # fmt: skip
#: Rows, options of the tokenizer, settings.
Case = tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "text": (TEXT, {}, {}),
    "text with bos": (TEXT, {"bos": True}, {}),
    "conversation": (CHAT, {"template": CHATML}, {}),
    "conversation, another template": (CHAT, {"template": ALTERNATING}, {}),
    "template that drops its thoughts": (CHAT, {"template": trl_template("qwen3")}, {}),
    "conversation without a prompt": (IMPLICIT_CHAT, {"template": CHATML}, {}),
    "conversation of several turns without a prompt": (MANY_TURNS, {"template": CHATML}, {}),
    "tools": ([{**row, "tools": [TOOL]} for row in CHAT], {"template": STYLED}, {}),
    "tools as JSON": ([{**row, "tools": json.dumps([TOOL])} for row in CHAT], {"template": STYLED}, {}),
    "template variables": (
        [{**row, "chat_template_kwargs": {"style": f"terse {i}"}} for i, row in enumerate(CHAT)],
        {"template": STYLED},
        {},
    ),
    "other columns stay": ([{**row, "margin": i / 2, "source": "web"} for i, row in enumerate(TEXT)], {}, {}),
    "no limit": (TEXT, {}, {"max_length": None}),
}
#: Rows that neither reads, and what the message says.
REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "an image": ([{**TEXT[0], "image": "x.png"}], "'image'"),
    "no rejected": ([{"prompt": "a", "chosen": "b"}], "'rejected'"),
    "None in a row": ([TEXT[0], {"prompt": "a", "chosen": None, "rejected": "b"}], "row 1 .*'chosen'"),
    "a text among conversations": ([{"prompt": user("a"), "chosen": "b", "rejected": "c"}], "row 0 .*'chosen'"),
}


def source(rows: list[dict[str, Any]], *, streamed: bool) -> Any:
    """A dataset of them, made afresh."""
    return IterableDataset.from_generator(lambda: iter(copy.deepcopy(rows))) if streamed else Dataset.from_list(rows)


def assert_same_rows(want: Sequence[dict[str, Any]], got: Sequence[dict[str, Any]], ids: Sequence[str]) -> None:
    """One by one, with columns of ids that are lists."""
    assert len(want) == len(got) > 0
    for a, b in zip(want, got, strict=True):
        assert a == b
        assert all(isinstance(b[column], list) for column in ids)
