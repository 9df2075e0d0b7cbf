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
from own_runs import (
    CLOSE_WEIGHTS,
    PLAIN,
    ROWS,
    SETTINGS,
    STEPS,
    Case,
    build,
    largest_difference,
    model_folder,
    ours,
    relative_norm,
    same_log,
    theirs,
)

from hf_mlx import MLXSFTTrainer, MLXTrainer
from hf_mlx.errors import HFMLXError

WEIGHTS = torch.linspace(0.5, 1.5, 320)
SHORT = {"max_steps": 1, "eval_strategy": "no", "gradient_accumulation_steps": 1}


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


LOSSES = {
    "weighted": {"loss": weighted},
    "focal": {"mixin": Focal},
    "smoothed": {"mixin": Smoothed},
    "z-loss": {"mixin": ZLoss},
}
CASES = {
    f"{name}, {'LoRA' if lora else 'full'}, {'by name' if by_name else 'an object'}": Case(
        lora, by_name, settings=PLAIN, **loss
    )
    for name, loss in LOSSES.items()
    for lora, by_name in ((True, True), (False, False))
}
CASES |= {f"{name}, LoRA, AdamW": Case(True, by_name, **loss) for by_name, (name, loss) in enumerate(LOSSES.items(), 1)}
QUICK = ("weighted, LoRA, by name", "z-loss, full, an object")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.wide) for c in CASES])
def test_twenty_steps_are_trls(case):
    a, b = theirs(CASES[case]), ours(CASES[case])
    assert same_log(a.log, b.log) >= 4 * STEPS
    assert (relative_norm if "AdamW" in case else largest_difference)(a, b) <= CLOSE_WEIGHTS


def native(logits: Any, labels: Any, mask: Any) -> Any:
    """:func:`weighted`, for MLX."""
    weights = mx.array(WEIGHTS.numpy())[labels]
    return weights * nn.losses.cross_entropy(logits, labels, reduction="none")


def test_a_loss_for_mlx_is_part_of_the_step():
    a = theirs(CASES["weighted, LoRA, by name"])
    b = ours(Case(True, settings=PLAIN), loss=native)
    assert same_log(a.log, b.log, leave={"eval_loss"}) >= 4 * STEPS
    assert largest_difference(a, b) <= CLOSE_WEIGHTS


@pytest.mark.parametrize(
    ("loss", "more", "words"),
    [
        (lambda logits, labels, mask: logits.sum(), {}, r"one loss for each position"),
        (native, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ("focal", {}, "loss= of type str"),
    ],
)
def test_a_loss_for_mlx_of_another_kind_is_refused(loss, more, words):
    with pytest.raises(HFMLXError, match=words):
        ours(Case(True).asking(**SHORT, **more), loss=loss)


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
def test_transformers_trainer_and_a_column_of_weights(own, tmp_path):
    ids = [pairs.tokenizer()(row["text"])["input_ids"][:24] for row in ROWS]
    rows = [{"input_ids": row, "weight": 0.5 + i % 3} for i, row in enumerate(ids)]
    settings = {**pairs.SILENT, **SETTINGS, **dict(PLAIN), "remove_unused_columns": False}
    settings.pop("max_length")
    made = []
    for house in (transformers.Trainer, MLXTrainer):
        trainer = type(own.__name__, (own, house), {})(
            transformers.AutoModelForCausalLM.from_pretrained(model_folder(), dtype="float32"),
            transformers.TrainingArguments(str(tmp_path / house.__name__), **settings),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:7]),
            data_collator=collate,
        )
        trainer.train()
        made.append(trainer.state.log_history)
    assert same_log(*made, leave={"total_flos"}) >= 3 * STEPS


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
def test_what_touches_more_than_the_logits_is_refused_by_name(own, by_name):
    with pytest.raises(HFMLXError, match=REFUSED[own]):
        ours(Case(True, by_name, mixin=own).asking(**SHORT))


@pytest.mark.filterwarnings("ignore")
def test_a_loss_assigned_on_the_instance_is_seen_and_said_once(tmp_path, caplog):
    trainer = build(MLXSFTTrainer, Case(True).asking(**SHORT), tmp_path)
    trainer.train()
    first = trainer.state.log_history[0]["loss"]
    trainer.compute_loss = lambda model, inputs, return_outputs=False: 3 * model(**inputs).loss
    with caplog.at_level(logging.WARNING):
        assert trainer.evaluate()["eval_loss"] > 2 * first
        trainer.evaluate()
    assert sum("The loss is the script's own" in record.message for record in caplog.records) == 1
    # It takes no num_items_in_batch, as losses of older scripts.
    assert sum("does not take num_items_in_batch" in record.message for record in caplog.records) == 1
