"""The adapter's first values: PEFT's, bit for bit and without torch, or mlx-lm's.

PEFT (0.21, ``LoraLayer.update_layer``) builds two ``nn.Linear`` per target, whose default initialisation
draws from torch's generator, and then initialises again; both draws are made here, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..data.generator import TorchGenerator
from ..errors import AdapterError
from ..settings.plan import LoraPlan
from .decomposed import KINDS
from .defaults import DRAWN_ON_LOADING
from .idle import IdlePair
from .layers import DoRALinear, LoRAEmbedding, LoRALinear
from .parts import LoRARouter, LoRASwitchLinear

if TYPE_CHECKING:
    from ..models.load import LoadedModel

LoRALayer = LoRALinear | LoRAEmbedding | LoRASwitchLinear | LoRARouter
_A = math.sqrt(5)  # nn.Linear.reset_parameters and PEFT both call kaiming_uniform_(weight, a=√5)


def start_as_peft(layers: Iterable[LoRALayer | IdlePair], plan: LoraPlan, seed: int, *, drawn: int = 0) -> None:
    """Fill the layers with what ``set_seed(seed); get_peft_model(...)`` would.

    Args:
        layers: In HF ``named_modules()`` order.
        plan: Reads ``init_lora_weights`` and ``lora_bias``.
        seed: The run's seed.
        drawn: 32-bit draws made between seeding and the first layer.
    """
    generator = TorchGenerator(seed)
    generator.random(drawn)
    for layer in layers:
        if isinstance(layer, LoRAEmbedding):
            _draw_embedding(layer, generator, plan.init_lora_weights)
        else:
            layer.lora_A, layer.lora_B = _draw_linear(layer, generator, plan)
        if isinstance(layer, DoRALinear):
            layer.reset_magnitude()


def count_loading_draws(loaded: LoadedModel) -> int:
    """How often ``from_pretrained`` draws from torch's generator for this model (see ``DRAWN_ON_LOADING``)."""
    endings = DRAWN_ON_LOADING.get(loaded.model_type, ())
    params: Any = tree_flatten(loaded.model.parameters())
    drawn = sum(value.size for name, value in params if endings and name.endswith(endings))
    return drawn + loaded.head_draws


def start_as_mlx_lm(model: nn.Module, layers: dict[str, LoRALayer], last_n_layers: int | None, seed: int) -> None:
    """Fill the layers with what ``mlx_lm.tuner.utils.linear_to_lora_layers`` draws right after seeding mx.random.

    Args:
        model: The model, with ``layers`` already in place.
        layers: MLX path to layer.
        last_n_layers: How many blocks mlx-lm converts, counted from the end; None for all.
        seed: Given to ``mx.random.seed``.
    """
    mx.random.seed(seed)
    blocks: Any = model.layers
    skipped = len(blocks) - min(last_n_layers or len(blocks), len(blocks))
    inside: set[str] = set()
    paths = {id(module): path for path, module in model.named_modules()}
    for block in blocks[skipped:]:
        for _, module in block.named_modules():
            path = paths[id(module)]
            if path in layers:
                _draw_as_mlx_lm(layers[path])
                inside.add(path)
    for path, _ in model.named_modules():
        if path in layers and path not in inside:
            _draw_as_mlx_lm(layers[path])


def _draw_as_mlx_lm(layer: LoRALayer) -> None:
    from mlx_lm.tuner import lora

    rank = layer.lora_embedding_A.shape[0] if isinstance(layer, LoRAEmbedding) else layer.lora_A.shape[-2]
    base: Any = layer.base_layer
    options: dict[str, Any] = {"r": rank, "dropout": 0.0, "scale": layer.scale}
    # mlx-lm's own constructor makes the draws, the ones it throws away included.
    if isinstance(layer, LoRAEmbedding):
        twin = lora.LoRAEmbedding.from_base(base, **options)
        layer.lora_embedding_A, layer.lora_embedding_B = twin.lora_a.T, twin.lora_b.T
    elif type(layer) not in (LoRALinear, DoRALinear):
        raise AdapterError(
            'start="mlx_lm" on experts, routers or layers that MLX holds in parts',
            "Linear layers and embeddings: mlx-lm's tuner has other matrices for the rest than PEFT",
            'start="peft"',
        )
    else:
        twin = lora.LoRALinear.from_base(base, **options)
        layer.lora_A, layer.lora_B = twin.lora_a.T, twin.lora_b.T
    if isinstance(layer, DoRALinear):
        layer.reset_magnitude()


def _draw_linear(
    layer: LoRALinear | LoRASwitchLinear | LoRARouter | IdlePair, generator: TorchGenerator, plan: LoraPlan
) -> tuple[mx.array, mx.array]:
    rank, inputs = layer.lora_A.shape
    outputs = layer.lora_B.shape[0]
    a = generator.kaiming_uniform((rank, inputs), a=_A)
    b = generator.kaiming_uniform((outputs, rank), a=_A)
    bias = None
    if plan.lora_bias:
        bound = 1 / math.sqrt(rank)
        bias = generator.uniform(outputs, -bound, bound)
    if plan.init_lora_weights is not False:
        if plan.init_lora_weights == "gaussian":
            # A stack of experts is drawn at once, each with the spread of its own rank.
            a = generator.normal((rank, inputs), std=1 / getattr(layer, "r", rank))
        elif plan.init_lora_weights not in KINDS:
            a = generator.kaiming_uniform((rank, inputs), a=_A)
        b, bias = np.zeros_like(b), None if bias is None else np.zeros_like(bias)
    if bias is not None and isinstance(layer, LoRALinear):
        layer.lora_B_bias = mx.array(bias)
    return mx.array(a), mx.array(b)


def _draw_embedding(layer: LoRAEmbedding, generator: TorchGenerator, kind: bool | str) -> None:
    a = generator.normal(layer.lora_embedding_A.shape)
    b = generator.normal(layer.lora_embedding_B.shape)
    if kind is not False:
        a, b = np.zeros_like(a), generator.normal(layer.lora_embedding_B.shape)
    layer.lora_embedding_A, layer.lora_embedding_B = mx.array(a), mx.array(b)
