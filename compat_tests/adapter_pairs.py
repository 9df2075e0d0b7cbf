"""One tiny model on both sides, adapted by PEFT on torch and by us on MLX."""

from __future__ import annotations

import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import mlx.core as mx
import numpy as np
import peft
import torch
import transformers
from architecture_zoo import make_model
from mlx.utils import tree_unflatten

from hf_mlx.adapters.adapter import Adapter
from hf_mlx.adapters.attach import attach
from hf_mlx.models.load import LoadedModel, load_model
from hf_mlx.settings.plan import LoraPlan, ModelPlan

SEED = 7
# fp32 on both sides, sums in another order, through three layers.
CLOSE = 1e-5


def make_base(model_type: str, folder: Path, **changes: Any) -> Path:
    """A tiny model of the type with every parameter perturbed, as ``save_pretrained`` writes it."""
    with quiet():
        make_model(model_type, **changes).save_pretrained(folder)
    return folder


def quiet() -> warnings.catch_warnings:
    """transformers and PEFT warn about defaults that these tests choose on purpose."""
    return warnings.catch_warnings(action="ignore")


def load_mlx(base: Path, **options: Any) -> LoadedModel:
    """Our side."""
    with quiet():
        return load_model(base, ModelPlan(**options))


def load_torch(base: Path, **options: Any) -> Any:
    """Their side, in eval mode."""
    # The class that trl builds; for a multimodal type AutoModelForCausalLM may build another one.
    kind = json.loads((base / "config.json").read_text())["architectures"][0]
    with quiet():
        return getattr(transformers, kind).from_pretrained(base, **options).eval()


def adapt_mlx(loaded: LoadedModel, settings: dict[str, Any], *, moved: bool = True, **options: Any) -> Adapter:
    """An adapter on our side, from LoraConfig keywords; ``moved`` changes every trainable value."""
    plan = LoraPlan(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
    adapter = attach(loaded, plan, seed=SEED, **options)
    if moved:
        mx.random.seed(3)
        noise = [(k, v + 0.05 * mx.random.normal(v.shape).astype(v.dtype)) for k, v in adapter.trainable().items()]
        loaded.model.update(tree_unflatten(noise))
    return adapter


def adapt_torch(model: Any, settings: dict[str, Any], *, moved: bool = True) -> peft.PeftModel:
    """An adapter on their side, from the same keywords."""
    with quiet():
        transformers.set_seed(SEED)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**copy.deepcopy(settings)))
    if moved:
        _perturb(p for p in adapted.parameters() if p.requires_grad)
    return adapted.eval()


def tokens() -> np.ndarray:
    """Two rows of token ids."""
    return np.random.RandomState(0).randint(3, 256, (2, 17))


def logits_mlx(model: Any) -> np.ndarray:
    """Our logits on :func:`tokens`, fp32."""
    return np.array(model(mx.array(tokens())).astype(mx.float32))


def logits_torch(model: Any) -> np.ndarray:
    """Their logits on :func:`tokens`, fp32."""
    with torch.no_grad(), quiet():
        return model(torch.tensor(tokens())).logits.float().numpy()


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def trained_by_peft(model: peft.PeftModel) -> dict[str, np.ndarray]:
    """Trainable arrays by the key PEFT saves them under, in ``named_parameters()`` order."""
    found = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            key = name.replace(".default", "").replace("modules_to_save.", "")
            found[key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")] = value.detach().numpy()
    return found


def _perturb(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
