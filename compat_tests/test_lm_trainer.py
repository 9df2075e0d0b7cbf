"""MLXTrainer beside transformers.Trainer in fp32: every logged value and its order, for each kind of rows."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from forked_scripts import run_forked
from lm_pairs import load, run, run_both, token_rows
from pairs import assert_same_log, text_rows, tiny_model, tokenizer, untimed
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_mlx import MLXTrainer
from hf_mlx.errors import DataError, SettingError

# The promise of the library in fp32.
RELATIVE = 1e-4
SETTINGS = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "seed": 3,
}


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {key: torch.tensor(value) for key, value in self.rows[index].items()}


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def labelled(rows):
    return [{**row, "labels": list(row["input_ids"])} for row in rows]


def padded(rows=11, side="right", scored=True):
    """Rows of 24 tokens; labels are copied, padding included, as scripts do."""
    made = tokenizer()
    made.padding_side = side
    try:
        found = token_rows(rows, padding="max_length", max_length=24, truncation=True)
    finally:
        made.padding_side = "right"
    return labelled(found)


def holed(rows=11):
    pick = np.random.default_rng(0)
    out = []
    for row in padded(rows):
        mask = (pick.random(24) > 0.4).astype(int)
        mask[: pick.integers(0, 4)] = 0
        out.append({**row, "attention_mask": mask.tolist()})
    return out


def collator(**options):
    return DataCollatorForLanguageModeling(tokenizer(), mlm=False, **options)


def left():
    made = DataCollatorForLanguageModeling(tokenizer(), mlm=False)

    def collate(rows):
        tokenizer().padding_side = "left"
        try:
            return made(rows)
        finally:
            tokenizer().padding_side = "right"

    return collate


KINDS = {
    "language modeling": lambda: {"train_dataset": Dataset.from_list(token_rows(11)), "data_collator": collator()},
    "list of rows": lambda: {"train_dataset": token_rows(11), "data_collator": collator(pad_to_multiple_of=8)},
    "torch format": lambda: {
        "train_dataset": Dataset.from_list(token_rows(11)).with_format("torch"),
        "data_collator": collator(),
    },
    "other columns": lambda: {
        "train_dataset": Dataset.from_list([{**row, "text": "x", "n": 1} for row in token_rows(11)]),
        "data_collator": collator(),
    },
    "torch dataset": lambda: {"train_dataset": Rows(padded()), "data_collator": default_data_collator},
    "no collator": lambda: {"train_dataset": Dataset.from_list(padded())},
    "seq2seq collator": lambda: {
        "train_dataset": Dataset.from_list(labelled(token_rows(11))),
        "data_collator": DataCollatorForSeq2Seq(tokenizer(), padding=True),
    },
    "padding collator": lambda: {"train_dataset": padded(), "data_collator": DataCollatorWithPadding(tokenizer())},
    "processing class": lambda: {"train_dataset": padded(), "processing_class": tokenizer()},
    "scored padding": lambda: {"train_dataset": Dataset.from_list(padded())},
    "left padding": lambda: {"train_dataset": Dataset.from_list(token_rows(11)), "data_collator": left()},
    "scored left padding": lambda: {"train_dataset": Dataset.from_list(padded(side="left"))},
    "masks with holes": lambda: {"train_dataset": Dataset.from_list(holed())},
    "no mask": lambda: {
        "train_dataset": [{k: row[k] for k in ("input_ids", "labels")} for row in padded()],
    },
    "flattening": lambda: {"train_dataset": token_rows(11), "data_collator": DataCollatorWithFlattening()},
    "stream": lambda: {
        "train_dataset": IterableDataset.from_generator(lambda: iter(token_rows(40))),
        "data_collator": collator(),
    },
    "torch stream": lambda: {"train_dataset": Stream(token_rows(40)), "data_collator": collator()},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("llama"))


WIDE = pytest.mark.wide


def compare(folder, settings, keywords, lora=None, **options):
    (theirs, their), (ours, our) = run_both(lambda: load(folder, lora, **options), settings, keywords)
    assert_same_log(untimed(theirs), untimed(ours), relative=RELATIVE)
    return their, our


# The others run with `make compat`.
SAMPLE = ("language modeling", "scored padding", "masks with holes", "torch stream")


@pytest.mark.parametrize("kind", [kind if kind in SAMPLE else pytest.param(kind, marks=WIDE) for kind in KINDS])
def test_each_kind_of_rows(folder, kind):
    stream = {"max_steps": 4} if "stream" in kind else {}
    _, ours = compare(folder, SETTINGS | stream, KINDS[kind])
    assert len(ours.state.log_history) == 5


def test_kinds_were_seen():
    assert len(KINDS) == 17


def clm_script(tmp_path, name, command, *more):
    """The log and the metrics of a call of the script, and what it printed."""
    script, folder = Path(__file__).parent / "scripts" / "clm_script.py", tmp_path / name
    words = [*command, script, "--model_name_or_path", tmp_path / "model", "--train_file", tmp_path / "rows.jsonl"]
    options = [
        *("--do_train", "--do_eval", "--use_cpu", "--report_to", "none", "--logging_steps", "1", "--save_steps", "2"),
        *("--eval_strategy", "steps", "--eval_steps", "2", "--learning_rate", "1e-3", "--output_dir", folder, *more),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"),
        *("--per_device_eval_batch_size", "2"),
    ]
    done = run_forked([*words, *options])
    assert "runs on torch" not in done.stderr
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    kept = json.loads((folder / "all_results.json").read_text())
    return untimed(log), untimed([kept]), done.stdout.splitlines()[-1]


RUNS = {"hf": [], "mlx": ["-m", "hf_mlx.cli.main", "run"]}


def test_a_script_of_run_clms_shape_under_hf_mlx_run(tmp_path):
    tiny_model("llama", tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in text_rows(40)))
    theirs, ours = (clm_script(tmp_path, name, command, "--max_steps", "4") for name, command in RUNS.items())
    assert_same_log(theirs[0], ours[0], relative=RELATIVE)
    assert_same_log(theirs[1], ours[1], relative=RELATIVE)
    assert {"eval_accuracy", "perplexity", "train_samples", "train_loss"} <= ours[1][0].keys()
    assert ours[2] == theirs[2] == "Trainer went on from None"
    assert len(ours[0]) == 7


@pytest.mark.wide
def test_the_script_goes_on_from_its_last_checkpoint(tmp_path):
    """Each from its own, and each from the other's."""
    tiny_model("llama", tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in text_rows(60)))
    logs = {}
    for first, second in (("hf", "hf"), ("hf", "mlx"), ("mlx", "mlx"), ("mlx", "hf")):
        folder = f"{first}-{second}"
        clm_script(tmp_path, folder, RUNS[first], "--max_steps", "6", "--lr_scheduler_type", "constant")
        for name in ("checkpoint-6", "trainer_state.json", "all_results.json"):
            gone = tmp_path / folder / name
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        made = clm_script(tmp_path, folder, RUNS[second], "--max_steps", "6", "--lr_scheduler_type", "constant")
        assert made[2] == "Trainer went on from checkpoint-4"
        logs[folder] = [dict(sorted(entry.items())) for entry in made[0]]
    for log in logs.values():
        assert_same_log(logs["hf-hf"], log, relative=RELATIVE)
        assert len(log) == 10


def test_other_models_are_refused_by_name():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    model = BertForSequenceClassification(config)
    with pytest.raises(SettingError, match="BertForSequenceClassification"):
        MLXTrainer(model)
    with pytest.raises(SettingError, match="requires either a `model` or `model_init`"):
        MLXTrainer()


def test_eager_attention_has_other_numbers_where_nothing_is_seen(folder):
    with pytest.raises(DataError, match="attn_implementation='sdpa'"):
        run(MLXTrainer, load(folder, attn_implementation="eager"), SETTINGS, **KINDS["scored left padding"]())


def test_model_init_evaluation_and_prediction(folder, tmp_path):
    """Without a tokenizer; metrics see transformers' logits, padding included."""

    def metrics(prediction):
        return {"sum": float(np.abs(prediction.predictions).sum()), "labels": int((prediction.label_ids > 0).sum())}

    found = []
    for cls in (Trainer, MLXTrainer):
        args = TrainingArguments(str(tmp_path / cls.__name__), use_cpu=True, report_to="none", disable_tqdm=True)
        trainer = cls(
            args=args, model_init=lambda: load(folder), data_collator=collator(), compute_metrics=metrics,
            eval_dataset=Dataset.from_list(token_rows(9)),
        )  # fmt: skip
        result = trainer.predict(Dataset.from_list(token_rows(5)))
        trainer.save_model()
        found.append((trainer.evaluate(), result))
    (theirs, a), (ours, b) = found
    assert_same_log(untimed([theirs]), untimed([ours]), relative=RELATIVE)
    np.testing.assert_allclose(a.predictions, b.predictions, atol=1e-4)
    assert load(tmp_path / "MLXTrainer").num_parameters() > 0


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_a_run_goes_on_from_the_others_checkpoint(folder, tmp_path, first):
    classes = (Trainer, MLXTrainer) if first == "theirs" else (MLXTrainer, Trainer)
    logs = []
    for cls, resume in ((classes[0], None), (classes[1], str(tmp_path / "checkpoint-2"))):
        args = TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, logging_steps=1, learning_rate=1e-3, use_cpu=True,
            per_device_train_batch_size=2, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = cls(load(folder), args, data_collator=collator(), train_dataset=token_rows(11))
        trainer.train(resume_from_checkpoint=resume)
        logs.append([entry for entry in untimed(trainer.state.log_history) if "loss" in entry])
    # A checkpoint's history is read back with its keys sorted, by transformers too.
    logs[0] = [dict(sorted(entry.items())) for entry in logs[0][:2]] + logs[0][2:]
    assert_same_log(*logs, relative=RELATIVE)
    assert len(logs[1]) == 4
