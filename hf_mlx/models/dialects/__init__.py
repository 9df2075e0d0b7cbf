"""What each model type's config needs beyond the generic un-nesting: HF key → the key mlx-lm reads.

Each function takes a config that :func:`hf_mlx.models.config.unnest_rope` has flattened, edits it and
returns it. The HF side is transformers 5.23's configuration class of the same type, the MLX side
``ModelArgs`` in mlx-lm 0.32.
"""

from __future__ import annotations

from . import dense, mixtures, multimodal
from .contract import DIALECTS

__all__ = ["DIALECTS", "dense", "mixtures", "multimodal"]
