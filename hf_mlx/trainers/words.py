"""Errors of what trainers share, in the words of the trainer that raises them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from ..errors import HFMLXError


def in_own_words(method: Callable) -> Callable:
    """A trainer's method whose remedies name the trainer's own class and configuration."""

    @wraps(method)
    def call(self: Any, *args: Any, **keywords: Any) -> Any:
        try:
            return method(self, *args, **keywords)
        except HFMLXError as error:
            recipe = self.recipe
            error.rename({"SFTConfig": recipe.config.name, "MLXSFTTrainer": recipe.name})
            raise

    return call
