"""Hugging Face fine-tuning scripts on Apple's MLX: same script, same curve, same adapter.

The public names are loaded when they are first used, so that ``import hf_mlx`` stays quick and
brings in neither torch nor mlx nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.export import export_adapter
    from .adapters.read import import_adapter
    from .adapters.verify import verify_adapter
    from .errors import HFMLXError
    from .settings.clipping import GradClip, resolve_grad_clip
    from .settings.ledger import explain
    from .trainers.dpo import MLXDPOTrainer
    from .trainers.lm import MLXTrainer
    from .trainers.reward import MLXRewardTrainer
    from .trainers.sft import MLXSFTTrainer

__all__ = [
    "GradClip",
    "HFMLXError",
    "MLXDPOTrainer",
    "MLXRewardTrainer",
    "MLXSFTTrainer",
    "MLXTrainer",
    "explain",
    "export_adapter",
    "import_adapter",
    "resolve_grad_clip",
    "verify_adapter",
]

_HOMES = {
    "GradClip": "settings.clipping",
    "HFMLXError": "errors",
    "MLXDPOTrainer": "trainers.dpo",
    "MLXRewardTrainer": "trainers.reward",
    "MLXSFTTrainer": "trainers.sft",
    "MLXTrainer": "trainers.lm",
    "explain": "settings.ledger",
    "export_adapter": "adapters.export",
    "import_adapter": "adapters.read",
    "resolve_grad_clip": "settings.clipping",
    "verify_adapter": "adapters.verify",
}
_WITHOUT_MLX = ("errors", "settings")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from .version import installed_version

        return installed_version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    if not home.startswith(_WITHOUT_MLX):
        from .backends import prepare_backend

        prepare_backend()
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
