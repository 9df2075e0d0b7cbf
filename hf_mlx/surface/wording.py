"""Errors in the words of the script: its trainer and its configuration class, wherever they were raised."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import Any

from ..errors import HFMLXError

# What TrainingArguments has no field for: what is written instead of SFTConfig's.
_LANGUAGE = {
    r"SFTConfig\(router_aux_loss_coef=[^)]*\)": "model.config.output_router_logits = False",
    r"SFTConfig\(max_length=(\w+)[^)]*\)": r"tokenizer(text, truncation=True, max_length=\1)",
    r'SFTConfig\(loss_type="nll"[^)]*\)(, or "dft")?': "compute_loss_func=my_loss",
}
# And of a reward model, whose loss has no other name.
_SCORES = {
    "AutoModelForCausalLM": "AutoModelForSequenceClassification",
    r"trl\.SFTTrainer": "trl.RewardTrainer",
    r'DPOConfig\(loss_type="sigmoid"[^)]*\)': "RewardConfig(center_rewards_coefficient=0.01)",
}


def in_its_words(method: Callable) -> Callable:
    """Decorates a trainer's method: deliberate errors name the class in use."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except HFMLXError as error:
            reword(error, self.recipe.name, self.recipe.config.name)
            raise

    return call


def reword(error: HFMLXError, trainer: str, config: str) -> None:
    """Let ``error`` say ``trainer`` and ``config`` where it says MLXSFTTrainer and SFTConfig."""
    if trainer == "MLXSFTTrainer":
        return
    parts, patterns = [], {"TrainingArguments": _LANGUAGE, "RewardConfig": _SCORES}.get(config, {})
    for part in (error.received, error.required, error.remedy):
        for pattern, words in patterns.items():
            part = re.sub(pattern, words, part)
        parts.append(part.replace("SFTConfig(", f"{config}(").replace("MLXSFTTrainer(", f"{trainer}("))
    error.__init__(*parts)
