"""Which rows each process reads, beside accelerate's own samplers."""

from __future__ import annotations

import itertools

import numpy as np
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from datasets import Dataset
from torch.utils.data import BatchSampler, SequentialSampler

from hf_mlx.data.loader import RowLoader, StreamLoader
from hf_mlx.data.order import Share, deal


def test_every_process_reads_the_rows_that_accelerate_gives_it() -> None:
    compared = 0
    for rows, batch, processes, drop, split in itertools.product(
        range(1, 25), (1, 2, 3, 4), (2, 3, 4), (False, True), (False, True)
    ):
        if split and batch % processes:
            continue
        for rank in range(processes):
            sampler = BatchSampler(SequentialSampler(range(rows)), batch, drop)
            theirs = list(BatchSamplerShard(sampler, processes, rank, split_batches=split))
            share = Share(rank, processes, split)
            ours = deal(np.arange(rows), batch, share, drop_last=drop).tolist()
            assert ours == theirs, (rows, batch, processes, rank, drop, split)
            assert len(ours) == share.count(rows, batch, drop_last=drop)
            compared += 1
    assert compared == 2256


def test_a_loader_of_a_process_is_as_long_as_accelerates() -> None:
    dataset = Dataset.from_list([{"row": number} for number in range(13)])
    for rank, skip in itertools.product((0, 1, 2), (0, 1)):
        share = Share(rank, 3)
        loader = RowLoader(dataset, 2, lambda rows: [row["row"] for row in rows], share=share)  # type: ignore
        assert len(loader) == 3
        assert list(loader.batches(0, skip)) == deal(np.arange(13), 2, share)[skip:].tolist()


def test_a_stream_is_dealt_in_rounds_or_by_its_shards() -> None:
    compared = 0
    for rows, batch, processes in itertools.product((1, 4, 5, 13), (1, 2, 3), (2, 3)):
        dataset = Dataset.from_list([{"row": number} for number in range(rows)])
        for rank in range(processes):
            share = Share(rank, processes)
            stream = dataset.to_iterable_dataset(num_shards=1)
            loader = StreamLoader(stream, batch, lambda rows: [row["row"] for row in rows], share=share)  # type: ignore
            shard = IterableDatasetShard(stream, batch, False, processes, rank)
            theirs = [row["row"] for row in shard]
            assert list(itertools.chain(*loader)) == theirs, (rows, batch, processes, rank)  # type: ignore
            assert not loader.has_own_shards
            compared += 1
    own = Dataset.from_list([{"row": number} for number in range(13)]).to_iterable_dataset(num_shards=4)
    for rank in (0, 1, 2):
        loader = StreamLoader(own, 2, lambda rows: [row["row"] for row in rows], share=Share(rank, 3))  # type: ignore
        theirs = [row["row"] for row in own.shard(num_shards=3, index=rank)]
        assert loader.has_own_shards and list(itertools.chain(*loader)) == theirs  # type: ignore
        compared += 1
    assert compared == 63
