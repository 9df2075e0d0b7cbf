"""Rows of reward models: ours are trl's RewardTrainer's, one by one."""

from __future__ import annotations

import contextlib
import copy
import io
import random
import re
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from pair_rows import CASES, CHAT, REFUSED, TEXT, Case, answer, assert_same_rows, source
from row_tokenizers import CHATML, bpe
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from hf_mlx.data.preview import preview_scored
from hf_mlx.data.scored_pairs import ID_COLUMNS, collate_scored, convert_scored, last_tokens
from hf_mlx.data.scored_rows import prepare_scored
from hf_mlx.errors import DataError
from hf_mlx.settings.plan import DataPlan

WHOLE = [{"chosen": f"{row['prompt']}{row['chosen']}", "rejected": f"{row['prompt']}{row['rejected']}"} for row in TEXT]
TOKENS = [{"chosen_ids": [3, 4, 5], "rejected_ids": [6]}, {"chosen_ids": [7], "rejected_ids": list(range(3, 12))}]
ALL_CASES: dict[str, Case] = {
    **CASES,
    "text without a prompt": (WHOLE, {}, {}),
    "long rows are left out": (CHAT, {"template": CHATML}, {"max_length": 24}),
    "long tokens are left out": (TOKENS, {}, {"max_length": 5}),
    "tokens": (TOKENS, {}, {}),
    "tokens under their older names": (
        [{f"{name[:-4]}_input_ids": ids for name, ids in row.items()} for row in TOKENS],
        {},
        {},
    ),
}
ALL_REFUSED = {
    **REFUSED,
    "conversations after texts": ([TEXT[0], {"prompt": "a", "chosen": "b", "rejected": None}], "row 1 .*'rejected'"),
    "an empty conversation": (
        [{"chosen": answer("b"), "rejected": answer("c")}, {"chosen": answer("b"), "rejected": []}],
        "row 1 .*'rejected'",
    ),
}


def theirs(rows: Any, tokenizer: Any, settings: dict[str, Any]) -> Any:
    """What the constructor of trl's trainer makes of ``rows``."""
    args = SimpleNamespace(**{"dataset_num_proc": None, "max_length": 1024} | settings)
    return RewardTrainer._prepare_dataset(SimpleNamespace(), rows, tokenizer, args, "train")


def ours(rows: Any, tokenizer: Any, settings: dict[str, Any]) -> Any:
    return prepare_scored(rows, copy.deepcopy(tokenizer), DataPlan(**settings), name="train").dataset


@pytest.mark.parametrize("case", ALL_CASES)
@pytest.mark.parametrize("streamed", [False, True])
def test_rows_equal_trls(case, streamed):
    rows, options, settings = ALL_CASES[case]
    tokenizer = bpe(**options)
    older = "older" in case and not streamed
    with pytest.warns(FutureWarning, match="chosen_ids") if older else contextlib.nullcontext():
        got = list(ours(source(rows, streamed=streamed), tokenizer, settings))
    with warnings.catch_warnings(action="ignore"):
        want = list(theirs(source(rows, streamed=streamed), tokenizer, settings))
    assert_same_rows(want, got, ID_COLUMNS)
    assert (len(got) < len(rows)) == ("left out" in case)


def test_the_preview_shows_trls_rows_and_the_token_that_transformers_scores(tmp_path):
    shown, page = 0, tmp_path / "rows.html"
    for case in ("text", "text with bos", "conversation", "tokens", "other columns stay", "long rows are left out"):
        rows, options, settings = ALL_CASES[case]
        tokenizer = bpe(**options)
        want = list(theirs(Dataset.from_list(rows), tokenizer, settings))
        preview_scored(Dataset.from_list(rows), tokenizer, DataPlan(**settings), rows=99, html=page, file=io.StringIO())
        found = [
            [(mark, int(token)) for mark, token in re.findall(r'<span class="([tm])" title="id (\d+) at', part)]
            for part in page.read_text().split("<h2>")[1:]
        ]
        texts = [row[column] for row in want for column in ID_COLUMNS]
        assert [[token for _, token in row] for row in found] == texts, case
        for ids, row in zip(texts, found, strict=True):
            scored = max((at for at, token in enumerate(ids) if token != tokenizer.pad_token_id), default=0)
            assert [at for at, (mark, _) in enumerate(row) if mark == "t"] == [scored], case
            shown += 1
    assert shown >= 20


def test_random_texts():
    draw = random.Random(5)
    rows = [
        {
            key: "".join(draw.choices(["ab", " ", "</s>", "é", "x y"], k=draw.randint(0, 6)))
            for key in ("chosen", "rejected")
        }
        | {"prompt": "".join(draw.choices("ab ", k=draw.randint(0, 4)))}
        for _ in range(100)
    ]
    want, got = (list(f(Dataset.from_list(rows), bpe(), {"max_length": 9})) for f in (theirs, ours))
    assert 0 < len(want) < 100 and want == got


def test_batches_equal_trls():
    draw, compared = random.Random(6), 0
    for case in range(40):
        rows = [{column: draw.choices(range(9), k=draw.randint(1, 12)) for column in ID_COLUMNS} for _ in range(3)]
        if case % 2:
            rows = [{**row, "margin": draw.choice([0, 1, 0.25, -3.5])} for row in rows]
        pad, multiple = draw.choice([0, 2, 9]), draw.choice([None, 4])
        want = DataCollatorForPreference(pad, multiple)(copy.deepcopy(rows))
        for got in (
            collate_scored(rows, pad_token_id=pad, pad_to_multiple_of=multiple),
            convert_scored(want, pad) if pad == 9 else None,
        ):
            if got is None:
                continue
            np.testing.assert_array_equal(got.input_ids, want["input_ids"])
            np.testing.assert_array_equal(got.lengths, want["attention_mask"].sum(1))
            assert got.num_tokens == want["attention_mask"].sum() and got.examples == 3
            assert (got.margins is None) == ("margin" not in want)
            if got.margins is not None:
                np.testing.assert_array_equal(got.margins, want["margin"])
            compared += 1
    assert compared > 40


def test_the_position_that_is_scored_is_transformers():
    config = LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_labels=1, pad_token_id=2)  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    ids = np.random.default_rng(3).integers(0, 4, (60, 6))
    ids[0] = 2
    ids[1] = [2, 2, 2, 2, 2, 0]
    ids[2] = [0, 1, 2, 2, 2, 2]
    with torch.no_grad():
        every = model.score(model.model(torch.tensor(ids)).last_hidden_state)[:, :, 0]
        read = model(torch.tensor(ids)).logits[:, 0]
    found = every[torch.arange(60), torch.tensor(last_tokens(ids, 2), dtype=torch.long)]
    torch.testing.assert_close(found, read, rtol=0, atol=0)
    assert len(set(last_tokens(ids, 2).tolist())) == 6


@pytest.mark.parametrize("case", ALL_REFUSED)
def test_bad_rows_are_named(case):
    rows, words = ALL_REFUSED[case]
    with pytest.raises(DataError, match=words):
        ours(rows, bpe(template=CHATML), {})


def test_a_set_without_a_row_that_fits_is_refused():
    with pytest.raises(DataError, match=r"longer than max_length=2[\s\S]*RewardConfig\(max_length="):
        ours(CHAT, bpe(template=CHATML), {"max_length": 2})


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"chosen": [1]}, "returns \\['chosen'\\]"),
        ({"input_ids": np.ones((3, 2), int)}, "of \\(3, 2\\)"),
        ({"input_ids": np.ones((2, 2), int), "attention_mask": np.array([[0, 1], [1, 1]])}, "pads on the left"),
        ({"input_ids": np.ones((2, 2), int), "margin": [1, 2]}, "margin of 2 values for 1 pairs"),
        ({"input_ids": np.array([[1, 2], [3, 7]]), "attention_mask": np.array([[1, 1], [1, 0]])}, "another id than"),
        ({"input_ids": np.ones((2, 2), int), "score": [1]}, "the keys \\['score'\\]"),
    ],
)
def test_batches_that_are_none_are_named(batch, words):
    with pytest.raises(DataError, match=words):
        convert_scored(batch, 0)


@pytest.mark.parametrize("margin", [None, "1", True])
def test_a_margin_that_is_no_number_is_named(margin):
    rows = [{"chosen_ids": [1], "rejected_ids": [2], "margin": 0.5}, {"chosen_ids": [1], "rejected_ids": [2]}]
    with pytest.raises(DataError, match="margin"):
        collate_scored([rows[0], {**rows[1], "margin": margin}], pad_token_id=0)
