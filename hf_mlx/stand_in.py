"""What ``hf-mlx run`` changes in its own process, and nowhere else: three names of trl and two entry points.

A script that is run unedited imports ``SFTTrainer`` from trl and asks CUDA things of ``from_pretrained``. The
user asked for both to be answered by MLX by running it under this command; no other code path calls this module.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .errors import MissingDependency
from .models.bridge import REQUESTED_BITS
from .settings.legacy import translate_arguments
from .settings.quantization import read_bits
from .surface.estimate import describe_run
from .trainers.sft import MLXSFTTrainer

_TRAINER_HOMES = ("trl", "trl.trainer", "trl.trainer.sft_trainer")
# Attention kernels that exist on CUDA only; transformers' own default takes their place.
_PORTABLE_ATTENTION = ("eager", "sdpa", "flex_attention", None)


def make_trainer(
    *, strict: bool = False, dry_run: bool = False, on_built: Callable[[], None] = lambda: None
) -> type[MLXSFTTrainer]:
    """The class that stands in for ``trl.SFTTrainer`` during a run.

    Args:
        strict: Default of the trainer's own ``strict``.
        dry_run: ``train()`` prints what would happen and ends the script with status 0.
        on_built: Called when one has been constructed.
    """

    class SFTTrainer(MLXSFTTrainer):
        __doc__ = MLXSFTTrainer.__doc__

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{"strict": strict} | kwargs)
            on_built()
            say(self.ledger.as_text(changed_only=True))

        if dry_run:

            def train(self, resume_from_checkpoint: str | bool | None = None) -> Any:
                print(describe_run(self))
                raise SystemExit(0)

            def evaluate(self, *args: Any, **kwargs: Any) -> Any:
                return self.train()

            predict = evaluate

    SFTTrainer.__module__, SFTTrainer.__qualname__ = MLXSFTTrainer.__module__, "SFTTrainer"
    return SFTTrainer


def install(trainer: type[MLXSFTTrainer]) -> None:
    """Put ``trainer`` and the translations in place, for this process.

    Raises:
        MissingDependency: trl is not installed.
    """
    if find_spec("trl") is None:
        raise MissingDependency(
            "a script for trl without trl installed", "trl, whose other names the script imports", "pip install trl"
        )
    for home in _TRAINER_HOMES:
        setattr(import_module(home), "SFTTrainer", trainer)  # noqa: B010
    _translate_arguments()
    _translate_loading()


def say(line: str) -> None:
    """Print to standard error: the script's own output stays as it is."""
    print(line, file=sys.stderr, flush=True)


def portable_kwargs(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], int | None, list[str]]:
    """Keyword arguments of ``from_pretrained`` without what only CUDA has.

    Returns:
        What is left, the bits that were asked for (None for none), and a line for each change.
    """
    left, notes = dict(kwargs), []
    bits = read_bits(left.get("quantization_config") or {}) or read_bits(left)
    if bits is not None:
        for name in ("quantization_config", "load_in_4bit", "load_in_8bit"):
            left.pop(name, None)
        notes.append(
            f"{bits}-bit loading: bitsandbytes needs CUDA. The torch object is loaded in floating point, and the copy "
            f"that trains is quantised to {bits} bits by MLX (another codebook, so the curve differs a little)"
        )
    device_map = left.pop("device_map", None)
    if device_map is not None:
        notes.append(f"device_map={device_map!r}: has no effect, memory is unified")
    attention = left.get("attn_implementation")
    if attention not in _PORTABLE_ATTENTION:
        left.pop("attn_implementation")
        notes.append(f"attn_implementation={attention!r}: has no effect, MLX has its own fused attention")
    return left, bits, notes


def _translate_loading() -> None:
    from transformers import AutoModelForCausalLM, PreTrainedModel

    for cls in (AutoModelForCausalLM, PreTrainedModel):
        original: Callable = inspect.getattr_static(cls, "from_pretrained").__func__
        setattr(cls, "from_pretrained", classmethod(_portable(original)))  # noqa: B010


def _portable(original: Callable) -> Callable:
    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        kwargs, bits, notes = portable_kwargs(kwargs)
        for note in notes:
            say(f"hf-mlx run: {note}")
        model = original(cls, *args, **kwargs)
        if bits is not None:
            setattr(model, REQUESTED_BITS, bits)
        return model

    return from_pretrained


def _translate_arguments() -> None:
    from transformers import TrainingArguments
    from trl import SFTConfig

    for cls in (TrainingArguments, SFTConfig):
        cls.__init__ = _translated(cls.__init__)


def _translated(original: Callable) -> Callable:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs, notes = translate_arguments(kwargs)
        for note in notes:
            say(f"hf-mlx run: {note}")
        original(self, *args, **kwargs)

    return __init__
