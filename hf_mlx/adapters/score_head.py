"""The first values of a score that the base does not hold: torch's, drawn as ``from_pretrained`` draws them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..data.generator import TorchGenerator
from ..models.config import interpret

if TYPE_CHECKING:
    from ..models.load import LoadedModel

# ``PreTrainedModel._init_weights`` (transformers 5.23), where the config says nothing else.
_SPREAD = 0.02
_BLOCK = 16  # values that torch's vectorised normal draws at once


def draw_head(loaded: LoadedModel, seed: int) -> None:
    """Give ``loaded`` the score of ``set_seed(seed); AutoModelForSequenceClassification.from_pretrained(…)``.

    How many draws that took is kept, since an adapter's first values follow them.
    """
    model: Any = loaded.model
    shape = model.score.weight.shape
    spread = interpret(loaded.config).get("initializer_range") or _SPREAD
    model.score.weight = mx.array(TorchGenerator(seed).normal(shape, std=spread))
    loaded.head_draws = _count_draws(shape[1])
    loaded.fresh_head = False


def _count_draws(size: int) -> int:
    """32-bit draws of ``torch.empty(size).normal_()``."""
    if size < _BLOCK:
        return 4 * (-(-size // 2))
    return size + (_BLOCK if size % _BLOCK else 0)
