"""A score in the place of the vocabulary head: transformers' ``*ForSequenceClassification`` with one label.

Its classes (``GenericForSequenceClassification``, transformers 5.23) put ``score``, a Linear without bias, on the
hidden state of each row's last token that is not the padding token.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ModelError
from .weights import Checkpoint

Config = dict[str, Any]

#: Where the score is, in MLX as in transformers.
HEAD = "score"
WEIGHT = f"{HEAD}.weight"
#: model type → what the name of its class begins with. The tests compare rewards and their training with transformers.
SCORED: Mapping[str, str] = {
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "exaone4": "Exaone4",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
    "glm": "Glm",
    "glm4": "Glm4",
    "gpt_oss": "GptOss",
    "helium": "Helium",
    "hunyuan_v1_dense": "HunYuanDenseV1",
    "jamba": "Jamba",
    "llama": "Llama",
    "minicpm3": "MiniCPM3",
    "ministral3": "Ministral3",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "nemotron": "Nemotron",
    "olmo": "Olmo",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "phi": "Phi",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2Moe",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
    "qwen3_next": "Qwen3Next",
    "seed_oss": "SeedOss",
    "smollm3": "SmolLM3",
    "stablelm": "StableLm",
    "starcoder2": "Starcoder2",
}
_TORCH = "trl.RewardTrainer on torch"


def check_scored(config: Config, folder: Path) -> None:
    """Refuse a model that cannot be given a score here.

    Raises:
        ModelError: Another model type, or weights that are quantised.
    """
    if config["model_type"] not in SCORED:
        raise ModelError(
            f"{folder}: model type {config['model_type']!r} as a reward model",
            f"a type whose score has been compared with transformers': {', '.join(SCORED)}",
            f"train it with {_TORCH}",
        )
    if config.get("quantization") or config.get("quantization_config"):
        raise ModelError(
            f"{folder}, which is quantised, as a reward model",
            "weights in floating point",
            "MLXRewardTrainer(model=...) with the original model",
        )


def check_head(checkpoint: Checkpoint, folder: Path, *, scores: bool) -> bool:
    """Whether a score is to be drawn, because the files hold none.

    Raises:
        ModelError: They hold one for several labels, or one that a language model has no place for.
    """
    stored = checkpoint.tensors.get(WEIGHT)
    if not scores:
        if stored is not None:
            raise ModelError(
                f"{folder}, a reward model or classifier: it holds {WEIGHT}",
                "a causal language model",
                "MLXRewardTrainer(model=folder), or the model that it was trained from",
            )
        return False
    if stored is not None and stored.shape[0] != 1:
        raise ModelError(
            f"{folder}: {WEIGHT} of shape {stored.shape}, which is num_labels={stored.shape[0]}",
            "`num_labels=1` to output a single scalar reward per sequence (TRL raises too)",
            "a base without a score, or AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)",
        )
    return stored is None


def scored_config(config: Config) -> Config:
    """``config`` as ``AutoModelForSequenceClassification.from_pretrained(…, num_labels=1)`` saves it."""
    made = config | {"architectures": [f"{SCORED[config['model_type']]}ForSequenceClassification"]}
    if len(config.get("id2label") or ()) != 1:
        made |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return made


@cache
def scored_class(base: type[Any]) -> type[Any]:
    """A subclass of mlx-lm's that gives a score for each position, (B, T, 1), in the place of logits."""

    class Scored(base):
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            self.pop("lm_head", None)
            self.score = nn.Linear(args.hidden_size, 1, bias=False)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            if hasattr(base, "sanitize"):
                # Where none is stored some take the head away, which is gone already.
                weights = super().sanitize({"lm_head.weight": mx.zeros(1)} | weights)
            weights = {name: value for name, value in weights.items() if not name.startswith("lm_head.")}
            # In the dtype of the rest, until it is drawn.
            dtype = next(iter(weights.values())).dtype
            weights.setdefault(WEIGHT, mx.zeros(self.score.weight.shape, dtype))
            return weights

        def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
            return self.score(self.model(inputs, cache=cache))

    Scored.__name__ = f"Scored{base.__name__}"
    return Scored


def score_rows(model: Any, input_ids: mx.array, last: mx.array, cache: Any = None) -> mx.array:
    """The score of each row, (R,) float32.

    Args:
        model: Of a :func:`scored_class`, adapters included.
        input_ids: (R, W) int32, padded on the right.
        last: (R,) int32, the position that is read.
        cache: Of :func:`~hf_mlx.models.masks.row_cache`.
    """
    hidden = model.model(input_ids, cache=cache)
    read = mx.take_along_axis(hidden, last[:, None, None], axis=1)
    return model.score(read)[:, 0, 0].astype(mx.float32)
