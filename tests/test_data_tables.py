"""Ids, labels and positions beyond a model's tables, on the host: rows of a set and micro-batches."""

from typing import Any

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from hf_mlx.data.collate import collate
from hf_mlx.data.guard import Guard
from hf_mlx.data.tables import Check, Tables, check_batch, check_columns
from hf_mlx.errors import DataError
from hf_mlx.settings.plan import DataPlan

IDS = 64
CHECK = Check(Tables(IDS, 12), None)
ROWS = st.lists(st.lists(st.integers(-3, IDS + 2), min_size=1, max_size=14), min_size=1, max_size=5)


def outside(row):
    return any(not 0 <= value < IDS for value in row) or len(row) > 12


@given(rows=ROWS)
def test_every_id_and_position_of_a_set_and_of_a_batch(rows):
    bad = [number for number, row in enumerate(rows) if outside(row)]
    dataset = Dataset.from_dict({"input_ids": rows})
    batch = collate([{"input_ids": row} for row in rows], pad_token_id=0)
    if not bad:
        check_columns(dataset, CHECK, "train")
        check_batch(batch, CHECK, "a batch")
        return
    with pytest.raises(DataError, match=rf"row {bad[0]} of the train dataset, column 'input_ids'"):
        check_columns(dataset, CHECK, "train")
    with pytest.raises(DataError, match=r"row \d of a batch"):
        check_batch(batch, CHECK, "a batch")


@given(labels=st.lists(st.integers(-110, IDS + 2), min_size=1, max_size=12))
def test_labels_have_an_upper_end_alone(labels):
    row = {"input_ids": [1] * len(labels), "labels": labels}
    dataset, batch = Dataset.from_list([row]), collate([row], pad_token_id=0)
    if max(labels) < IDS:
        check_columns(dataset, CHECK, "train")
        check_batch(batch, CHECK, "a batch")
        return
    for check in (lambda: check_columns(dataset, CHECK, "t"), lambda: check_batch(batch, CHECK, "a batch")):
        with pytest.raises(DataError, match="column 'labels': the value"):
            check()


def test_rows_that_a_selection_left_out_do_not_count():
    dataset = Dataset.from_dict({"input_ids": [[1, 2], [IDS, 1], [3]]})
    check_columns(dataset.select([0, 2]), CHECK, "train")
    with pytest.raises(DataError, match="row 1 of the train"):
        check_columns(dataset.select([2, 1]), CHECK, "train")


def test_positions_that_nobody_sees_are_filled_with_an_id_of_the_table():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    pad: Any = tokenizer.pad_token_id
    for ids, fill in ((pad + 1, pad), (pad, 0), (None, pad)):
        assert Guard(Tables(ids), tokenizer, DataPlan(), collated=False).fill_id == fill


def test_labels_below_0_are_said_once(caplog):
    guard = Guard(Tables(IDS), byte_tokenizer(), DataPlan(), collated=False)
    batch = collate([{"input_ids": [1, 2, 3], "labels": [-100, -1, 3]}], pad_token_id=0)
    for _ in range(3):
        assert np.array_equal(guard.batch(batch).labels, [[-100, -1, 3]])
    assert len(caplog.records) == 1 and "only -100 is left out" in caplog.text
