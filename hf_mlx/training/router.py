"""Mixture-of-experts routers: their logits of a forward pass, and the loss that keeps their load balanced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ModelError, SettingError
from ..models.heads import layers
from ..models.load import LoadedModel
from ..settings.plan import LossPlan, PairLossPlan

# HF model type → where a block keeps the Linear whose output transformers 5.23 calls router_logits.
_PATHS: dict[str, str] = {
    **dict.fromkeys(("mixtral", "minimax_m2"), "block_sparse_moe.gate"),
    **dict.fromkeys(("granitemoe", "granitemoehybrid"), "block_sparse_moe.router.layer"),
    **dict.fromkeys(
        (
            "qwen2_moe",
            "qwen3_moe",
            "qwen3_next",
            "qwen3_5_moe",
            "qwen3_5_moe_text",
            "olmoe",
            "mellum",
            "ernie4_5_moe",
            "qwen3_vl_moe",
        ),
        "mlp.gate",
    ),
    "laguna": "mlp.gate.proj",
    "gpt_oss": "mlp.router",
    "jamba": "feed_forward.router",
    "lfm2_moe": "feed_forward.gate",
    "afmoe": "mlp.router.gate",
}
_OFF = "SFTConfig(router_aux_loss_coef=0.0) switches the loss off"


class RouterLog:
    """Collects router logits while a forward pass is recorded; outside of that it takes nothing."""

    _open: list[mx.array] | None = None

    @contextmanager
    def recording(self) -> Iterator[list[mx.array]]:
        """A list that fills with what the routers say inside the block; may be nested, the innermost one fills."""
        outer, self._open = self._open, []
        try:
            yield self._open
        finally:
            self._open = outer

    def add(self, *logits: mx.array) -> None:
        """Put logits into the open list, if there is one."""
        if self._open is not None:
            self._open.extend(logits)


class Routers:
    """The load-balancing loss of a model's routers.

    Args:
        log: Where the routers' logits arrive.
        top_k: Experts of a token.
        coefficient: Weight of the loss in what is minimised; 0 where it is only logged.
    """

    def __init__(self, log: RouterLog, top_k: int, coefficient: float) -> None:
        self.log = log
        self.top_k = top_k
        self.coefficient = coefficient

    @classmethod
    def attach(cls, loaded: LoadedModel, plan: LossPlan | PairLossPlan) -> Routers | None:
        """Let the model's routers record their logits, each on its instance alone.

        Call it once adapters and casts are in place, before blocks are checkpointed.

        Returns:
            None where TRL adds no such loss (trl 1.16 ``SFTTrainer.__init__``): a dense model, or a coefficient of 0.

        Raises:
            SettingError: ``router_aux_loss_coef`` is set for a model without routers.
            ModelError: The model's routers cannot be read here.
        """
        config = _text_config(loaded)
        asked = plan.router_aux_loss_coef
        returns_logits = hasattr(config, "output_router_logits")
        if asked and not returns_logits:
            raise _refuse_dense(asked, loaded)
        coefficient = getattr(config, "router_aux_loss_coef", 0.0) if asked is None else asked
        if not returns_logits or not coefficient:
            return None
        if loaded.model_type not in _PATHS:
            raise ModelError(
                f"{loaded.path}: model type {loaded.model_type!r} with router_aux_loss_coef={coefficient}",
                "routers whose logits can be read: " + ", ".join(sorted(_PATHS)),
                _OFF,
            )
        log = RouterLog()
        gates = [gate for block in layers(loaded.model) if (gate := _find(block, _PATHS[loaded.model_type]))]
        for owner, name in gates:
            _record(owner, name, log)
        if not gates:  # a mixture-of-experts type whose every block is dense
            if asked:
                raise _refuse_dense(asked, loaded)
            return None
        # TRL leaves the loss out where labels are smoothed, and logs it all the same.
        smoothed = isinstance(plan, LossPlan) and plan.kind == "nll" and plan.label_smoothing_factor
        return cls(log, config.num_experts_per_tok, 0.0 if smoothed else coefficient)

    def balance(self, logits: Sequence[mx.array], counted: mx.array) -> mx.array:
        """The load-balancing loss of Switch Transformer, a float32 scalar; ``top_k`` when the load is even.

        Source: transformers 5.23 ``mixtral.modeling_mixtral.load_balancing_loss_func``.

        Args:
            logits: (N, E) or (B, T, E) of each block.
            counted: (B, T) bool; False on padding.
        """
        experts = logits[0].shape[-1]
        counts = probabilities = mx.zeros((experts,))
        weights = counted.reshape(-1, 1).astype(mx.float32)
        for layer in logits:
            p = mx.softmax(layer.reshape(-1, experts).astype(mx.float32), axis=-1)
            chosen = mx.argpartition(-mx.stop_gradient(p), kth=self.top_k - 1, axis=-1)[:, : self.top_k]
            picked = (chosen[:, :, None] == mx.arange(experts)).sum(axis=1)
            counts = counts + (picked * weights).sum(axis=0)
            probabilities = probabilities + (p * weights).sum(axis=0)
        rows = weights.sum() * len(logits)
        return (counts / rows * (probabilities / rows)).sum() * experts


def _text_config(loaded: LoadedModel) -> Any:
    from transformers import CONFIG_MAPPING

    if loaded.model_type not in CONFIG_MAPPING:
        return None
    kept = {k: v for k, v in loaded.config.items() if k not in ("quantization", "quantization_config")}
    return CONFIG_MAPPING[loaded.model_type].from_dict(kept).get_text_config()


def _find(block: nn.Module, path: str) -> tuple[Any, str] | None:
    """The module that holds the router, and the router's name in it; None in a dense block."""
    *parents, name = path.split(".")
    owner: Any = block
    for part in parents:
        if part not in owner:
            return None
        owner = owner[part]
    return (owner, name) if name in owner else None


def _record(owner: Any, name: str, log: RouterLog) -> None:
    gate = owner[name]
    base = type(gate)
    # Laguna caps its logits after the projection.
    cap = getattr(owner, "softcap", 0.0)

    def call(self: nn.Module, x: mx.array) -> mx.array:
        logits = base.__call__(self, x)
        log.add(mx.tanh(logits.astype(mx.float32) / cap) * cap if cap else logits)
        return logits

    gate.__class__ = type(f"Recorded{base.__name__}", (base,), {"__call__": call})


def _refuse_dense(asked: float, loaded: LoadedModel) -> SettingError:
    return SettingError(
        f"router_aux_loss_coef={asked} with a model of type {loaded.model_type!r}",
        "a mixture-of-experts model: this one has no routers whose load could be balanced (trl raises too)",
        "leave router_aux_loss_coef out",
    )
