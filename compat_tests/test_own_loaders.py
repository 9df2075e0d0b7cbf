"""A script's own order: what get_train_dataloader, a sampler or an evaluation loader gives is what TRL trains on."""

from __future__ import annotations

from functools import partial
from typing import Any

import pairs
import pytest
import torch
from datasets import Dataset
from own_runs import model_folder
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, WeightedRandomSampler
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import HFMLXError

pytestmark = pytest.mark.usefixtures("uncompiled")

ROWS = pairs.text_rows(14)
SETTINGS = {"max_steps": 6, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "logging_steps": 1}
COLUMNS = ("input_ids", "labels")


@pytest.fixture
def model():
    return model_folder()


def build(cls: type, model: Any, folder: Any, **more: Any) -> Any:
    args = SFTConfig(output_dir=str(folder / cls.__name__), **{**pairs.SILENT, **SETTINGS, **more})
    data = {"train_dataset": Dataset.from_list(ROWS), "eval_dataset": Dataset.from_list(ROWS[:7])}
    return cls(str(model), args, **data)


def tokens(dataset: Any) -> Any:
    return dataset.select_columns([name for name in COLUMNS if name in dataset.column_names])


def sequential(cls: type) -> type:
    class InOrder(cls):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    return InOrder


def weighted(cls: type) -> type:
    class Weighted(cls):
        def _get_train_sampler(self, train_dataset=None):
            return WeightedRandomSampler([1.0 + number for number in range(len(self.train_dataset))], 10)

    return Weighted


def shuffled_loader(cls: type) -> type:
    class Shuffled(cls):
        def get_train_dataloader(self):
            rows = tokens(self.train_dataset)
            return DataLoader(rows, batch_size=3, shuffle=True, collate_fn=self.data_collator)

    return Shuffled


def own_collate(cls: type) -> type:
    class Collated(cls):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_size=3, collate_fn=self.pad)

        def pad(self, rows):
            width = max(len(row["input_ids"]) for row in rows) + 2
            batch = {"input_ids": [], "labels": [], "attention_mask": []}
            for row in rows:
                ids, rest = row["input_ids"], width - len(row["input_ids"])
                batch["input_ids"].append(ids + [0] * rest)
                batch["labels"].append([-100, *ids[1:]] + [-100] * rest)
                batch["attention_mask"].append([1] * len(ids) + [0] * rest)
            return {name: torch.tensor(value) for name, value in batch.items()}

    return Collated


def batch_sampler(cls: type) -> type:
    class Short(BatchSampler):
        def __init__(self, dataset):
            lengths = [len(row["input_ids"]) for row in dataset]
            order = sorted(range(len(lengths)), key=lengths.__getitem__)
            self.batches = [order[:5], order[5:7], order[7:]]

        def __iter__(self):
            yield from self.batches

        def __len__(self):
            return len(self.batches)

    class ByLength(cls):
        def get_train_dataloader(self):
            rows = tokens(self.train_dataset)
            loader = DataLoader(rows, batch_sampler=Short(rows), collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

    return ByLength


def around_supers(cls: type) -> type:
    class Doubled(cls):
        def get_train_dataloader(self):
            loader = super().get_train_dataloader()
            return [batch for batch in loader for _ in range(2)]

    return Doubled


def evaluated_backwards(cls: type) -> type:
    class Backwards(cls):
        def _get_eval_sampler(self, eval_dataset):
            return list(reversed(range(len(eval_dataset))))

        def get_eval_dataloader(self, eval_dataset=None):
            loader = super().get_eval_dataloader(eval_dataset)
            assert loader.dataset.num_rows == 7
            return loader

    return Backwards


def plain_evaluation(cls: type) -> type:
    class Plain(cls):
        def get_eval_dataloader(self, eval_dataset=None):
            return DataLoader(tokens(self.eval_dataset), batch_size=5, collate_fn=self.data_collator)

    return Plain


KINDS = [
    sequential,
    weighted,
    shuffled_loader,
    own_collate,
    batch_sampler,
    around_supers,
    evaluated_backwards,
    plain_evaluation,
]


def test_kinds_are_many():
    assert len(KINDS) == 8


@pytest.mark.parametrize("kind", KINDS)
def test_overridden_order_gives_trls_curve(kind, model, tmp_path):
    more = {"eval_strategy": "steps", "eval_steps": 3} if "eval" in kind.__name__ else {}
    if kind is around_supers:
        more = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}
    histories = []
    for cls in (SFTTrainer, MLXSFTTrainer):
        with pairs._quiet():
            trainer = build(kind(cls), model, tmp_path, **more)
            trainer.train()
        histories.append(pairs.untimed(trainer.state.log_history))
    pairs.assert_same_log(*histories, relative=2e-4)
    assert len(histories[0]) >= 7


def test_loader_assigned_on_the_instance(model, tmp_path):
    histories = []
    for cls in (SFTTrainer, MLXSFTTrainer):
        with pairs._quiet():
            trainer = build(cls, model, tmp_path)
            rows = tokens(trainer.train_dataset)
            make = partial(DataLoader, rows, batch_size=2, collate_fn=trainer.data_collator)
            trainer.get_train_dataloader = make
            trainer.train()
        histories.append(pairs.untimed(trainer.state.log_history))
    pairs.assert_same_log(*histories, relative=2e-4)


def test_resuming_goes_on_in_the_loaders_order(model, tmp_path):
    histories = []
    for number, cls in enumerate((SFTTrainer, MLXSFTTrainer)):
        with pairs._quiet():
            more = {"save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path / str(number))}
            whole = build_in(weighted(cls), model, **more)
            whole.train()
            again = build_in(weighted(cls), model, **more)
            again.train(resume_from_checkpoint=f"{more['output_dir']}/checkpoint-3")
        # TRL counts tokens anew after a resume.
        for trainer in (whole, again):
            entries = pairs.untimed(trainer.state.log_history)
            histories.append([{k: v for k, v in entry.items() if k != "num_tokens"} for entry in entries])
    pairs.assert_same_log(histories[0], histories[2], relative=2e-4)
    pairs.assert_same_log(histories[1][:-1], histories[3][:-1], relative=2e-4)


def build_in(cls: type, model: Any, **more: Any) -> Any:
    args = SFTConfig(**{**pairs.SILENT, **SETTINGS, **more})
    return cls(str(model), args, train_dataset=Dataset.from_list(ROWS))


@pytest.mark.parametrize("more", [{}, {"pad_to_multiple_of": 8}, {"train_sampling_strategy": "group_by_length"}])
def test_loaders_yield_trls_batches(more, model, tmp_path):
    calls = ["get_train_dataloader", "get_eval_dataloader"]
    # Grouped by length the order of training goes by torch's global generator, which TRL alone seeds.
    calls = calls[1:] if "train_sampling_strategy" in more else calls
    found = []
    for cls in (SFTTrainer, MLXSFTTrainer):
        with pairs._quiet():
            trainer = build(cls, model, tmp_path, **more)
            found.append([batch for call in calls for batch in getattr(trainer, call)()])
    compared = 0
    for a, b in zip(*found, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
        compared += 1
    assert compared >= 2


class Batches(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.seen += [batch["input_ids"] for batch in train_dataloader]
        assert len(train_dataloader) == len(self.seen)

    def on_evaluate(self, args, state, control, eval_dataloader=None, **kwargs):
        self.seen += [batch["labels"] for batch in eval_dataloader]


def test_callbacks_read_the_loaders(model, tmp_path):
    seen = []
    for cls in (SFTTrainer, MLXSFTTrainer):
        with pairs._quiet():
            trainer = build(cls, model, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
            callback = Batches()
            trainer.add_callback(callback)
            trainer.train()
        seen.append(callback.seen)
    assert len(seen[0]) == len(seen[1]) == 6
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize(("returned", "word"), [(7, "int"), ([[1, 2]], "list"), ([], "0 batches")])
def test_loader_of_something_else_is_refused(returned, word, model, tmp_path):
    with pairs._quiet():
        trainer = build(MLXSFTTrainer, model, tmp_path)
        trainer.get_train_dataloader = lambda: returned
        with pytest.raises(HFMLXError, match=word):
            trainer.train()
