"""Whether mlx-lm's own loader computes with an exported folder what the model here computes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..errors import AdapterError
from .adapter import Adapter

if TYPE_CHECKING:
    import mlx.nn as nn

# Largest difference over the largest logit: sums in another order in fp32, and a rounding a layer in half precision.
_TOLERANCE = {"float32": 1e-4, "half": 5e-2}


def check_in_mlx_lm(adapter: Adapter, folder: Path) -> float:
    """Load base and adapter with mlx-lm and compare logits on two rows of 24 tokens.

    mlx-lm reads some configs otherwise than transformers does (rotary bases, sliding windows, softcaps), which no
    adapter can make up for. The base is loaded a second time for this.

    Returns:
        The largest difference over the largest logit.

    Raises:
        AdapterError: mlx-lm cannot load it, or computes something else.
    """
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    path = adapter.loaded.path
    try:
        theirs, _ = load_model(path)
        load_adapters(theirs, str(folder))
    except Exception as error:
        # Whatever its loader raises, the folder would be of no use.
        raise AdapterError(
            f"base {path}, which mlx-lm does not load with this adapter: {type(error).__name__}: {error}",
            "a base and targets that mlx-lm has",
            "keep PEFT's format: hf-mlx export ADAPTER OUTPUT",
        ) from error
    vocabulary = int(adapter.loaded.config.get("vocab_size") or 100)
    ids = mx.array((np.arange(48) * 7919 % vocabulary).reshape(2, 24).astype(np.int32))
    ours, other = _logits(adapter.loaded.model, ids), _logits(theirs, ids)
    if ours.shape != other.shape:
        difference = float("inf")
    else:
        difference = float(np.abs(ours - other).max() / max(float(np.abs(ours).max()), 1e-30))
    if not difference <= _TOLERANCE[_precision(adapter.loaded.model, theirs)]:
        raise AdapterError(
            f"base {path}: mlx-lm's logits with this adapter differ from ours by {difference:.1%} of the largest",
            "a base whose config.json mlx-lm reads as transformers does (rope_theta beside the layers' sizes, no "
            "sliding window or softcap that it ignores), in the weights that were trained on",
            "keep PEFT's format, which transformers reads: hf-mlx export ADAPTER OUTPUT; or name the base that the "
            "adapter was trained on: --base OWNER/MODEL",
        )
    return difference


def _logits(model: nn.Module, ids: mx.array) -> np.ndarray:
    was_training = model.training
    model.eval()
    try:
        out: Any = model(ids)
        return np.array(out.astype(mx.float32))
    finally:
        model.train(was_training)


def _precision(*models: nn.Module) -> str:
    arrays: list[Any] = [value for model in models for _, value in tree_flatten(model.parameters())]
    return "half" if any(value.dtype in (mx.float16, mx.bfloat16) for value in arrays) else "float32"
