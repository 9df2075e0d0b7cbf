"""The score of a reward model: its first values, as ``from_pretrained`` draws them, and its place in an adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..data.generator import TorchGenerator
from ..errors import AdapterError, ModelError
from ..models.config import interpret
from ..models.scoring import HEAD, WEIGHT
from ..settings.plan import LoraPlan
from .start import count_loading_draws

if TYPE_CHECKING:
    from ..models.load import LoadedModel

# ``PreTrainedModel._init_weights`` (transformers 5.23), where the config says nothing else.
_SPREAD = 0.02
SEQ_CLS = "SEQ_CLS"
# What PEFT saves beside an adapter of that task, whichever of the two there is.
SAVED_HEADS = ("classifier", HEAD)
_BLOCK = 16  # values that torch's vectorised normal draws at once


def draw_head(loaded: LoadedModel, seed: int) -> None:
    """Give ``loaded`` the score of ``set_seed(seed); AutoModelForSequenceClassification.from_pretrained(…)``.

    How many draws that took is kept, since an adapter's first values follow them.

    Raises:
        ModelError: Of a width that torch draws otherwise in half precision than in float32.
    """
    model: Any = loaded.model
    shape, dtype = model.score.weight.shape, model.score.weight.dtype
    if dtype != mx.float32 and shape[1] > _BLOCK and shape[1] % _BLOCK:
        name = str(dtype).removeprefix("mlx.core.")
        raise ModelError(
            f"{loaded.path}: a hidden size of {shape[1]} and no {WEIGHT}, to be drawn in {name}",
            f"a first score that is torch's, which is known in {name} for multiples of {_BLOCK}",
            "leave dtype out of model_init_kwargs (bf16=True computes in bfloat16), or hand over the model: "
            "AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, dtype=...)",
        )
    spread = interpret(loaded.config).get("initializer_range") or _SPREAD
    generator = TorchGenerator(seed)
    generator.random(count_loading_draws(loaded))
    model.score.weight = mx.array(generator.normal(shape, std=spread)).astype(dtype)
    loaded.head_draws = _count_draws(shape[1])
    loaded.fresh_head = False


def save_head(loaded: LoadedModel, plan: LoraPlan) -> LoraPlan:
    """``plan`` with the score trained in full, as ``PeftModelForSequenceClassification`` (0.21) has it."""
    names = plan.modules_to_save or ()
    if not loaded.scores or plan.task_type != SEQ_CLS or set(SAVED_HEADS) <= set(names):
        return plan
    return replace(plan, modules_to_save=(*names, *SAVED_HEADS))


def check_task(loaded: LoadedModel, plan: LoraPlan, folder: Path) -> None:
    """Refuse a reward model's adapter on a language model.

    Raises:
        AdapterError: Says where it is loaded.
    """
    if plan.task_type == SEQ_CLS and not loaded.scores:
        raise AdapterError(
            f'{folder}: task_type="{SEQ_CLS}", the adapter of a reward model',
            "an adapter of a language model",
            "AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1), or "
            "MLXRewardTrainer(model=that_model, ...)",
        )


def _count_draws(size: int) -> int:
    """32-bit draws of ``torch.empty(size).normal_()``."""
    if size < _BLOCK:
        return 4 * (-(-size // 2))
    return size + (_BLOCK if size % _BLOCK else 0)
