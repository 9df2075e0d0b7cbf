"""A loss of the script's own, in torch: 20 steps beside trl's, every logged value."""

from __future__ import annotations

from typing import Any

import pairs
import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer

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


def run(house: type, model: Any, folder: Any, own: Any, *, lora: bool, by_name: bool = True, **more: Any) -> Any:
    """A trained trainer of ``house`` with ``own``: a mixin, or a ``compute_loss_func``."""
    settings = {**pairs.SILENT, **SETTINGS, **more}
    cls, keywords = house, {}
    if isinstance(own, type):
        cls = type(own.__name__, (own, house), {})
    else:
        keywords["compute_loss_func"] = own
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


def same(theirs: Any, ours: Any, *, close: float = CLOSE) -> int:
    """Values that two logs share, key by key."""
    compared = 0
    pairs_of = list(zip(theirs.state.log_history, ours.state.log_history, strict=True))
    for a, b in pairs_of:
        a, b = pairs._timeless(a), pairs._timeless(b)
        assert list(a) == list(b), (a, b)
        for key, value in a.items():
            if key in ("total_flos",):
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


def run_case(house: type, model: Any, folder: Any, case: str) -> Any:
    own, lora, by_name = CASES[case]
    return run(house, model, folder, own, lora=lora, by_name=by_name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_are_trls(case, model, tmp_path):
    theirs, ours = (run_case(house, model, tmp_path, case) for house in (SFTTrainer, MLXSFTTrainer))
    assert same(theirs, ours) >= 4 * STEPS
