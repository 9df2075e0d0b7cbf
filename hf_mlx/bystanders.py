"""Trainers that ``hf-mlx run`` leaves to torch: each is named when it is built, and again where none was MLX's."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from .errors import SettingError

_UPSTREAM = ("trl", "transformers")


class Bystanders:
    """Watches which trainers a script builds.

    Args:
        say: Prints a line to standard error.
        strict: Refuse what torch would train.

    Attributes:
        names: Upstream's classes that were built, in this order.
        trained: Whether a trainer of this library was built.
    """

    def __init__(self, say: Callable[[str], None], *, strict: bool) -> None:
        self.names: list[str] = []
        self.trained = False
        self._say = say
        self._strict = strict
        self._lock = threading.Lock()

    def watch(self, module: Any) -> None:
        """Look at every ``transformers.Trainer`` of this process: all of trl's and of a script's derive from it.

        Args:
            module: ``transformers.trainer``.
        """
        # A stand-in may be in its place already.
        Trainer = getattr(module.Trainer, "upstream", module.Trainer)
        original: Callable = Trainer.__init__
        meet = self._meet

        @functools.wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            meet(type(self))
            original(self, *args, **kwargs)

        Trainer.__init__ = __init__

    def end(self) -> bool:
        """Say at the script's end that MLX trained nothing, where that is so.

        Returns:
            Whether that fails the run, which it does when ``strict``.
        """
        if self.trained:
            return False
        ran = f"{', '.join(self.names)} ran on torch" if self.names else "the script built no trainer at all"
        self._say(f"hf-mlx run: nothing was trained by MLX: {ran}")
        return self._strict

    def _meet(self, cls: type) -> None:
        name = upstream_name(cls)
        if self._strict:
            raise SettingError(
                f"{name} under hf-mlx run --strict",
                "trl.SFTTrainer, trl.DPOTrainer, trl.RewardTrainer, or transformers.Trainer of a causal language model",
                "hf-mlx run without --strict, or python, trains it on torch",
            )
        with self._lock:
            if name in self.names:
                return
            self.names.append(name)
        self._say(f"hf-mlx run: {name} is not trained by MLX in this version; it runs on torch")


def upstream_name(cls: type) -> str:
    """``trl.DPOTrainer`` for trl's class and for what a script derives from it."""
    for base in cls.__mro__:
        home = base.__module__.partition(".")[0]
        if home in _UPSTREAM:
            return f"{home}.{base.__name__}"
    return f"{cls.__module__}.{cls.__name__}"
