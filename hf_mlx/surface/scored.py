"""Reward models: the object that was handed over, and what ``trainer.model`` is for a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import SettingError
from ..models.bridge import is_torch_model
from ..models.load import LoadedModel
from ..models.scoring import SCORED, score_rows
from .facade import MLXCausalLM
from .forward import CausalLMOutput
from .generation import like, read_ids

_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_NAME = 'AutoModelForSequenceClassification.from_pretrained("owner/name", num_labels=1)'


def check_scored_object(model: Any) -> None:
    """Refuse a torch model that scores something else than one value, or another way than is known here.

    Raises:
        SettingError: With TRL's text for another number of labels.
    """
    if not is_torch_model(model):
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config: Any = getattr(base, "config", None)
    labels = getattr(config, "num_labels", None)
    if config is not None and labels != 1:
        raise SettingError(
            f"The model has `num_labels={labels}`",
            "reward models require `num_labels=1` to output a single scalar reward per sequence",
            _NAME,
        )
    if not is_scored(model):
        raise SettingError(
            f"model of class {type(base).__name__} as a reward model",
            f"a *ForSequenceClassification of one of {', '.join(SCORED)}",
            "trl.RewardTrainer(model=model, ...) on torch",
        )


def is_scored(model: Any) -> bool:
    """Whether ``model``, a torch object, is of a class whose score is known here; a name is, until it is loaded."""
    if not is_torch_model(model):
        return True
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = {f"{stem}ForSequenceClassification" for stem in SCORED.values()}
    return any(cls.__name__ in known for cls in type(base).__mro__)


class MLXSequenceClassifier(MLXCausalLM):
    """The reward model being trained, under the names of a ``*ForSequenceClassification``."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write the adapter for PEFT, or the whole model for transformers; arguments as of a language model's."""
        # By the padding token a loaded model finds the end of a row; the others are the tokenizer's once it trains.
        text = self.config.get_text_config()
        self.loaded.config |= {name: getattr(text, name, None) for name in _TOKENS}
        super().save_pretrained(save_directory, *args, **kwargs)

    def __call__(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> CausalLMOutput:
        """The rewards of rows, without gradients.

        Args:
            input_ids: (B, T) or (T,).
            attention_mask: (B, T), 1 for real tokens, then 0.
            labels: None.

        Returns:
            ``logits`` (B, 1) float32.

        Raises:
            SettingError: Padding that is not on the right, or labels.
        """
        ids = read_ids(input_ids)
        if labels is not None:
            raise SettingError("labels in a reward model's forward", "rows alone", "model(input_ids, attention_mask)")
        if attention_mask is not None and (np.diff(read_ids(attention_mask).astype(int), axis=1) > 0).any():
            raise SettingError(
                "an attention_mask that does not pad on the right", "ones, then zeros", 'padding_side="right"'
            )
        counted = (ids != self.config.get_text_config().pad_token_id) * np.arange(ids.shape[1])
        last = counted.argmax(axis=1).astype(np.int32)
        with self._evaluating():
            rewards = np.array(score_rows(self.mlx, mx.array(ids), mx.array(last)))[:, None]
        return CausalLMOutput(like(input_ids, rewards))

    forward = __call__

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """A reward model does not generate."""
        raise SettingError("generate() of a reward model", "a causal language model", "model(**inputs).logits")


def make_facade(loaded: LoadedModel, *args: Any, **kwargs: Any) -> MLXCausalLM:
    """What ``trainer.model`` is for a model named by a string; arguments as of :class:`MLXCausalLM`."""
    return (MLXSequenceClassifier if loaded.scores else MLXCausalLM)(loaded, *args, **kwargs)
