"""Tiny Llama checkpoints as Hugging Face folders, written without torch."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from hf_mlx.adapters.adapter import Adapter
from hf_mlx.adapters.attach import attach
from hf_mlx.models.load import LoadedModel, load_model
from hf_mlx.settings.plan import LoraPlan, ModelPlan

HIDDEN, MLP, VOCAB, LAYERS = 64, 96, 128, 2
TOKENS = mx.array([[5, 17, 99, 3, 42, 7, 64, 120]])


def make_llama(folder: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """A two-layer Llama with biases, every parameter random."""
    rng = np.random.RandomState(seed)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        linear = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN // 2, HIDDEN), "v": (HIDDEN // 2, HIDDEN), "o": (HIDDEN, HIDDEN)}
        for name, shape in linear.items():
            shapes[f"{layer}self_attn.{name}_proj.weight"] = shape
            shapes[f"{layer}self_attn.{name}_proj.bias"] = shape[:1]
        shapes |= {f"{layer}mlp.{name}_proj.weight": (MLP, HIDDEN) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (HIDDEN, MLP)
        shapes |= {f"{layer}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    weights = {}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape) * 0.1
        weights[name] = mx.array((1 + noise if name.endswith("norm.weight") else noise).astype(np.float32))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": True,
        "mlp_bias": False,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
        "tie_word_embeddings": tied,
        "dtype": "float32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return folder


def trained(
    folder: Path, plan: LoraPlan, model_plan: ModelPlan | None = None, **options
) -> tuple[LoadedModel, Adapter]:
    """A loaded model with an adapter whose every trainable value was moved."""
    loaded = load_model(folder, model_plan or ModelPlan())
    adapter = attach(loaded, plan, seed=7, **options)
    mx.random.seed(3)
    moved = [(name, v + 0.05 * mx.random.normal(v.shape).astype(v.dtype)) for name, v in adapter.trainable().items()]
    loaded.model.update(tree_unflatten(moved))
    mx.eval(loaded.model.parameters())
    return loaded, adapter


def logits(loaded: LoadedModel) -> np.ndarray:
    """fp32 logits for a fixed row of tokens."""
    return np.array(loaded.model(TOKENS).astype(mx.float32))
