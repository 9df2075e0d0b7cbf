"""Gated-delta and state-space layers in chunks: mlx-lm's loop over tokens when it trains.

A mixer without a cache (training, evaluation) goes through :mod:`.linear_recurrence` or :mod:`.selective_scan`; with
a cache or a mask, which mlx-lm makes from a cache (generation), it stays mlx-lm's. Parameters, and so names and
adapters, are mlx-lm's in both.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.ssm import compute_dt

from ..cpu_norms import rms_norm
from .convolution import causal_convolution
from .linear_recurrence import CHUNK, linear_recurrence
from .selective_scan import selective_scan

# transformers' l2norm adds it to the sum of squares.
_L2_EPSILON = 1e-6


def apply(model: Any) -> None:
    """Gives the recurrent mixers of a loaded model their chunkwise form."""
    for _, module in model.named_modules():
        build = _FORMS.get((type(module).__module__.removeprefix("mlx_lm.models."), type(module).__name__))
        if build:
            module.__class__ = build(type(module))


def kept_bytes(module: Any, rows: int, tokens: int) -> int:
    """What a chunkwise mixer keeps for its backward pass beside the inputs and outputs of its projections.

    Args:
        module: Any module; 0 unless :func:`apply` made it chunkwise.
        rows: Rows of a micro-batch.
        tokens: Padded length of a row.

    Returns:
        Bytes of float32 values: the states at the ends of chunks, what goes into the recurrence, and the convolution's
        and the gate's values on the way.
    """
    if not _is_chunkwise(module):
        return 0
    if (
        "dt_proj" in module
    ):  # Mamba: x, delta and the outputs; within a segment four arrays of (channels, state) a token
        channels, size = module.A_log.shape
        return 4 * rows * tokens * channels * (3 + 4 * size)
    heads, keys, values = _state_shape(module)
    # Queries, keys, values and outputs; padded, convolved and activated inputs; outputs gated and normed.
    by_token = 2 * (keys + values) + 3 * (2 * keys + values) + 5 * values
    # A decay for each channel of a key goes through as many steps, and into queries and keys.
    channels = module.dt_bias.size // heads if "dt_bias" in module else 1
    by_token += 8 * channels if channels > 1 else 0
    return 4 * rows * heads * (tokens * by_token + -(-tokens // CHUNK) * keys * values)


def working_bytes(module: Any, rows: int, tokens: int) -> int:
    """What one chunkwise mixer holds at once in its backward pass: products of every two tokens of a chunk.

    Args:
        module: Any module; 0 unless :func:`apply` made it chunkwise.
        rows: Rows of a micro-batch.
        tokens: Padded length of a row.
    """
    if not _is_chunkwise(module) or "dt_proj" in module:
        return 0
    return 6 * 4 * rows * _state_shape(module)[0] * tokens * CHUNK


def _is_chunkwise(module: Any) -> bool:
    # A run may have put a class of its own on top.
    return any(base.__name__.startswith("Chunkwise") for base in type(module).__mro__)


def _state_shape(module: Any) -> tuple[int, int, int]:
    """Heads, and the widths of a key and of a value."""
    if "num_v_heads" in vars(module):
        return module.num_v_heads, module.head_k_dim, module.head_v_dim
    return module.num_heads, getattr(module, "ssm_state_size", module.head_dim), module.head_dim


def delta_rule(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    a: mx.array,
    b: mx.array,
    layer: Any,
    *,
    scale: float,
    largest_beta: float = 1.0,
) -> mx.array:
    """The gated delta rule of unnormalised queries and keys.

    Args:
        queries: (B, T, G, Dk).
        keys: (B, T, G, Dk).
        values: (B, T, H, Dv).
        a: What the decay is made of, (B, T, H) or (B, T, H, Dk).
        b: Logits of beta, (B, T, H).
        layer: With ``A_log`` and ``dt_bias``, which broadcast to ``a``.
        scale: Of the queries.
        largest_beta: 2 where negative eigenvalues are allowed.

    Returns:
        (B, T, H, Dv).
    """
    shape = a.shape[2:]
    rate = mx.exp(layer.A_log.astype(mx.float32)).reshape(shape if a.ndim == 3 else (shape[0], 1))
    decay = -rate * nn.softplus(a.astype(mx.float32) + layer.dt_bias.reshape(shape))
    beta = largest_beta * mx.sigmoid(b)
    return linear_recurrence(scale * _unit(queries), _unit(keys), values, decay, beta)


def _unit(x: mx.array) -> mx.array:
    # By the mean of squares, for which MLX has kernels.
    width = x.shape[-1]
    return width**-0.5 * rms_norm(x.astype(mx.float32), None, _L2_EPSILON / width)


def _convolve(convolution: nn.Conv1d, x: mx.array) -> mx.array:
    """The causal convolution and its SiLU, (B, T, channels)."""
    convolved = causal_convolution(x, convolution.weight)
    return nn.silu(convolved + convolution.bias if "bias" in convolution else convolved)


def _heads(x: mx.array, width: int) -> mx.array:
    return mx.unflatten(x, -1, (-1, width))


@cache
def _qwen(mixer: type[Any]) -> type[Any]:
    class Chunkwise(mixer):
        def __call__(self, inputs: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
            if cache is not None or mask is not None:
                return super().__call__(inputs, mask, cache)
            mixed, z, a, b = self.project(inputs)
            q, k, v = mx.split(_convolve(self.conv1d, mixed), [self.key_dim, 2 * self.key_dim], axis=-1)
            q, k, v = _heads(q, self.head_k_dim), _heads(k, self.head_k_dim), _heads(v, self.head_v_dim)
            outputs = delta_rule(q, k, v, a, b, self, scale=self.head_k_dim**-0.5)
            return self.out_proj(self.norm(outputs, z).flatten(-2))

        def project(self, x: mx.array) -> tuple[mx.array, ...]:
            """Queries, keys and values in a row; the gate; what decay and beta are made of."""
            z = _heads(self.in_proj_z(x), self.head_v_dim)
            return self.in_proj_qkv(x), z, self.in_proj_a(x), self.in_proj_b(x)

    return _named(Chunkwise, mixer)


@cache
def _qwen_interleaved(mixer: type[Any]) -> type[Any]:
    class Chunkwise(_qwen(mixer)):
        def project(self, x: mx.array) -> tuple[mx.array, ...]:
            """The same of projections that interleave them by key head."""
            q, k, v, z, b, a = self.fix_query_key_value_ordering(self.in_proj_qkvz(x), self.in_proj_ba(x))
            return mx.concatenate([part.flatten(2) for part in (q, k, v)], axis=-1), z, a, b

    return _named(Chunkwise, mixer)


@cache
def _olmo(mixer: type[Any]) -> type[Any]:
    class Chunkwise(mixer):
        def __call__(self, x: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
            if cache is not None or mask is not None:
                return super().__call__(x, mask, cache)
            q = _heads(_convolve(self.q_conv1d, self.q_proj(x)), self.head_k_dim)
            k = _heads(_convolve(self.k_conv1d, self.k_proj(x)), self.head_k_dim)
            v = _heads(_convolve(self.v_conv1d, self.v_proj(x)), self.head_v_dim)
            a, b, largest = self.a_proj(x), self.b_proj(x), 2.0 if self.allow_neg_eigval else 1.0
            outputs = delta_rule(q, k, v, a, b, self, scale=self.head_k_dim**-0.5, largest_beta=largest)
            return self.o_proj(self.o_norm(outputs, _heads(self.g_proj(x), self.head_v_dim)).flatten(-2))

    return _named(Chunkwise, mixer)


@cache
def _kimi(mixer: type[Any]) -> type[Any]:
    class Chunkwise(mixer):
        def __call__(self, x: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
            if cache is not None or mask is not None:
                return super().__call__(x, mask, cache)
            q, k, v = (
                _heads(_convolve(convolution.conv, project(x)), self.head_dim)
                for convolution, project in (
                    (self.q_conv, self.q_proj),
                    (self.k_conv, self.k_proj),
                    (self.v_conv, self.v_proj),
                )
            )
            a = _heads(self.f_b_proj(self.f_a_proj(x)), self.head_dim)
            outputs = delta_rule(q, k, v, a, self.b_proj(x), self, scale=self.scale)
            gate = _heads(self.g_b_proj(self.g_a_proj(x)), self.head_dim)
            return self.o_proj((self.o_norm(outputs) * mx.sigmoid(gate)).flatten(-2))

    return _named(Chunkwise, mixer)


@cache
def _mamba2(mixer: type[Any]) -> type[Any]:
    class Chunkwise(mixer):
        def _conv(self, conv_input: mx.array, cache: Any, mask: mx.array | None) -> mx.array:
            if cache is not None or mask is not None:
                return super()._conv(conv_input, cache, mask)
            return _convolve(self.conv1d, conv_input)

        def _ssm(
            self, hidden: mx.array, b: mx.array, c: mx.array, dt: mx.array, cache: Any, mask: mx.array | None
        ) -> mx.array:
            if cache is not None or mask is not None:
                return super()._ssm(hidden, b, c, dt, cache, mask)
            x = _heads(hidden, self.head_dim)
            b, c = _heads(b, self.ssm_state_size), _heads(c, self.ssm_state_size)
            delta = compute_dt(dt, self.dt_bias, self.time_step_limit)
            decay = delta * -mx.exp(self.A_log.astype(mx.float32))
            outputs = linear_recurrence(c, b, delta[..., None] * x, decay)
            return (outputs + x * self.D[:, None]).astype(hidden.dtype).flatten(-2)

    return _named(Chunkwise, mixer)


@cache
def _mamba(mixer: type[Any]) -> type[Any]:
    class Chunkwise(mixer):
        def __call__(self, x: mx.array, cache: Any) -> mx.array:
            if cache is not None:
                return super().__call__(x, cache)
            hidden, gate = mx.split(self.in_proj(x), 2, axis=-1)
            hidden = _convolve(self.conv1d, hidden)
            rank, size = self.time_step_rank, self.ssm_state_size
            parts = mx.split(self.x_proj(hidden), [rank, rank + size], axis=-1)
            delta, b, c = (norm(part) for norm, part in zip(self.norms(), parts, strict=True))
            delta = nn.softplus(self.dt_proj(delta).astype(mx.float32))
            outputs = selective_scan(hidden, delta, -mx.exp(self.A_log.astype(mx.float32)), b, c)
            return self.out_proj(nn.silu(gate) * (outputs + self.D * hidden).astype(x.dtype))

        def norms(self) -> list[Any]:
            """Of delta, b and c."""
            eps = self.args.mixer_rms_eps if self.use_bcdt_rms else None
            return [(lambda x: x) if eps is None else (lambda x: rms_norm(x, None, eps))] * 3

    return _named(Chunkwise, mixer)


@cache
def _jamba(mixer: type[Any]) -> type[Any]:
    class Chunkwise(_mamba(mixer)):
        def norms(self) -> list[Any]:
            """Jamba's have weights."""
            return [self.dt_layernorm, self.b_layernorm, self.c_layernorm]

    return _named(Chunkwise, mixer)


def _named(chunkwise: type[Any], mixer: type[Any]) -> type[Any]:
    chunkwise.__name__ = f"Chunkwise{mixer.__name__}"
    return chunkwise


# (module of mlx_lm.models, class) → its chunkwise subclass.
_FORMS = {
    ("qwen3_5", "GatedDeltaNet"): _qwen,
    ("qwen3_next", "Qwen3NextGatedDeltaNet"): _qwen_interleaved,
    ("olmo_hybrid", "GatedDeltaNet"): _olmo,
    ("kimi_linear", "KimiDeltaAttention"): _kimi,
    ("mamba2", "Mamba2Block"): _mamba2,
    ("nemotron_h", "NemotronHMamba2Mixer"): _mamba2,
    ("granitemoehybrid", "GraniteMoeHybridMamba2Mixer"): _mamba2,
    ("falcon_h1", "FalconH1Mixer"): _mamba2,
    ("mamba", "MambaBlock"): _mamba,
    ("jamba", "JambaMambaMixer"): _jamba,
}
