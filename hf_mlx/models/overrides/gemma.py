"""Gemma: the embedding's scale in the weights' own dtype, and Gemma 2's softcaps."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

Config = dict[str, Any]


def scale_embeddings_exactly(model: Any, config: Config) -> None:
    """Gemma 3: multiply the embedding by sqrt(hidden) in its own dtype, not in bf16.

    Source: transformers 5.23 ``Gemma3TextScaledWordEmbedding.forward`` casts the scale to the weight's
    dtype; mlx-lm 0.32 ``Gemma3Model`` rounds it to bf16 first, 0.2% off in fp32.
    """
    text = getattr(model, "language_model", model)
    text.model.__class__ = _exact(type(text.model))


@cache
def _exact(inner: type[Any]) -> type[Any]:
    class ExactScale(inner):
        def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
            h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
            # mlx-lm reads the mask of the first global layer, which a model shorter than one period lacks.
            cache = [None] * len(self.layers) if cache is None else list(cache)
            cache += [cache[0]] * (self.sliding_window_pattern - len(cache))
            if h.dtype == mx.bfloat16:
                return super().__call__(inputs, cache, h)
            scale = self.args.hidden_size**0.5
            rounded = mx.array(scale, mx.bfloat16).astype(mx.float32).item()
            return super().__call__(inputs, cache, h * (scale / rounded))

    ExactScale.__name__ = f"ExactScale{inner.__name__}"
    return ExactScale


def attend_with_softcap(model: Any, config: Config) -> None:
    """Gemma 2: softcaps that may be None, and masks of any rank; the embedding's scale in its own dtype.

    Source: transformers 5.23 ``modeling_gemma2.eager_attention_forward``. mlx-lm 0.32 divides by the cap
    always, and aligns a (B, 1, T, T) mask with the key-value heads instead of the batch.
    """
    for block in model.layers:
        block.self_attn.__class__ = _softcapped(type(block.self_attn))
    # A head of its own knows of no cap already.
    if config.get("final_logit_softcapping") is None and "lm_head" not in model:
        model.__class__ = _uncapped(type(model))


@cache
def _softcapped(attention: type[Any]) -> type[Any]:
    class Softcapped(attention):
        def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
            batch, length, _ = x.shape
            q, k, v = (
                p(x).reshape(batch, length, heads, self.head_dim).swapaxes(1, 2)
                for p, heads in (
                    (self.q_proj, self.n_heads),
                    (self.k_proj, self.n_kv_heads),
                    (self.v_proj, self.n_kv_heads),
                )
            )
            offset = 0 if cache is None else cache.offset
            q, k = self.rope(q, offset=offset), self.rope(k, offset=offset)
            if cache is not None:
                k, v = cache.update_and_fetch(k, v)
            k, v = (mx.repeat(t, self.repeats, axis=1) for t in (k, v))
            scores = (q * self.scale) @ k.swapaxes(-1, -2)
            cap = self.attn_logit_softcapping
            if cap is not None:
                scores = mx.tanh(scores / cap) * cap
            if isinstance(mask, str):
                total = k.shape[-2]
                mask = mx.arange(total - length, total)[:, None] >= mx.arange(total)[None]
            if mask is not None:
                floor = mx.array(mx.finfo(scores.dtype).min, scores.dtype)
                scores = mx.where(mask, scores, floor) if mask.dtype == mx.bool_ else scores + mask
            out = mx.softmax(scores, precise=True, axis=-1) @ v
            return self.o_proj(out.swapaxes(1, 2).reshape(batch, length, -1))

    Softcapped.__name__ = f"Softcapped{attention.__name__}"
    return Softcapped


@cache
def _uncapped(model: type[Any]) -> type[Any]:
    class Uncapped(model):
        def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
            return self.model.embed_tokens.as_linear(self.model(inputs, cache))

    Uncapped.__name__ = f"Uncapped{model.__name__}"
    return Uncapped
