"""``import bitsandbytes as bnb`` in a script: the names of quantised layers are looked for with it, and its optimizers.

A model that was to be quantised is loaded in floating point here, so its Linear layers are what the script looks for.
Libraries go on finding that bitsandbytes is not installed.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from .callers import script_imports
from .imports import Imports
from .talk import Talk

_NAME = "bitsandbytes"
_OPTIMIZERS = (
    "Adam", "Adam8bit", "Adam32bit", "PagedAdam", "PagedAdam8bit", "PagedAdam32bit", "AdamW", "AdamW8bit", "AdamW32bit",
    "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit",
)  # fmt: skip


def offer_bitsandbytes(imports: Imports, talk: Talk) -> None:
    """Let the script import it where it is not installed."""

    def fill(module: Any) -> None:
        if module.__name__ == _NAME:
            _fill(module, talk)
        elif module.__name__ == f"{_NAME}.optim":
            vars(module).update(vars(_optimizers(talk)))
        elif module.__name__ == f"{_NAME}.nn":
            vars(module).update(vars(_layers()))

    imports.provide(_NAME, script_imports, fill)


def _fill(module: Any, talk: Talk) -> None:
    talk.once("bitsandbytes is not here: its Linear4bit and Linear8bitLt are torch.nn.Linear")
    # Below any release that transformers accepts.
    module.__version__ = "0.0"
    module.nn, module.optim = _layers(), _optimizers(talk)


def _layers() -> SimpleNamespace:
    import torch

    class Params4bit(torch.nn.Parameter):
        """No parameter is one."""

    class Int8Params(torch.nn.Parameter):
        """No parameter is one."""

    return SimpleNamespace(
        Linear4bit=torch.nn.Linear, Linear8bitLt=torch.nn.Linear, Embedding=torch.nn.Embedding,
        StableEmbedding=torch.nn.Embedding, Params4bit=Params4bit, Int8Params=Int8Params,
    )  # fmt: skip


def _optimizers(talk: Talk) -> SimpleNamespace:
    import torch

    def derive(name: str) -> type:
        decoupled = "AdamW" in name
        base = torch.optim.AdamW if decoupled else torch.optim.Adam
        decay = 1e-2 if decoupled else 0.0

        def __init__(self: Any, params: Any, lr: float = 1e-3, betas: Any = (0.9, 0.999), eps: float = 1e-8,
                     weight_decay: float = decay, amsgrad: bool = False, **kept_small: Any) -> None:  # fmt: skip
            talk.once(f"bitsandbytes.optim.{name} is torch.optim.{base.__name__}: its states are float32")
            base.__init__(self, params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)

        return type(name, (base,), {"__init__": __init__})

    class GlobalOptimManager:
        """Which parameters keep 32-bit states: all of them."""

        @classmethod
        def get_instance(cls) -> GlobalOptimManager:
            return cls()

        def register_module_override(self, *args: Any, **kwargs: Any) -> None:
            """Nothing is kept in 8 bits."""

        override_config = register_parameters = register_module_override

    return SimpleNamespace(GlobalOptimManager=GlobalOptimManager, **{name: derive(name) for name in _OPTIMIZERS})
