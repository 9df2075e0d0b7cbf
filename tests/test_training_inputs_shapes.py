"""How many shapes a compiled step can be asked for, and that every document is in them, whole and by itself."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mlx.data.collate import collate
from hf_mlx.data.custom import convert_batch
from hf_mlx.data.fitting import fit_shapes
from hf_mlx.data.packing import fill_bins
from hf_mlx.data.shapes import Shapes
from hf_mlx.training.inputs import make_inputs

PAD = 0
LONGEST = 1024
# 24 lengths up to 1,024, and for each: two counts of gathered positions, or all of them.
FIXED = 24 * 3
# Twelve shapes of the run with three counts each; a batch in twenty may need one of its own.
FITTED = 12 * 3
BATCHES = 600

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def chat_row(draw, length):
    """Random ids, of which a random first part is not trained."""
    ids = draw.integers(3, 100, length)
    labels = np.where(np.arange(length) >= draw.integers(0, length), ids, -100)
    return {"input_ids": ids.tolist(), "labels": labels.tolist()}


def packed_row(rows):
    joined = {key: [value for row in rows for value in row[key]] for key in ("input_ids", "labels")}
    return joined | {"seq_lengths": [len(row["input_ids"]) for row in rows]}


def pack(rows, length):
    bins = fill_bins(np.array([len(row["input_ids"]) for row in rows]), length)
    return [packed_row([rows[number] for number in bin]) for bin in bins]


def chat_lengths(draw, count, longest=LONGEST):
    return np.clip(np.exp(draw.normal(np.log(120), 0.8, count)), 4, longest).astype(int)


def expected_documents(rows):
    """(ids, targets) of each document; the first token of one is nothing's target."""
    found = Counter()
    for row in rows:
        labels = [*row["labels"][1:], -100]
        found[tuple(row["input_ids"]), tuple(labels)] += 1
    return found


def computed_documents(inputs):
    """The same, read back from the arrays of a step."""
    arrays = {name: np.array(array) for name, array in inputs.arrays.items()}
    ids = arrays["input_ids"]
    targets = arrays["targets"]
    if "positions" in arrays:
        scored = targets != -100
        flat = np.full(ids.size, -100)
        flat[arrays["positions"][scored]] = targets[scored]
        targets = flat
    targets = targets.reshape(ids.shape)
    segments = arrays.get("segments", np.zeros_like(ids))
    found = Counter()
    for row, length in enumerate(arrays["lengths"]):
        assert (targets[row, length:] == -100).all()
        assert not set(segments[row, length:]) & set(segments[row, :length]) or "segments" not in arrays
        borders = np.flatnonzero(np.diff(segments[row, :length])) + 1
        for part in np.split(np.arange(length), borders) if length else []:
            found[tuple(ids[row, part].tolist()), tuple(targets[row, part].tolist())] += 1
    return found


def shapes_of(inputs):
    return tuple((name, array.shape) for name, array in sorted(inputs.arrays.items()))


def test_shapes_of_the_fixed_table_are_bounded():
    draw = np.random.default_rng(0)
    shapes = set()
    for _ in range(BATCHES):
        rows = [chat_row(draw, length) for length in draw.integers(2, LONGEST + 1, 4)]
        inputs = make_inputs(collate(rows, pad_token_id=PAD), PAD)
        targets = np.array(inputs.arrays["targets"])
        assert (targets != -100).sum() == inputs.valid == sum(sum(x != -100 for x in r["labels"][1:]) for r in rows)
        shapes.add(shapes_of(inputs))
    assert 20 < len(shapes) <= FIXED


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_run_has_few_shapes_and_little_padding(packed):
    draw = np.random.default_rng(1)
    rows = [chat_row(draw, length) for length in chat_lengths(draw, 1600)]
    if packed:
        rows = pack(rows, LONGEST)
    order = draw.permutation(len(rows))[: len(rows) // 4 * 4].reshape(-1, 4)
    batches = [
        collate([rows[number] for number in numbers], pad_token_id=PAD, padding_free=packed) for numbers in order
    ]
    shapes = fit_shapes(batches, share=True)
    assert shapes.chosen == fit_shapes(batches, share=True).chosen
    made = [make_inputs(batch, PAD, shapes) for batch in batches]
    assert len(made) == (62 if packed else 400)
    seen = {shapes_of(inputs) for inputs in made}
    assert 0 < len(seen) <= FITTED + len(made) // 20
    share = sum(inputs.padding for inputs in made) / sum(inputs.arrays["input_ids"].size for inputs in made)
    before = sum(batch.input_ids.size - batch.lengths.sum() for batch in batches) / sum(
        b.input_ids.size for b in batches
    )
    assert share < (0.1 if packed else before / 2)


def test_attention_of_packed_rows_is_little_wider_than_their_documents():
    draw = np.random.default_rng(2)
    rows = pack([chat_row(draw, length) for length in chat_lengths(draw, 600, longest=200)], LONGEST)
    rows = [rows[number] for number in draw.permutation(len(rows))[:8]]
    batch = collate(rows, pad_token_id=PAD, padding_free=True)
    assert batch.input_ids.shape[1] > 7000
    inputs = make_inputs(batch, PAD, fit_shapes([batch], share=True))
    assert inputs.arrays["input_ids"].shape[1] <= 512
    assert inputs.padding < inputs.arrays["input_ids"].size / 10


@settings(deadline=None)
@given(SIZES, st.booleans(), st.integers(0, 2**16))
def test_every_document_is_computed_whole(sizes, share, seed):
    draw = np.random.default_rng(seed)
    rows = [chat_row(draw, size) for size in sizes]
    inputs = make_inputs(collate(rows, pad_token_id=PAD), PAD, Shapes(share=share))
    assert computed_documents(inputs) == expected_documents(rows)
    assert inputs.tokens == sum(sizes) == inputs.arrays["input_ids"].size - inputs.padding
    assert inputs.arrays["width"].item() == max(sizes)
    assert ("segments" in inputs.arrays) <= share


@settings(deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=4), st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_every_packed_document_is_computed_whole(packs, flat, fitted, seed):
    draw = np.random.default_rng(seed)
    rows = [[chat_row(draw, size) for size in sizes] for sizes in packs]
    batch = collate([packed_row(row) for row in rows], pad_token_id=PAD, padding_free=flat)
    shapes = fit_shapes([batch], share=True) if fitted else Shapes(share=True)
    inputs = make_inputs(batch, PAD, shapes)
    assert computed_documents(inputs) == expected_documents([document for row in rows for document in row])
    assert inputs.valid == batch.num_items


def test_padding_that_upstream_counts_is_computed():
    row = packed_row([chat_row(np.random.default_rng(3), size) for size in (5, 6)])
    batch = collate([row], pad_token_id=PAD, padding_free=True, pad_to_multiple_of=8)
    inputs = make_inputs(batch, PAD, Shapes(share=True))
    # TRL has no mask there and counts the row's width; padding is no token all the same.
    assert (inputs.tokens, inputs.arrays["lengths"].sum().item()) == (16, 16)
    assert inputs.padding == inputs.arrays["input_ids"].size - 11


def test_documents_of_one_length_need_no_mask():
    draw = np.random.default_rng(4)
    rows = [packed_row([chat_row(draw, 96)]) for _ in range(4)]
    inputs = make_inputs(collate(rows, pad_token_id=PAD, padding_free=True), PAD, Shapes(share=True))
    assert inputs.arrays["input_ids"].shape == (4, 96)
    assert "segments" not in inputs.arrays


def test_packed_rows_of_a_model_that_cannot_pack_stay_as_they_are():
    batch = collate([{"input_ids": [5, 6, 7, 8], "seq_lengths": [2, 2]}], pad_token_id=PAD)
    inputs = make_inputs(batch, PAD, Shapes())
    # The step refuses them by their segments.
    assert np.array(inputs.arrays["segments"])[0, :4].tolist() == [0, 0, 1, 1]


def test_a_label_on_the_first_padding_is_still_a_target():
    mapping = {
        "input_ids": [[5, 6, 7, 9], [8, 9, 4, 3]],
        "labels": [[5, 6, 7, 9], [8, 9, 4, 3]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
    }
    inputs = make_inputs(convert_batch(mapping), PAD, Shapes(share=True))
    assert sorted(x for x in np.array(inputs.arrays["targets"]).tolist() if x != -100) == [3, 4, 6, 7, 9, 9]


def test_rows_without_a_token_are_padding():
    mapping = {"input_ids": [[5, 6], [0, 0]], "labels": [[5, 6], [-100, -100]], "attention_mask": [[1, 1], [0, 0]]}
    assert make_inputs(convert_batch(mapping), PAD, Shapes(share=True)).valid == 1
    mapping = {"input_ids": [[0, 0]], "labels": [[-100, -100]], "attention_mask": [[0, 0]]}
    assert make_inputs(convert_batch(mapping), PAD, Shapes(share=True)).valid == 0


@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_a_micro_batch_without_a_trained_token_still_projects_a_position(fitted, share):
    seen = 0
    for size in (1, 2, 24, 300):
        for rows in (1, 2, 3):
            row = {"input_ids": [5] * size, "labels": [-100] * size}
            batch = collate([row] * rows, pad_token_id=PAD)
            inputs = make_inputs(batch, PAD, fit_shapes([batch] * 5, share=share) if fitted else Shapes(share=share))
            assert inputs.arrays["targets"].size > 0 and inputs.valid == 0
            assert set(inputs.arrays["targets"].tolist()) == {-100}  # pyright: ignore[reportArgumentType]
            seen += 1
    assert seen == 12
