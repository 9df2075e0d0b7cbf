"""A loss of the script's own, in torch: 20 steps beside trl's, every logged value."""

from __future__ import annotations

import logging
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pairs
import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer, MLXTrainer
from hf_mlx.errors import HFMLXError

STEPS = 20
# float32 rounds at 6e-8; twenty steps at this rate carry it no further.
CLOSE = 1e-5
ROWS = pairs.text_rows(40)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 3,
    "gradient_accumulation_steps": 3,
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "max_length": 24,
    "eval_strategy": "steps",
    "eval_steps": 10,
}
WEIGHTS = torch.linspace(0.5, 1.5, 320)


def shifted(logits: Any, labels: Any) -> tuple[Any, Any]:
    return logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()


def weighted(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    logits, targets = shifted(outputs.logits, labels)
    losses = F.cross_entropy(logits, targets, weight=WEIGHTS[: logits.shape[-1]], ignore_index=-100, reduction="sum")
    return losses / (num_items_in_batch if num_items_in_batch is not None else (targets != -100).sum())


def focal(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    logits, targets = shifted(outputs.logits, labels)
    losses = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    return ((1 - torch.exp(-losses)) ** 2 * losses).sum() / (targets != -100).sum()


class Focal:
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = focal(outputs, labels)
        return (loss, outputs) if return_outputs else loss


class Smoothed:
    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        outputs = model(**inputs)
        logits, targets = shifted(outputs.logits, inputs["labels"])
        smooth = F.cross_entropy(logits, targets, ignore_index=-100, label_smoothing=0.1)
        loss = 0.5 * outputs.loss + 0.5 * smooth
        return (loss, outputs) if return_outputs else loss


class ZLoss:
    """trl's loss, its metrics, one of the script's own, and a term over all positions, padding included."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        loss, _ = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        outputs = model(**inputs)
        z = outputs.logits.float().logsumexp(-1).pow(2).mean()
        self._metrics["train" if self.model.training else "eval"]["z"].append(z.item())
        loss = loss + 1e-2 * z
        return (loss, outputs) if return_outputs else loss


def run(
    house: type, model: Any, folder: Any, own: Any, *, lora: bool, by_name: bool = True, loss: Any = None, **more: Any
) -> Any:
    """A trained trainer of ``house`` with ``own``: a mixin, or a ``compute_loss_func``."""
    settings = {**pairs.SILENT, **SETTINGS, **more}
    cls, keywords = house, {}
    if isinstance(own, type):
        cls = type(own.__name__, (own, house), {})
    elif own is not None:
        keywords["compute_loss_func"] = own
    if loss is not None:
        keywords["loss"] = loss
    model = str(model) if by_name else transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    trainer = cls(
        model,
        SFTConfig(output_dir=str(folder / house.__name__), **settings),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:7]),
        processing_class=pairs.tokenizer(),
        peft_config=LoraConfig(**LORA) if lora else None,
        **keywords,
    )
    trainer.train()
    return trainer


def same(theirs: Any, ours: Any, *, close: float = CLOSE, leave: Any = ()) -> int:
    """Values that two logs share, key by key."""
    compared = 0
    pairs_of = list(zip(theirs.state.log_history, ours.state.log_history, strict=True))
    for a, b in pairs_of:
        a, b = pairs._timeless(a), pairs._timeless(b)
        assert list(a) == list(b), (a, b)
        for key, value in a.items():
            if key == "total_flos" or key in leave:
                continue
            assert abs(value - b[key]) <= close * max(abs(value), 1.0), (key, a, b)
            compared += 1
    return compared


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pairs.tiny_model("llama", tmp_path_factory.mktemp("own") / "base", hidden_size=32, intermediate_size=48)


CASES = {
    "weighted, a function, LoRA": (weighted, True, True),
    "weighted, a function, full, an object": (weighted, False, False),
    "focal, full": (Focal, False, True),
    "focal, LoRA on an object": (Focal, True, False),
    "smoothed, LoRA": (Smoothed, True, True),
    "z-loss, LoRA": (ZLoss, True, True),
    "z-loss, full, an object": (ZLoss, False, False),
}

QUICK = ("focal, LoRA on an object", "z-loss, full, an object")


def run_case(house: type, model: Any, folder: Any, case: str) -> Any:
    own, lora, by_name = CASES[case]
    return run(house, model, folder, own, lora=lora, by_name=by_name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.wide) for case in CASES]
)
def test_twenty_steps_are_trls(case, model, tmp_path):
    theirs, ours = (run_case(house, model, tmp_path, case) for house in (SFTTrainer, MLXSFTTrainer))
    assert same(theirs, ours) >= 4 * STEPS


def native(logits: Any, labels: Any, mask: Any) -> Any:
    """:func:`weighted`, for MLX."""
    weights = mx.array(WEIGHTS.numpy())[labels]
    return weights * nn.losses.cross_entropy(logits, labels, reduction="none")


@pytest.mark.filterwarnings("ignore")
def test_a_loss_for_mlx_is_part_of_the_step(model, tmp_path):
    theirs = run(SFTTrainer, model, tmp_path, weighted, lora=True)
    ours = run(MLXSFTTrainer, model, tmp_path, None, lora=True, loss=native)
    compared = same(theirs, ours, leave={"eval_loss"})
    assert compared >= 4 * STEPS


@pytest.mark.parametrize(
    ("loss", "more", "words"),
    [
        (lambda logits, labels, mask: logits.sum(), {}, r"one loss for each position"),
        (native, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ("focal", {}, "loss= of type str"),
    ],
)
def test_a_loss_for_mlx_of_another_kind_is_refused(loss, more, words, model, tmp_path):
    with pytest.raises(HFMLXError, match=words):
        run(MLXSFTTrainer, model, tmp_path, None, lora=True, loss=loss, max_steps=1, eval_strategy="no", **more)


class Sampled:
    """Rows that weigh by a column of their own, in ``transformers.Trainer``."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        weights = inputs.pop("weight")
        outputs = model(**inputs)
        labels = inputs["labels"]
        losses = F.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        loss = (losses.sum(1) / (labels[:, 1:] != -100).sum(1) * weights).mean()
        return (loss, outputs) if return_outputs else loss


class Penalised:
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        inputs.pop("weight")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + 0.1 * outputs.logits.float().pow(2).mean()
        return (loss, outputs) if return_outputs else loss


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    batch = {"input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=2)}
    batch["attention_mask"] = (batch["input_ids"] != 2).long()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {**batch, "weight": torch.tensor([row["weight"] for row in rows])}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("own", [Sampled, Penalised])
def test_transformers_trainer_and_a_column_of_weights(own, model, tmp_path):
    ids = [pairs.tokenizer()(row["text"])["input_ids"][:24] for row in ROWS]
    rows = [{"input_ids": row, "weight": 0.5 + i % 3} for i, row in enumerate(ids)]
    settings = {**pairs.SILENT, **SETTINGS, "remove_unused_columns": False}
    settings.pop("max_length")
    made = []
    for house in (transformers.Trainer, MLXTrainer):
        trainer = type(own.__name__, (own, house), {})(
            transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
            transformers.TrainingArguments(str(tmp_path / house.__name__), **settings),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:7]),
            data_collator=collate,
        )
        trainer.train()
        made.append(trainer)
    assert same(*made) >= 3 * STEPS


class Hidden:
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        return model(**inputs, output_hidden_states=True).loss


class Layers:
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        return model.get_input_embeddings()(inputs["input_ids"]).mean()


class Decay:
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        return model(**inputs).loss + sum(p.pow(2).sum() for p in self.model.parameters() if p.requires_grad)


class Other:
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        return model(inputs["input_ids"].flip(0), labels=inputs["labels"]).loss


class Constant:
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        return model(**inputs).loss.detach()


REFUSED = {
    Hidden: "output_hidden_states",
    Layers: r"model\.get_input_embeddings",
    Decay: "depends on .*weight",
    Other: "input_ids=…",
    Constant: "does not depend on the logits",
}


@pytest.mark.parametrize("own", REFUSED)
@pytest.mark.parametrize("by_name", [True, False])
def test_what_touches_more_than_the_logits_is_refused_by_name(own, by_name, model, tmp_path):
    more = {"max_steps": 1, "eval_strategy": "no", "gradient_accumulation_steps": 1}
    with pytest.raises(HFMLXError, match=REFUSED[own]):
        run(MLXSFTTrainer, model, tmp_path, own, lora=True, by_name=by_name, **more)


@pytest.mark.filterwarnings("ignore")
def test_a_loss_assigned_on_the_instance_is_seen_and_said_once(model, tmp_path, caplog):
    trainer = run(MLXSFTTrainer, model, tmp_path, None, lora=True, max_steps=1, eval_strategy="no")
    first = trainer.state.log_history[0]["loss"]
    trainer.compute_loss = lambda model, inputs, return_outputs=False: 3 * model(**inputs).loss
    with caplog.at_level(logging.WARNING):
        assert trainer.evaluate()["eval_loss"] > 2 * first
        trainer.evaluate()
    assert sum("The loss is the script's own" in record.message for record in caplog.records) == 1
    # It takes no num_items_in_batch, as losses of older scripts.
    assert sum("does not take num_items_in_batch" in record.message for record in caplog.records) == 1
