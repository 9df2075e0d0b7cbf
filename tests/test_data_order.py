"""The order of rows, the cut into micro-batches and the step counts."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_mlx.data.generator import TorchGenerator
from hf_mlx.data.order import Steps, count_steps, epoch_order, micro_batches
from hf_mlx.errors import DataError, SettingError
from hf_mlx.settings.plan import BatchPlan


def test_the_seedable_sampler_adds_the_epoch_to_the_seed():
    # torch.randperm(10) with seeds 42 and 43
    plan = BatchPlan(seed=42)
    assert epoch_order(10, plan, 0).tolist() == [2, 6, 1, 8, 4, 5, 0, 9, 3, 7]
    assert epoch_order(10, plan, 1).tolist() == [8, 4, 9, 0, 5, 1, 6, 7, 2, 3]


def test_data_seed_comes_before_seed_even_when_it_is_zero():
    assert epoch_order(10, BatchPlan(seed=1, data_seed=42), 0).tolist() == [2, 6, 1, 8, 4, 5, 0, 9, 3, 7]
    assert epoch_order(10, BatchPlan(seed=42, data_seed=0), 0).tolist() == TorchGenerator(0).randperm(10).tolist()


def test_sequential_is_the_order_of_the_rows():
    assert epoch_order(4, BatchPlan(sampling="sequential"), 3).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("plan", [BatchPlan(seedable_sampler=False), BatchPlan(sampling="group_by_length")])
def test_samplers_on_the_global_generator_go_on_from_its_state(plan):
    lengths = list(range(1, 41))
    run = TorchGenerator(3)
    first, second = (epoch_order(40, plan, epoch, lengths=lengths, global_rng=run).tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    again = TorchGenerator(3)
    assert epoch_order(40, plan, 0, lengths=lengths, global_rng=again).tolist() == first
    again.seed_int64()  # an evaluation in between
    assert epoch_order(40, plan, 1, lengths=lengths, global_rng=again).tolist() != second


def test_group_by_length_starts_with_the_longest_row_and_sorts_inside_a_megabatch():
    lengths = [7, 3, 9, 1, 5, 8, 2, 6]
    plan = BatchPlan(sampling="group_by_length", train_batch_size=4)
    order = epoch_order(8, plan, 0, lengths=lengths, global_rng=TorchGenerator(1))
    assert order[0] == 2
    # The longest row changed places with the first of the other megabatch; the rest of both is sorted.
    for megabatch in (order[1:4], order[5:]):
        assert [lengths[row] for row in megabatch] == sorted((lengths[row] for row in megabatch), reverse=True)


def test_what_a_sampler_needs_must_be_there():
    with pytest.raises(ValueError, match="needs global_rng"):
        epoch_order(4, BatchPlan(seedable_sampler=False), 0)
    with pytest.raises(ValueError, match="length of every row"):
        epoch_order(4, BatchPlan(sampling="group_by_length"), 0, global_rng=TorchGenerator(0))


@given(rows=st.integers(1, 200), size=st.integers(1, 20), drop_last=st.booleans())
def test_micro_batches_cut_without_gap_or_overlap(rows, size, drop_last):
    batches = list(micro_batches(np.arange(rows), size, drop_last))
    kept = rows - rows % size if drop_last else rows
    assert [row for batch in batches for row in batch] == list(range(kept))
    assert all(len(batch) == size for batch in batches[:-1])
    assert not drop_last or all(len(batch) == size for batch in batches)


@pytest.mark.parametrize(
    ("rows", "plan", "expected"),
    [
        # 10 rows, 4 batches, the second update of an epoch has one micro-batch
        (10, BatchPlan(3, gradient_accumulation_steps=3, num_train_epochs=2), Steps(4, 2, 4, 2)),
        (10, BatchPlan(3, gradient_accumulation_steps=3, num_train_epochs=2, drop_last=True), Steps(3, 1, 2, 2)),
        (10, BatchPlan(3, num_train_epochs=1.5), Steps(4, 4, 6, 2)),
        (10, BatchPlan(3, num_train_epochs=9, max_steps=5), Steps(4, 4, 5, 2)),
        (2, BatchPlan(8, gradient_accumulation_steps=16, num_train_epochs=3), Steps(1, 1, 3, 3)),
        (None, BatchPlan(8, gradient_accumulation_steps=4, max_steps=7), Steps(28, 7, 7, sys.maxsize)),
    ],
)
def test_step_counts(rows, plan, expected):
    assert count_steps(rows, plan) == expected


def test_a_stream_needs_max_steps():
    with pytest.raises(SettingError, match=r"max_steps=-1[\s\S]*SFTConfig\(max_steps=1000"):
        count_steps(None, BatchPlan())


@pytest.mark.parametrize(("rows", "plan"), [(0, BatchPlan()), (3, BatchPlan(8, drop_last=True))])
def test_an_epoch_without_a_batch_is_refused(rows, plan):
    with pytest.raises(DataError, match="at least one batch an epoch"):
        count_steps(rows, plan)
