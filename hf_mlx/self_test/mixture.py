"""A mixture of experts with an adapter, as it is trained, and the same in fp64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU

from ..adapters.parts import LoRASwitchLinear, Rows
from ..models.precision import cast_for_experts
from ..training.routed_experts import route_experts

EXPERTS, CHOICES, TOKENS, HIDDEN, MLP, RANK = 4, 2, 1024, 64, 32, 4
NAMES = ("output", "by the input", "by A", "by B")


def ours(arrays: dict[str, np.ndarray], chosen: np.ndarray) -> list[np.ndarray]:
    """:data:`NAMES` as training computes them, bf16 weights and products, in tiles where the device takes those.

    Args:
        arrays: Those of :func:`draw`.
        chosen: Experts of each token, (TOKENS, CHOICES).
    """
    given = {name: mx.array(array) for name, array in arrays.items()}
    glu: Any = SwitchGLU(HIDDEN, MLP, EXPERTS)
    for name in ("gate", "up", "down"):
        glu[f"{name}_proj"].weight = given[name].astype(mx.bfloat16)
    cast_for_experts(glu)
    options: Any = {"experts": EXPERTS, "dims": (MLP, HIDDEN), "rows": Rows(), "compute_dtype": mx.bfloat16}
    adapted: Any = LoRASwitchLinear(glu.down_proj, RANK, 1.0, **options)
    glu.down_proj = adapted
    glu.freeze()
    route_experts([glu])
    glu.train()

    def loss(x: mx.array, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        adapted.lora_A, adapted.lora_B = a, b
        out = glu(x.astype(mx.bfloat16)[None], mx.array(chosen)[None])[0].astype(mx.float32)
        out = (out * given["scores"][..., None]).sum(axis=1)
        return (out * given["target"]).sum(), out

    step: Any = mx.compile(mx.value_and_grad(loss, argnums=(0, 1, 2)))
    (_, out), grads = step(given["x"], given["a"], given["b"])
    return [np.array(array.astype(mx.float32)).astype(np.float64) for array in (out, *grads)]


def exact(arrays: dict[str, np.ndarray], chosen: np.ndarray) -> list[np.ndarray]:
    """The same in fp64, expert by expert."""
    given = {name: array.astype(np.float64) for name, array in arrays.items()}
    x, a, b = given["x"], given["a"].reshape(EXPERTS, RANK, MLP), given["b"].reshape(HIDDEN, RANK, EXPERTS)
    out, by_x, by_a, by_b = np.zeros_like(x), np.zeros_like(x), np.zeros_like(a), np.zeros_like(b)
    for expert in range(EXPERTS):
        gate, up, down = (given[name][expert] for name in ("gate", "up", "down"))
        score = np.where(chosen == expert, given["scores"], 0).sum(axis=1, keepdims=True)
        first, second = x @ gate.T, x @ up.T
        sigmoid = 1 / (1 + np.exp(-first))
        hidden = first * sigmoid * second
        pair = b[:, :, expert] @ a[expert]
        out += score * (hidden @ (down + pair).T)
        by_out = score * given["target"]
        by_hidden = by_out @ (down + pair)
        by_first = by_hidden * second * sigmoid * (1 + first * (1 - sigmoid))
        by_x += by_first @ gate + (by_hidden * first * sigmoid) @ up
        by_a[expert] = b[:, :, expert].T @ by_out.T @ hidden
        by_b[:, :, expert] = by_out.T @ (hidden @ a[expert].T)
    return [out, by_x, by_a.reshape(EXPERTS * RANK, MLP), by_b.reshape(HIDDEN, RANK * EXPERTS)]


def draw() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays of a mixture, whose weights and input bf16 holds exactly, and the experts of each token."""
    random = np.random.RandomState(2)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        made = mx.array((scale * random.standard_normal(shape)).astype(np.float32))
        return np.array(made.astype(mx.bfloat16).astype(mx.float32))

    arrays = {name: normal(EXPERTS, MLP, HIDDEN, scale=0.1) for name in ("gate", "up")}
    arrays |= {"down": normal(EXPERTS, HIDDEN, MLP, scale=0.1), "x": normal(TOKENS, HIDDEN)}
    arrays |= {"a": normal(EXPERTS * RANK, MLP, scale=0.1), "b": normal(HIDDEN, RANK * EXPERTS, scale=0.1)}
    arrays |= {"scores": normal(TOKENS, CHOICES), "target": normal(TOKENS, HIDDEN)}
    # The last expert gets a third of what the others get.
    chances = random.random_sample((TOKENS, EXPERTS)) * [1, 1, 1, 0.5]
    return arrays, np.argsort(-chances, axis=1)[:, :CHOICES].astype(np.uint32)
