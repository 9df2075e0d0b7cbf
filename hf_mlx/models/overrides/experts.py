"""Mixture-of-experts routing where mlx-lm's differs from transformers'."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

Config = dict[str, Any]


def keep_router_weights(model: Any, config: Config) -> None:
    """Jamba: experts are weighted by the softmax over all of them, not over the chosen ones.

    Source: transformers 5.23 ``JambaSparseMoeBlock.route_tokens_to_experts``.
    """
    for block in model.layers:
        if "router" in block.feed_forward:
            block.feed_forward.__class__ = _unnormalised(type(block.feed_forward))


@cache
def _unnormalised(moe: type[Any]) -> type[Any]:
    class Unnormalised(moe):
        def __call__(self, x: mx.array) -> mx.array:
            scores = mx.softmax(self.router(x), axis=-1, precise=True)
            k = self.num_experts_per_tok
            chosen = mx.stop_gradient(mx.argpartition(-scores, kth=k - 1, axis=-1)[..., :k])
            weights = mx.take_along_axis(scores, chosen, axis=-1)
            return (self.switch_mlp(x, chosen) * weights[..., None]).sum(axis=-2)

    Unnormalised.__name__ = f"Unnormalised{moe.__name__}"
    return Unnormalised
