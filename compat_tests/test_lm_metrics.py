"""What ``compute_metrics`` is called with, and what ``predict`` returns: transformers' own, call by call."""

from itertools import product

import numpy as np
import pytest
from lm_pairs import load, token_rows
from pairs import SILENT, _quiet, assert_same_log, tiny_model, tokenizer, untimed
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding, Trainer, TrainingArguments

from hf_mlx import MLXTrainer
from hf_mlx.errors import DataError

pytestmark = pytest.mark.usefixtures("uncompiled")

RELATIVE = 1e-4
PREPROCESS = {
    "none": None,
    "argmax": lambda logits, labels: logits.argmax(-1),
    "tuple": lambda logits, labels: (logits.argmax(-1), logits.max(-1).values),
    "dict": lambda logits, labels: {"a": logits.argmax(-1), "b": logits[:, 0]},
    "flat": lambda logits, labels: logits.argmax(-1).flatten(),
    "a number": lambda logits, labels: logits.mean(),
    "by labels": lambda logits, labels: logits if labels is None else logits.gather(2, labels.clamp(0)[..., None]),
}
FORMS = {
    "at the end": {},
    "by batch": {"batch_eval_metrics": True},
    "inputs and losses": {"include_for_metrics": ["inputs", "loss"]},
    "by batch, inputs and losses": {"batch_eval_metrics": True, "include_for_metrics": ["inputs", "loss"]},
    "lists": {"eval_do_concat_batches": False, "include_for_metrics": ["loss", "inputs"]},
    "moved often": {"eval_accumulation_steps": 1},
    "loss only": {"prediction_loss_only": True},
    "without the last batch": {"dataloader_drop_last": True, "batch_eval_metrics": True},
}
ALL = list(product(PREPROCESS, FORMS, (True, False)))
SAMPLE = ALL[::9]


def summary(value):
    """Kind, dtype, shape and sum of every array in a structure."""
    if value is None or isinstance(value, bool):
        return value
    if hasattr(value, "items"):
        return {key: summary(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *(summary(part) for part in value)]
    array = value.numpy() if hasattr(value, "numpy") else value
    total = float(np.asarray(array, np.float64).sum())
    return [type(value).__name__, str(array.dtype), tuple(array.shape), pytest.approx(total, rel=RELATIVE, abs=1e-3)]


def run(cls, folder, form, preprocess, labelled):
    calls = []

    def metrics(prediction, compute_result=None):
        parts = (prediction.predictions, prediction.label_ids, prediction.inputs, prediction.losses)
        calls.append([*map(summary, parts), compute_result])
        return {"calls": len(calls), "number": np.float32(3.0)}

    collate = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    if not labelled:
        collate = DataCollatorWithPadding(tokenizer())
    with _quiet() as output:
        args = TrainingArguments(output, **SILENT, per_device_eval_batch_size=4, **form)
        options = {"preprocess_logits_for_metrics": preprocess, "compute_metrics": metrics}
        trainer = cls(load(folder), args, data_collator=collate, eval_dataset=token_rows(9), **options)
        evaluated = trainer.evaluate()
        predicted = trainer.predict(token_rows(9, seed=2))
    returned = [summary(predicted.predictions), summary(predicted.label_ids)]
    return calls, returned, untimed([evaluated, predicted.metrics])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


def check(folder, preprocess, form, labelled):
    found = [run(cls, folder, FORMS[form], PREPROCESS[preprocess], labelled) for cls in (Trainer, MLXTrainer)]
    (calls, returned, logs), (our_calls, our_returned, our_logs) = found
    assert our_calls == calls
    assert our_returned == returned
    assert_same_log(logs, our_logs, relative=RELATIVE)
    return len(calls)


@pytest.mark.parametrize(("preprocess", "form", "labelled"), SAMPLE)
def test_sample(folder, preprocess, form, labelled):
    check(folder, preprocess, form, labelled)


@pytest.mark.wide
@pytest.mark.parametrize(("preprocess", "form", "labelled"), [case for case in ALL if case not in SAMPLE])
def test_all(folder, preprocess, form, labelled):
    check(folder, preprocess, form, labelled)


def test_the_sample_holds_each_kind():
    assert len(SAMPLE) == 13
    assert {case[0] for case in SAMPLE} == set(PREPROCESS)
    assert {case[1] for case in SAMPLE} == set(FORMS)


def test_rows_without_labels_are_not_trained_on(folder):
    """transformers' text."""
    with (
        _quiet() as output,
        pytest.raises(DataError, match="did not return a loss from the inputs, only the following"),
    ):
        args = TrainingArguments(output, **SILENT, max_steps=1)
        MLXTrainer(
            load(folder), args, data_collator=DataCollatorWithPadding(tokenizer()), train_dataset=token_rows(9)
        ).train()
