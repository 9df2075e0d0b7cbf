"""What transformers' own trainer tests ask of a causal LM, condensed: the class swapped, the same answers.

After ``tests/trainer/test_trainer.py`` and its neighbours of transformers 5.23. Each case is a script that returns what
the test looks at; it runs with ``transformers.Trainer`` and with ``MLXTrainer``. What is refused is named in REFUSED,
and in docs/trainer.md.
"""

import json
import math
import os
import random
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from lm_pairs import load
from pairs import SILENT, _quiet, tiny_model, tokenizer
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_mlx import MLXTrainer
from hf_mlx.errors import HFMLXError

# The promise of the library in fp32.
RELATIVE = 1e-4
LENGTH = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("model"), seed=2)


@pytest.fixture(scope="module", autouse=True)
def uncompiled():
    # The functions are the same; compiled they are compared in test_lm_random.
    mx.disable_compile()
    yield
    mx.enable_compile()


def rows(count=12, length=LENGTH, seed=0):
    pick = random.Random(seed)
    made = [[pick.randrange(5, 200) for _ in range(length)] for _ in range(count)]
    return [{"input_ids": ids, "labels": list(ids)} for ids in made]


def uneven(count=12, seed=0):
    return [
        {key: value[: 3 + (7 * at + seed) % 8] for key, value in row.items()}
        for at, row in enumerate(rows(count, seed=seed))
    ]


class Script:
    """A trainer of either class in a folder of its own, and what it leaves there."""

    def __init__(self, cls, folder, output):
        self.cls, self.folder, self.output = cls, folder, Path(output)

    def make(self, *, keywords=None, **settings):
        options = {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3, "learning_rate": 1e-3}
        options |= {"logging_steps": 1, "num_train_epochs": 1, "output_dir": str(self.output)}
        given = {"train_dataset": rows(), "eval_dataset": rows(5, seed=1), **(keywords or {})}
        args = TrainingArguments(**{**SILENT, **options, **settings})
        model = {} if "model" in given or "model_init" in given else {"model": load(self.folder)}
        return self.cls(**model, args=args, **given)

    def train(self, resume=None, *, keywords=None, **settings):
        trainer = self.make(keywords=keywords, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    def checkpoints(self):
        return sorted(path.name for path in self.output.glob("checkpoint-*"))


def logged(trainer):
    timed = ("runtime", "per_second", "flos")
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in timed)}
        for entry in trainer.state.log_history
    ]


def weights(trainer):
    """A number of each trained tensor, as the script's own model holds it."""
    return {name: float(value.detach().abs().sum()) for name, value in trainer.model.named_parameters()}


def reproducible_training(s):
    first, second, other = s.train(), s.train(), s.train(seed=314)
    return weights(first) == weights(second), logged(first), logged(other)


def gradient_accumulation(s):
    whole = s.train(per_device_train_batch_size=6)
    parts = s.train(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    # The same rows in a step, whichever way they are computed.
    for a, b in zip(weights(whole).values(), weights(parts).values(), strict=True):
        assert a == pytest.approx(b, rel=RELATIVE)
    return logged(whole), logged(parts)


def max_steps_and_epochs(s):
    found = {}
    for name, settings in {
        "epochs": {"num_train_epochs": 2},
        "fraction": {"num_train_epochs": 1.5},
        "steps": {"max_steps": 7},
        "short": {"max_steps": 2, "num_train_epochs": 9},
        "accumulated": {"num_train_epochs": 2, "gradient_accumulation_steps": 3},
    }.items():
        state = s.train(**settings).state
        found[name] = (state.global_step, state.max_steps, state.num_train_epochs, state.epoch)
    return found


def learning_rates(s):
    forms = [{"warmup_steps": 2}, {"warmup_steps": 0.5}, {"lr_scheduler_type": "constant"}]
    forms += [{"lr_scheduler_type": "cosine", "warmup_steps": 1}, {"lr_scheduler_type": "polynomial"}]
    forms += [{"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.2}}]
    return [[entry.get("learning_rate") for entry in logged(s.train(**form))] for form in forms]


def optimizer_names(s):
    names = ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"]
    return {name: logged(s.train(optim=name, max_steps=3)) for name in names}


def adam_settings(s):
    settings = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "weight_decay": 0.1, "max_grad_norm": 0.3}
    return logged(s.train(**settings))


def evaluation_strategies(s):
    forms = [{"eval_strategy": "epoch"}, {"eval_strategy": "steps", "eval_steps": 2}, {"eval_on_start": True}]
    forms += [{"eval_strategy": "steps", "eval_steps": 0.5}, {"eval_strategy": "steps", "eval_delay": 3}]
    return [logged(s.train(**form)) for form in forms]


def logging_strategies(s):
    forms = [{"logging_strategy": "no"}, {"logging_strategy": "epoch"}, {"logging_steps": 0.5}]
    forms += [{"logging_steps": 3, "logging_first_step": True}, {"logging_strategy": "steps", "logging_steps": 10}]
    return [logged(s.train(num_train_epochs=2, **form)) for form in forms]


def evaluate(s):
    trainer = s.make(keywords={"compute_metrics": accuracy}, per_device_eval_batch_size=2)
    found = [trainer.evaluate(), trainer.evaluate(rows(3, seed=3), metric_key_prefix="other")]
    return [{k: v for k, v in each.items() if "per_second" not in k and "time" not in k} for each in found]


def accuracy(prediction):
    hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
    return {"accuracy": float(hits.mean())}


def predict(s):
    found = s.make(keywords={"compute_metrics": accuracy}).predict(rows(5, seed=1))
    metrics = {k: v for k, v in found.metrics.items() if "per_second" not in k and "time" not in k}
    return list(found.predictions.shape), float(np.abs(found.predictions).mean()), found.label_ids.tolist(), metrics


def predict_uneven(s):
    """Dynamic padding: predictions and labels of batches of several widths, padded with -100."""
    keywords = {"data_collator": DataCollatorForSeq2Seq(tokenizer())}
    found = s.make(keywords=keywords, per_device_eval_batch_size=2).predict(uneven(5))
    return list(found.predictions.shape), found.label_ids.tolist(), float((found.predictions == -100).mean())


def several_eval_sets(s):
    keywords = {"eval_dataset": {"a": rows(4, seed=4), "b": Dataset.from_list(rows(5, seed=5))}}
    return logged(s.train(keywords=keywords, eval_strategy="epoch"))


def kinds_of_datasets(s):
    class Indexed(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return {key: torch.tensor(value) for key, value in rows()[index].items()}

    class Streamed(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows())

    kinds = [Dataset.from_list(rows()), Dataset.from_list(rows()).with_format("torch"), Indexed(), Streamed()]
    kinds += [IterableDataset.from_generator(lambda: iter(rows()))]
    return [logged(s.train(keywords={"train_dataset": kind}, max_steps=5)) for kind in kinds]


def a_stream_needs_max_steps(s):
    stream = IterableDataset.from_generator(lambda: iter(rows()))
    with pytest.raises(ValueError):
        s.train(keywords={"train_dataset": stream})
    return "ValueError"


def drop_last(s):
    return [logged(s.train(keywords={"train_dataset": rows(11)}, dataloader_drop_last=drop)) for drop in (True, False)]


def unused_columns(s):
    extra = [{**row, "weight": 0.5, "text": "a"} for row in rows()]
    return logged(s.train(keywords={"train_dataset": Dataset.from_list(extra)}))


def data_collators(s):
    made = [default_data_collator, DataCollatorForSeq2Seq(tokenizer(), pad_to_multiple_of=4)]
    made += [DataCollatorForLanguageModeling(tokenizer(), mlm=False)]
    return [logged(s.train(keywords={"data_collator": each})) for each in made]


def sampling(s):
    """By length, in order, and at random."""
    names, collator = ("group_by_length", "sequential", "random"), DataCollatorForSeq2Seq(tokenizer())
    keywords = {"train_dataset": uneven(), "data_collator": collator, "processing_class": tokenizer()}
    return [logged(s.train(keywords=keywords, train_sampling_strategy=name)) for name in names]


def label_smoothing(s):
    return logged(s.train(label_smoothing_factor=0.1, eval_strategy="epoch"))


def input_tokens_seen(s):
    counts = {}
    for kind in ("no", "all", "non_padding"):
        keywords = {"train_dataset": uneven(), "data_collator": DataCollatorForSeq2Seq(tokenizer())}
        trainer = s.train(keywords=keywords, include_num_input_tokens_seen=kind)
        counts[kind] = (trainer.state.num_input_tokens_seen, logged(trainer))
    return counts


def saving(s):
    s.train(num_train_epochs=2, save_strategy="steps", save_steps=3)
    state = json.loads((s.output / "checkpoint-6" / "trainer_state.json").read_text())
    return s.checkpoints(), state["global_step"], state["epoch"], state["max_steps"]


def save_total_limit(s):
    s.train(num_train_epochs=2, save_strategy="steps", save_steps=2, save_total_limit=2)
    return s.checkpoints()


def save_by_epoch(s):
    s.train(num_train_epochs=3, save_strategy="epoch", save_only_model=True)
    return s.checkpoints(), (s.output / "checkpoint-4" / "trainer_state.json").exists()


def best_model_at_end(s):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 1}
    found = []
    for metric, greater in (("loss", None), ("accuracy", True)):
        trainer = s.train(
            keywords={"compute_metrics": accuracy}, num_train_epochs=2, save_strategy="steps", learning_rate=0.02,
            load_best_model_at_end=True, metric_for_best_model=metric, greater_is_better=greater, **settings,
        )  # fmt: skip
        best = Path(trainer.state.best_model_checkpoint).name
        found.append((best, trainer.state.best_metric, weights(trainer), s.checkpoints()))
    return found


def save_strategy_best(s):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "metric_for_best_model": "loss"}
    trainer = s.train(num_train_epochs=2, **settings)
    return s.checkpoints(), trainer.state.best_metric


def early_stopping(s):
    stop = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=10.0)
    trainer = s.train(
        keywords={"callbacks": [stop]}, num_train_epochs=9, eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    return trainer.state.global_step, trainer.state.epoch


def resume(s):
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 1}
    whole = s.train(**settings)
    again = s.train(str(s.output / "checkpoint-3"), **settings)
    latest = s.train(True, **settings)
    for other in (again, latest):
        for a, b in zip(weights(whole).values(), weights(other).values(), strict=True):
            assert a == pytest.approx(b, rel=1e-5)
    return logged(again), latest.state.global_step


def resume_with_another_batch_size(s):
    s.train(max_steps=4, save_strategy="steps", save_steps=2)
    settings = {"per_device_train_batch_size": 2, "max_steps": 6}
    return s.train(str(s.output / "checkpoint-2"), **settings).state.global_step


def resume_from_nothing(s):
    with pytest.raises(Exception, match="checkpoint"):
        s.train(True)
    return "raises"


def callbacks(s):
    seen = []

    class Noting(TrainerCallback):
        pass

    def noting(event):
        return lambda self, args, state, control, **more: seen.append((event, state.global_step)) and None

    events = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    for event in events:
        setattr(Noting, event, noting(event))
    s.train(keywords={"callbacks": [Noting]}, eval_strategy="epoch", save_strategy="epoch")
    return seen


def control_from_a_callback(s):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            control.should_evaluate = state.global_step == 1
            control.should_save = state.global_step == 2
            control.should_training_stop = state.global_step == 3

    trainer = s.train(keywords={"callbacks": [Stop()]}, num_train_epochs=3)
    return logged(trainer), s.checkpoints()


def callback_names(s):
    trainer = s.make(keywords={"callbacks": [EarlyStoppingCallback()]})
    removed = trainer.pop_callback(EarlyStoppingCallback)
    trainer.add_callback(removed)
    trainer.remove_callback(removed)
    return type(removed).__name__, any(isinstance(c, EarlyStoppingCallback) for c in trainer.callback_handler.callbacks)


def batch_sizes(s):
    trainer = s.make(per_device_train_batch_size=3, gradient_accumulation_steps=2, per_device_eval_batch_size=4)
    loader = trainer.get_train_dataloader()
    sizes = [len(batch["input_ids"]) for batch in loader], [len(b["input_ids"]) for b in trainer.get_eval_dataloader()]
    return trainer.args.train_batch_size, trainer.args.eval_batch_size, len(loader), sizes, trainer.num_examples(loader)


def own_names(s):
    trainer = s.make()
    return trainer.label_names, trainer.is_world_process_zero(), trainer.is_local_process_zero()


def trainable_parameters(s):
    trainer = s.make()
    return trainer.get_num_trainable_parameters()


def parameter_groups(s):
    trainer = s.make(weight_decay=0.1)
    return sorted(trainer.get_decay_parameter_names(trainer.model))


def saved_model(s):
    trainer = s.train()
    trainer.save_model(str(s.output / "saved"))
    again = load(s.output / "saved")
    return {name: float(value.detach().abs().sum()) for name, value in again.named_parameters()}


def saved_files(s):
    trainer = s.train(keywords={"processing_class": tokenizer()}, save_strategy="epoch")
    trainer.save_state()
    metrics = {"train_loss": 1.0, "epoch": 1.0}
    trainer.save_metrics("train", metrics)
    needed = {"config.json", "model.safetensors", "tokenizer.json", "training_args.bin", "trainer_state.json"}
    held = set(os.listdir(s.output / "checkpoint-4"))
    return sorted(needed - held), json.loads((s.output / "train_results.json").read_text())


def train_output(s):
    trainer = s.make()
    output = trainer.train()
    keys = sorted(output.metrics)
    return output.global_step, output.training_loss, keys


def train_twice(s):
    trainer = s.train()
    trainer.train()
    return logged(trainer), weights(trainer)


def neftune(s):
    """Noise has a distribution here and there; the model is left as it was."""
    trainer = s.train(neftune_noise_alpha=5.0)
    return trainer.state.global_step, len(logged(trainer)), math.isfinite(logged(trainer)[0]["loss"])


def no_train_dataset(s):
    with pytest.raises((ValueError, HFMLXError)):
        s.train(keywords={"train_dataset": None})
    return "raises"


def eval_strategy_without_rows(s):
    with pytest.raises(ValueError):
        s.make(keywords={"eval_dataset": None}, eval_strategy="epoch")
    return "ValueError"


def nothing_of_the_rows_is_known(s):
    with pytest.raises(ValueError, match="No columns in the dataset match"):
        s.train(keywords={"train_dataset": Dataset.from_list([{"text": "a"}] * 4)})
    return "ValueError"


def gradient_checkpointing(s):
    plain, saved = s.train(), s.train(gradient_checkpointing=True)
    losses = [[entry["loss"] for entry in logged(each) if "loss" in entry] for each in (plain, saved)]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    return logged(saved)


def accumulated_last_window(s):
    return logged(s.train(keywords={"train_dataset": rows(11)}, per_device_train_batch_size=2, num_train_epochs=2,
                          gradient_accumulation_steps=4))  # fmt: skip


def hyperparameter_search(s):
    return s.make(keywords={"model_init": lambda: load(s.folder)}).hyperparameter_search(n_trials=1)


def init_again(s):
    trainer = s.train(keywords={"model_init": lambda: load(s.folder)})
    return trainer.train() and logged(trainer)


CASES = [value for name, value in list(vars().items()) if getattr(value, "__module__", "") == __name__]
CASES = [
    case
    for case in CASES
    if case.__class__.__name__ == "function" and case.__code__.co_varnames[: case.__code__.co_argcount] == ("s",)
]
# With what docs/trainer.md says of them.
REFUSED = {
    "hyperparameter_search": "`hyperparameter_search` called by the script",
    "init_again": "A second `train()` without a checkpoint is refused",
}
# What `make test` runs; `make compat` runs all.
SAMPLE = (
    "gradient_accumulation", "max_steps_and_epochs", "evaluation_strategies", "predict_uneven", "save_total_limit",
    "early_stopping", "callbacks", "batch_sizes", "hyperparameter_search",
)  # fmt: skip


def answer(cls, folder, case):
    with _quiet() as output:
        return case(Script(cls, folder, output))


def assert_same(theirs, ours):
    assert type(theirs) is type(ours)
    if isinstance(theirs, dict):
        assert list(theirs) == list(ours)
        for key in theirs:
            assert_same(theirs[key], ours[key])
    elif isinstance(theirs, (list, tuple)):
        assert len(theirs) == len(ours)
        for a, b in zip(theirs, ours, strict=True):
            assert_same(a, b)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=RELATIVE, abs=1e-7)
    else:
        assert ours == theirs


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case.__name__ in SAMPLE else pytest.mark.wide) for case in CASES],
    ids=lambda case: case.__name__,
)
def test_the_same_answer(folder, case):
    if case.__name__ in REFUSED:
        with pytest.raises(HFMLXError):
            answer(MLXTrainer, folder, case)
        page = Path(__file__).parents[1] / "docs" / "trainer.md"
        assert REFUSED[case.__name__] in page.read_text(encoding="utf-8")
        return
    assert_same(*(answer(cls, folder, case) for cls in (Trainer, MLXTrainer)))


def test_how_many_there_are():
    assert len(CASES) == 48 and set(SAMPLE) | set(REFUSED) <= {case.__name__ for case in CASES}
