"""Rows to batches: padding, documents, what a user's collator returned, and length buckets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_mlx.data.buckets import bucket_length, pad_batch
from hf_mlx.data.collate import collate, convert_batch
from hf_mlx.errors import DataError

ROWS = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5]}]
PACKED = [{"input_ids": [1, 2, 3, 4, 5], "seq_lengths": [3, 2]}, {"input_ids": [6, 7], "seq_lengths": [2]}]


def test_rows_are_padded_on_the_right():
    batch = collate(ROWS, pad_token_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch.labels.tolist() == [[-100, 2, 3], [4, 5, -100]]
    assert (batch.num_tokens, batch.num_items, batch.lengths.tolist()) == (5, 3, [3, 2])
    assert batch.segments is None
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.lengths.dtype} == {np.dtype(np.int32)}


def test_padding_free_is_one_row_of_documents():
    batch = collate(ROWS, pad_token_id=9, padding_free=True, pad_to_multiple_of=4)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 9, 9, 9]]
    assert batch.labels.tolist() == [[-100, 2, 3, -100, 5, -100, -100, -100]]
    assert batch.segments is not None and batch.segments.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert (batch.num_tokens, batch.num_items, batch.lengths.tolist()) == (8, 3, [5])


def test_packed_rows_keep_their_documents_apart():
    flat = collate(PACKED, pad_token_id=0, padding_free=True)
    assert flat.segments is not None and flat.segments.tolist() == [[0, 0, 0, 1, 1, 2, 2]]
    assert flat.labels.tolist() == [[-100, 2, 3, -100, 5, -100, 7]]
    padded = collate(PACKED, pad_token_id=0)
    assert padded.segments is not None and padded.segments.tolist() == [[0, 0, 0, 1, 1], [0, 0, 2, 2, 2]]
    assert padded.labels.tolist() == [[-100, 2, 3, -100, 5], [-100, 7, -100, -100, -100]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "raw"}, "input_ids"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels"),
        ({"input_ids": [1.5, 2]}, "input_ids"),
        ({"input_ids": np.array([1.0, 2.0])}, "input_ids"),
        ({"input_ids": [1, None]}, "input_ids"),
        ({"input_ids": [1, 2**40]}, "input_ids"),
        ({"input_ids": [1, 2], "labels": ["1", "2"]}, "labels"),
        ({"input_ids": [1, 2], "completion_mask": [0, 1]}, "completion_mask"),
        ({"input_ids": [1, 2], "seq_lengths": [3]}, "seq_lengths"),
    ],
)
def test_rows_nobody_prepared_are_refused(row, words):
    with pytest.raises(DataError, match=f"row 1 of a batch, column '{words}'"):
        collate([{"input_ids": [1, 2], "labels": [1, 2]}, row], pad_token_id=0)


def test_a_collators_batch_is_taken_as_it_is():
    given = {
        "input_ids": [[1, 2, 3], [4, 5, 0]],
        "labels": np.array([[-100, 2, 3], [4, 5, -100]]),
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }
    batch = convert_batch(given)
    assert batch.labels.tolist() == [[-100, 2, 3], [4, 5, -100]]
    assert (batch.num_tokens, batch.num_items, batch.segments) == (5, 3, None)


def test_positions_that_restart_separate_documents():
    ids, positions = [[1, 2, 3, 4, 5]], [[0, 1, 2, 0, 1]]
    batch = convert_batch({"input_ids": ids, "labels": ids, "position_ids": positions})
    assert batch.segments is not None and batch.segments.tolist() == [[0, 0, 0, 1, 1]]
    assert batch.labels.tolist() == [[-100, 2, 3, -100, 5]]
    plain = convert_batch({"input_ids": ids, "labels": ids, "position_ids": [[0, 1, 2, 3, 4]]})
    assert plain.segments is None


IDS = [[1, 2, 3], [4, 5, 6]]
BAD = {
    "left padding": ({"attention_mask": [[0, 1, 1], [1, 1, 1]]}, "padding_side = 'right'"),
    "a hole": ({"attention_mask": [[1, 0, 1], [1, 1, 1]]}, "holes in row 0"),
    "labels on padding": ({"attention_mask": [[1, 0, 0], [1, 1, 1]]}, "labels other than -100 on the padding"),
    "an unknown key": ({"token_type_ids": IDS}, "token_type_ids"),
    "no labels": ({"labels": None}, "no 'labels'"),
    "another shape": ({"labels": [[1, 2], [3, 4]]}, "shape"),
    "fractions": ({"labels": [[0.5, 1.0, 2.0], [1.0, 2.0, 3.0]]}, "integers"),
    "ragged rows": ({"labels": [[1, 2], [3]]}, "different lengths"),
    "one axis": ({"input_ids": [1, 2], "labels": [1, 2]}, "shape"),
    "odd positions": ({"position_ids": [[0, 2, 3], [0, 1, 2]]}, "position_ids of row 0"),
    "a list": (None, "a list"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_collators_batch_that_would_compute_something_else_is_refused(case):
    changes, words = BAD[case]
    given = [] if changes is None else {"input_ids": IDS, "labels": IDS, **changes}
    with pytest.raises(DataError) as caught:
        convert_batch(given)  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert len(BAD) == 11


@given(st.integers(1, 131_072))
def test_buckets_hold_their_rows_with_little_waste(n):
    length = bucket_length(n)
    assert length >= n
    assert length - n < 32 if n <= 256 else (length - n) * 9 < length
    assert bucket_length(length) == length


def test_buckets_are_few_and_end_at_the_limit():
    assert len({bucket_length(n) for n in range(1, 131_073)}) == 80
    assert len({bucket_length(n) for n in range(1, 1025)}) == 24
    assert bucket_length(900, limit=1000) == 960
    assert bucket_length(990, limit=1000) == 1000
    assert bucket_length(1001, limit=1000) == 1001


@pytest.mark.parametrize("padding_free", [False, True])
def test_padding_a_batch_changes_no_number(padding_free):
    batch = collate(PACKED if padding_free else ROWS, pad_token_id=0, padding_free=padding_free)
    padded = pad_batch(batch, 32, 9)
    width = batch.shape[1]
    assert padded.shape == (batch.shape[0], 32)
    assert (padded.num_items, padded.num_tokens) == (batch.num_items, batch.num_tokens)
    assert padded.input_ids[:, :width].tolist() == batch.input_ids.tolist()
    assert (padded.input_ids[:, width:] == 9).all() and (padded.labels[:, width:] == -100).all()
    if padding_free:
        assert batch.segments is not None and padded.segments is not None
        assert padded.segments[:, :width].tolist() == batch.segments.tolist()
        assert set(padded.segments[0, width:]).isdisjoint(batch.segments[0])
    assert pad_batch(padded, 16, 9) is padded


def test_input_tokens_are_counted_by_the_mask_or_by_the_padding_token():
    rows = [{"input_ids": [1, 9, 3]}, {"input_ids": [4, 9]}]  # 9 pads, and stands inside of rows
    assert collate(rows, pad_token_id=9).count_input_tokens(9) == 5
    assert collate(rows, pad_token_id=9, padding_free=True, pad_to_multiple_of=4).count_input_tokens(9) == 3
    given = {"input_ids": [[1, 9, 3]], "labels": [[1, 9, 3]], "position_ids": [[0, 1, 2]]}
    assert convert_batch(given).count_input_tokens(9) == 2
    assert convert_batch({**given, "attention_mask": [[1, 1, 1]]}).count_input_tokens(9) == 3
