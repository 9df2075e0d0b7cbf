"""Packing keeps documents whole and in order, whatever their lengths."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mlx.data.packing import pack_best_fit, pack_wrapped

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=60)


def table(lengths):
    """Documents whose tokens are all different, so that each can be found again."""
    ends = np.cumsum(lengths)
    rows = [list(range(end - size, end)) for end, size in zip(ends, lengths, strict=True)]
    kind = pa.list_(pa.int32())
    return pa.table({"input_ids": pa.array(rows, kind), "labels": pa.array([[-t for t in row] for row in rows], kind)})


def unpack(packed):
    documents = []
    for row in packed.to_pylist():
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"])
        assert row["labels"] == [-token for token in row["input_ids"]]
        start = 0
        for size in row["seq_lengths"]:
            documents.append(row["input_ids"][start : start + size])
            start += size
    return documents


@settings(deadline=None)
@given(LENGTHS, st.integers(2, 30))
def test_best_fit_keeps_each_document_or_its_start(lengths, length):
    documents = table(lengths)
    packed = pack_best_fit(documents, length, split=False)
    expected = sorted(row[:length] for row in documents["input_ids"].to_pylist() if row)
    assert sorted(unpack(packed)) == expected
    rows = [len(row) for row in packed["input_ids"].to_pylist()]
    assert all(0 < row <= length for row in rows)
    # Best fit leaves no two rows that would fit in one.
    assert len(rows) < 2 or sum(sorted(rows)[:2]) > length


@settings(deadline=None)
@given(LENGTHS, st.integers(2, 30))
def test_split_keeps_every_token(lengths, length):
    packed = pack_best_fit(table(lengths), length, split=True)
    assert sorted(token for document in unpack(packed) for token in document) == list(range(sum(lengths)))


@settings(deadline=None)
@given(LENGTHS, st.integers(2, 30))
def test_wrapped_is_one_stream(lengths, length):
    packed = pack_wrapped(table(lengths), length).to_pylist()
    assert [token for row in packed for token in row["input_ids"]] == list(range(sum(lengths)))
    assert all(len(row["input_ids"]) == length for row in packed[:-1])


@pytest.mark.parametrize("split", [False, True])
def test_a_slice_of_a_table_packs_like_a_copy(split):
    documents = table([5, 9, 3, 12, 1, 7])
    copy = pa.Table.from_pylist(documents.slice(2).to_pylist(), schema=documents.schema)
    assert pack_best_fit(documents.slice(2), 8, split).equals(pack_best_fit(copy, 8, split))
    assert pack_wrapped(documents.slice(2), 8).equals(pack_wrapped(copy, 8))
