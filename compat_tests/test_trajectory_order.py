"""Row order and step counts beside transformers' Trainer and TRL's SFTTrainer; the generator beside torch's."""

from __future__ import annotations

import itertools
import random
import time

import datasets
import numpy as np
import pytest
import torch
import transformers
import trl

from hf_mlx.data.generator import TorchGenerator
from hf_mlx.data.order import count_steps, epoch_order, micro_batches
from hf_mlx.settings.plan import BatchPlan

SEEDS = (0, 1, 42, 2**31 + 7, 2**40 + 3, -5)
# torch's normals come from its own vector log, sin and cos: 3 ulp of values up to 6.
NORMAL_TOLERANCE = 1e-6


def _torch(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_kind_of_draw_in_turn_equals_torch():
    seen = 0
    for seed in SEEDS:
        theirs, ours = _torch(seed), TorchGenerator(seed)
        assert ours.initial_seed == theirs.initial_seed()
        for n in (1, 2, 15, 16, 17, 623, 624, 625, 5000):
            assert ours.randperm(n).tolist() == torch.randperm(n, generator=theirs).tolist()
            uniform = torch.empty(n, 3).uniform_(-0.37, 0.41, generator=theirs).numpy()
            assert np.array_equal(ours.uniform((n, 3), -0.37, 0.41), uniform)
            normal = torch.empty(n).normal_(0, 0.02, generator=theirs).numpy()
            assert np.abs(ours.normal(n, 0.02) - normal).max() <= 0.02 * NORMAL_TOLERANCE
            integer = torch.empty((), dtype=torch.int64).random_(generator=theirs).item()
            assert ours.seed_int64() == integer
            seen += 1
    assert seen == len(SEEDS) * 9


@pytest.mark.parametrize("shape", [(8, 576), (64, 4096), (3, 5, 7)])
def test_kaiming_uniform_equals_torch(shape):
    with torch.random.fork_rng():
        torch.manual_seed(9)
        theirs = torch.nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5).numpy()
    assert np.array_equal(TorchGenerator(9).kaiming_uniform(shape, a=5**0.5), theirs)


def test_thirteen_million_uniforms_equal_torch_in_under_half_a_second():
    start = time.process_time()
    ours = TorchGenerator(3).uniform(13_000_000, -0.1, 0.1)
    assert time.process_time() - start < 0.5
    assert np.array_equal(ours, torch.empty(13_000_000).uniform_(-0.1, 0.1, generator=_torch(3)).numpy())


@pytest.mark.parametrize("drawn", [0, 1, 5, 623, 624, 625, 1248])
def test_states_travel_both_ways(drawn):
    theirs, ours = _torch(11), TorchGenerator(11)
    torch.empty(drawn).uniform_(generator=theirs)
    ours.uniform(drawn)
    torch.empty(3).normal_(generator=theirs)  # leaves half a pair for the next call
    ours.normal(3)
    adopted, adopting = TorchGenerator(), torch.Generator()
    adopted.set_torch_state(theirs.get_state().numpy())
    adopting.set_state(torch.from_numpy(ours.to_torch_state()))
    for torch_side, our_side in ((theirs, adopted), (adopting, ours)):
        assert np.abs(torch.empty(1).normal_(generator=torch_side).numpy() - our_side.normal(1)).max() == 0
        assert torch.randperm(700, generator=torch_side).tolist() == our_side.randperm(700).tolist()


class Rows(torch.utils.data.Dataset):
    """Rows that carry their own index, and as many input_ids as ``lengths`` says."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict:
        return {"row": index, "input_ids": [1] * self.lengths[index]}


class Scale(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, row):
        return {"loss": (self.weight * row.float()).mean()}


def _train(plan: BatchPlan, lengths: list[int], folder: str, **more):
    """Run transformers' Trainer; returns it and the batches of row indices that it fetched."""
    fetched: list[list[int]] = []

    def collate(rows):
        fetched.append([row["row"] for row in rows])
        return {"row": torch.tensor(fetched[-1])}

    args = transformers.TrainingArguments(
        folder,
        per_device_train_batch_size=plan.train_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        num_train_epochs=plan.num_train_epochs,
        max_steps=plan.max_steps,
        dataloader_drop_last=plan.drop_last,
        seed=plan.seed,
        data_seed=plan.data_seed,
        train_sampling_strategy=plan.sampling,
        accelerator_config={"use_seedable_sampler": plan.seedable_sampler},
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        **more,
    )
    trainer = transformers.Trainer(Scale(), args, train_dataset=Rows(lengths), data_collator=collate)
    trainer.train()
    return trainer, fetched


def _expected(plan: BatchPlan, lengths: list[int]) -> list[list[int]]:
    steps = count_steps(len(lengths), plan)
    generator = TorchGenerator(plan.seed)
    batches: list[list[int]] = []
    for epoch in range(steps.epochs):
        order = epoch_order(len(lengths), plan, epoch, lengths=lengths, global_rng=generator)
        batches += [rows.tolist() for rows in micro_batches(order, plan.train_batch_size, plan.drop_last)]
    return batches


def _plans() -> list[tuple[BatchPlan, int]]:
    draw = random.Random(5)
    samplings = [("random", True), ("random", False), ("sequential", True), ("group_by_length", True)]
    plans = []
    for (sampling, seedable), drop_last, data_seed, _ in itertools.product(
        samplings, (False, True), (None, 7), range(4)
    ):
        size = draw.choice((1, 2, 3, 8))
        plan = BatchPlan(
            train_batch_size=size,
            gradient_accumulation_steps=draw.choice((1, 2, 3, 4)),
            num_train_epochs=draw.choice((1.0, 2.0, 2.5, 3.0)),
            max_steps=draw.choice((-1, -1, 5)),
            drop_last=drop_last,
            seed=draw.choice((0, 3, 42)),
            data_seed=data_seed,
            sampling=sampling,
            seedable_sampler=seedable,
        )
        plans.append((plan, draw.randrange(size, 60)))
    return plans


# Each combination twice, and twice more with `make compat`.
@pytest.mark.parametrize("share", [0, pytest.param(1, marks=pytest.mark.wide)])
def test_order_and_counts_equal_the_trainer(tmp_path, share):
    plans = _plans()[share::2]
    for plan, rows in plans:
        lengths = [random.Random(row).randrange(1, 40) for row in range(rows)]
        trainer, fetched = _train(plan, lengths, str(tmp_path))
        expected, steps = _expected(plan, lengths), count_steps(rows, plan)
        assert trainer.state.max_steps == trainer.state.global_step == steps.total_steps, plan
        assert trainer.state.num_train_epochs == steps.epochs, plan
        # With max_steps the last epoch is cut short; the loader reads one batch ahead.
        assert len(fetched) >= min(steps.total_steps, len(expected)), plan
        assert fetched == expected[: len(fetched)], plan
        if plan.max_steps < 0 and plan.num_train_epochs == int(plan.num_train_epochs):
            assert len(fetched) == len(expected), plan
    assert len(plans) == 32


def test_streams_take_their_counts_from_max_steps(tmp_path):
    plan = BatchPlan(train_batch_size=2, gradient_accumulation_steps=3, max_steps=4)
    stream = datasets.Dataset.from_list([{"row": row} for row in range(100)]).to_iterable_dataset()
    args = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        use_cpu=True,
        report_to="none",
    )
    trainer = transformers.Trainer(Scale(), args, train_dataset=stream)
    epochs, updates, *_, batches, total = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    steps = count_steps(None, plan)
    assert (steps.epochs, steps.updates_per_epoch, steps.batches_per_epoch) == (epochs, updates, batches)
    assert steps.total_steps == total == 4


def _sft(tmp_path, lengths: list[int], **more) -> list[list[int]]:
    """Run TRL's SFTTrainer on rows of these lengths, with evaluation; returns the first token of each row fetched."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(128)}, unk_token="<0>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", eos_token="<1>")
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    rows = datasets.Dataset.from_list([{"input_ids": [i + 2] * n} for i, n in enumerate(lengths)])
    args = trl.SFTConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        **more,
    )
    trainer = trl.SFTTrainer(
        transformers.LlamaForCausalLM(config),
        args,
        train_dataset=rows,
        eval_dataset=datasets.Dataset.from_list([{"input_ids": [127] * 5}] * 3),
        processing_class=tokenizer,
    )
    fetched, collate = [], trainer.data_collator

    def recording(features):
        if features[0]["input_ids"][0] != 127:
            fetched.append([feature["input_ids"][0] - 2 for feature in features])
        return collate(features)

    trainer.data_collator = recording
    trainer.train()
    return fetched


@pytest.mark.parametrize("sampling", ["group_by_length", "random"])
def test_samplers_on_the_global_generator_equal_trl_across_evaluations(tmp_path, sampling):
    lengths = [random.Random(row).randrange(1, 30) for row in range(23)]
    plan = BatchPlan(train_batch_size=4, num_train_epochs=3.0, seed=13, sampling=sampling, seedable_sampler=False)
    fetched = _sft(
        tmp_path,
        lengths,
        per_device_train_batch_size=4,
        num_train_epochs=3,
        seed=13,
        train_sampling_strategy=sampling,
        accelerator_config={"use_seedable_sampler": False},
        eval_strategy="epoch",
        eval_on_start=True,
    )
    generator = TorchGenerator(plan.seed)
    generator.seed_int64()  # eval_on_start opens a loader
    expected = []
    for epoch in range(3):
        order = epoch_order(23, plan, epoch, lengths=lengths, global_rng=generator)
        expected += [rows.tolist() for rows in micro_batches(order, 4)]
        generator.seed_int64()  # so does the evaluation of each epoch
    assert fetched == expected
    assert len(fetched) == 18
