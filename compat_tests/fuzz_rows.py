"""Datasets drawn for test_fuzz.py: a kind of rows, one thing odd about them, a container, and data settings."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from pairs import rows_of

Rows = list[dict[str, Any]]
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}


def _ids(count: int, pick: random.Random) -> Rows:
    return [{"input_ids": [pick.randrange(5, 300) for _ in range(pick.randint(2, 12))]} for _ in range(count)]


def _with(rows: Rows, name: str, value: Callable[[int, int], int]) -> Rows:
    for row in rows:
        row[name] = [value(place, number) for place, number in enumerate(row["input_ids"])]
    return rows


def _talks(count: int, **columns: Any) -> Rows:
    return [{**row, **columns} for row in rows_of("messages", count)]


def _split(count: int) -> Rows:
    return [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows_of("messages", count)]


def _turns(count: int) -> Rows:
    names = {"user": "human", "assistant": "gpt"}
    rows = rows_of("messages", count)
    return [{"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in r["messages"]]} for r in rows]


KINDS: dict[str, Callable[[int, random.Random], Rows]] = {
    "text": lambda count, pick: rows_of("text", count),
    "prompt and completion": lambda count, pick: rows_of("prompt", count),
    "messages": lambda count, pick: rows_of("messages", count),
    "messages split": lambda count, pick: _split(count),
    "from and value": lambda count, pick: _turns(count),
    "tools": lambda count, pick: _talks(count, tools=[TOOL]),
    "tools as JSON": lambda count, pick: _talks(count, tools='[{"type": "function", "function": {"name": "add"}}]'),
    "template options": lambda count, pick: _talks(count, chat_template_kwargs={"enable_thinking": False}),
    "tokens": _ids,
    "labels": lambda count, pick: _with(_ids(count, pick), "labels", lambda i, n: n if i % 3 else -100),
    "completion_mask": lambda count, pick: _with(_ids(count, pick), "completion_mask", lambda i, n: int(i > 1)),
    "assistant_masks": lambda count, pick: _with(_ids(count, pick), "assistant_masks", lambda i, n: i % 2),
    "attention_mask": lambda count, pick: _with(_ids(count, pick), "attention_mask", lambda i, n: 1),
    "prompt alone": lambda count, pick: [{"prompt": row["text"]} for row in rows_of("text", count)],
    "preferences": lambda count, pick: [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in rows_of("prompt", count)
    ],
    "another name": lambda count, pick: [{"body": row["text"]} for row in rows_of("text", count)],
}

# One oddity: changes a value of the first column of one row, or of all rows.
VALUES: dict[str, list[Any]] = {
    "empty": ["", []],
    "one token": ["a", [7]],
    "unicode": ["😀 שלום\u200f é\u0301 \ud7ff", "\x00\x01\ufeff", " \n\t ", "<|im_end|></s><pad>"],
    "None": [None],
    "a number": [5, 2.5],
    "a bool": [True],
    "bytes": [b"abc"],
    "a list of text": [["a", "b"]],
    "a dict": [{"a": 1}],
    "long": ["word " * 300, list(range(5, 300)) * 2],
    "ids outside": [[5, 10**6], [5, -3], [2**40, 5]],
    "floats": [[5.0, 6.0, 7.0], [5.5, 6.5]],
    "nested": [[[5, 6], [7]]],
    "no messages": [[]],
    "odd messages": [
        [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}],
        [{"role": None, "content": "x"}],
        [{"role": "martian", "content": "x"}],
        [{"role": "assistant", "content": "x"}],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        [{"role": "user", "content": 5}],
        ["x"],
        {"role": "user", "content": "x"},
    ],
}


def _set(rows: Rows, pick: random.Random) -> str:
    name = pick.choice(list(VALUES))
    value, column = pick.choice(VALUES[name]), pick.choice(list(rows[0]))
    hit = pick.choice([rows, rows[:1], rows[-1:]])
    for row in hit:
        row[column] = copy.deepcopy(value)
    return f"{column}={str(value)[:40]!r} in {len(hit)} of {len(rows)}"


def _drop(rows: Rows, pick: random.Random) -> str:
    column = pick.choice(list(rows[0]))
    hit = pick.choice([rows, rows[:1]])
    for row in hit:
        del row[column]
        row["other"] = 1
    return f"without {column} in {len(hit)} of {len(rows)}"


def _rename(rows: Rows, pick: random.Random) -> str:
    column = pick.choice(list(rows[0]))
    name = pick.choice(["Text", "content", "message", "labels", "label", "input_ids", "messages", "text"])
    for row in rows:
        row[name] = row.pop(column)
    return f"{column} renamed to {name}"


def _extra(rows: Rows, pick: random.Random) -> str:
    name = pick.choice(["length", "id", "meta", "labels", "text", "position_ids", "seq_lengths", "image", "tools"])
    value = pick.choice([3, None, "x", {"a": [1]}, [1, 2], []])
    for row in rows:
        row[name] = value
    return f"with {name}={value!r}"


def _cut(rows: Rows, pick: random.Random) -> str:
    count = pick.choice([0, 1, 1, 2, 3])
    del rows[count:]
    return f"{count} rows"


def _shorter(rows: Rows, pick: random.Random) -> str:
    column = list(rows[0])[-1]
    if isinstance(rows[0][column], list):
        rows[0][column] = rows[0][column][:-1]
    return f"{column} one shorter"


def _nothing(rows: Rows, pick: random.Random) -> str:
    return "as they are"


ODDITIES = [*[_nothing] * 4, *[_set] * 3, *[_extra] * 2, _drop, _rename, _cut, _shorter]


class Mapped:
    """A map-style dataset of somebody's own."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def _stream(rows: Rows) -> IterableDataset:
    return Dataset.from_list(rows).to_iterable_dataset()


CONTAINERS: dict[str, Callable[[Rows], Any]] = {
    "Dataset": Dataset.from_list,
    "shards": lambda rows: Dataset.from_list(rows).to_iterable_dataset(num_shards=min(2, len(rows)) or 1),
    "stream": _stream,
    "generated stream": lambda rows: IterableDataset.from_generator(lambda: iter(rows)),
    "shuffled stream": lambda rows: _stream(rows).shuffle(seed=1, buffer_size=4),
    "torch format": lambda rows: Dataset.from_list(rows).with_format("torch"),
    "numpy format": lambda rows: Dataset.from_list(rows).with_format("numpy"),
    "selected": lambda rows: Dataset.from_list(rows).select(range(len(rows) - 1, -1, -1)),
    "DatasetDict": lambda rows: DatasetDict({"train": Dataset.from_list(rows)}),
    "stream dict": lambda rows: IterableDatasetDict({"train": _stream(rows)}),
    "list": lambda rows: rows,
    "tuple": lambda rows: tuple(rows),
    "iterator": lambda rows: iter(rows),
    "map-style": Mapped,
    "columns": lambda rows: Dataset.from_list(rows).to_dict(),
    "DataFrame": lambda rows: Dataset.from_list(rows).to_pandas(),
    "None": lambda rows: None,
    "name": lambda rows: "nowhere/nothing",
}
_WEIGHTS = [30, 3, 10, 5, 3, 3, 3, 3, *[1] * 10]

OPTIONS: list[dict[str, Any]] = [
    *[{}] * 6,
    {"packing": True, "max_length": 24},
    {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    {"padding_free": True, "max_length": None},
    {"max_length": 5},
    {"max_length": 6, "truncation_mode": "keep_end"},
    {"completion_only_loss": True},
    {"completion_only_loss": False},
    {"assistant_only_loss": True},
    {"dataset_text_field": "body"},
    {"dataset_kwargs": {"skip_prepare_dataset": True}},
    {"remove_unused_columns": False},
    {"train_sampling_strategy": "group_by_length"},
    {"dataloader_drop_last": True},
    {"shuffle_dataset": True},
    {"eval_strategy": "steps", "eval_steps": 1},
    {"label_names": ["labels"]},
]


def say(row: dict[str, Any]) -> str:
    """A formatting function."""
    return f"Q: {row['prompt']} A: {row['completion']}"


@dataclass
class Drawn:
    """A dataset and what goes with it.

    Attributes:
        make: Makes the dataset anew for each run.
        settings: Fields of SFTConfig.
        keywords: Of the trainer.
    """

    what: str
    make: Callable[[], Any]
    settings: dict[str, Any]
    keywords: dict[str, Any] = field(default_factory=dict)


def draw_rows(seed: str) -> Drawn:
    """One dataset; those that ``datasets`` itself cannot hold are drawn again."""
    pick = random.Random(seed)
    while True:
        kind = pick.choice(list(KINDS))
        rows = KINDS[kind](pick.choice([5, 6, 9]), pick)
        change = pick.choice(ODDITIES)
        oddity = change(rows, pick)
        (container,) = pick.choices(list(CONTAINERS), _WEIGHTS)
        settings = dict(pick.choice(OPTIONS))
        keywords: dict[str, Any] = {}
        if settings.get("eval_strategy") or pick.random() < 0.1:
            held = rows_of(pick.choice(["text", "prompt", "messages"]), 3)
            keywords["eval_dataset"] = pick.choice([Dataset.from_list(held), {"a": Dataset.from_list(held)}, None])
        if kind == "prompt and completion" and pick.random() < 0.3:
            keywords["formatting_func"] = say

        def make(rows: Rows = rows, container: str = container) -> Any:
            return CONTAINERS[container](copy.deepcopy(rows))

        try:
            make()
        except Exception:  # what Arrow cannot hold never reaches a trainer
            continue
        return Drawn(f"{kind}, {oddity}, {container}", make, settings, keywords)
