"""What is compared between a transformers model and the model loaded here, as numbers."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from architecture_zoo import make_ids
from mlx.utils import tree_flatten
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from hf_mlx.models.heads import split_head
from hf_mlx.models.load import LoadedModel, load_model
from hf_mlx.models.masks import packed_cache
from hf_mlx.settings.plan import ModelPlan


@dataclass(frozen=True)
class Comparison:
    """One model against torch. Differences are relative to the largest value of their kind."""

    logits: float
    loss: float
    gradient: float
    worst_tensor: str
    tensors: int
    changed_on_export: tuple[str, ...]
    missing_on_export: tuple[str, ...]
    head_splits: bool | None
    packed: float | None


def load_quietly(folder: Path, plan: ModelPlan | None = None) -> LoadedModel:
    """Loads without the warning that an unknown type gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return load_model(folder, plan or ModelPlan())


def compare(
    model: torch.nn.Module,
    folder: Path,
    packs: bool = False,
    ids: torch.Tensor | None = None,
    exact: bool = False,
) -> Comparison:
    """Saves ``model`` into ``folder``, loads it here and compares logits, gradients, names and the head.

    Gradients are compared with torch's own in fp32, or, ``exact``, with those that torch computes in float64.
    """
    model.save_pretrained(folder / "model")
    loaded = load_quietly(folder / "model")
    stored = read_tensors(folder / "model")
    ids = make_ids() if ids is None else ids
    inputs = mx.array(ids.numpy())
    double = copy.deepcopy(model).double() if exact else None
    logits, loss, gradients = torch_pass(model, ids, folder / "gradients")
    if double is not None:
        double.set_experts_implementation("eager")  # the grouped product has no float64
        with _Doubled():
            gradients = torch_pass(double, ids, folder / "exact")[2]
    ours = loaded.model(inputs)
    exported = loaded.names.export_weights(dict(tree_flatten(loaded.model.parameters())))
    our_loss, our_gradients = mlx_pass(loaded, inputs)
    worst, name = _worst_gradient(our_gradients, gradients, loaded)
    return Comparison(
        logits=relative(np.array(ours), logits),
        loss=abs(our_loss - loss) / abs(loss),
        gradient=worst,
        worst_tensor=name,
        tensors=len(exported),
        changed_on_export=tuple(k for k, v in exported.items() if not np.array_equal(np.array(v), stored[k].numpy())),
        missing_on_export=tuple(set(stored) - set(exported) - loaded.names.untouched),
        head_splits=_head_splits(loaded, inputs),
        packed=_packed_difference(loaded, inputs) if packs else None,
    )


class _Doubled(TorchFunctionMode):
    """Whatever a model casts to float32 is float64 inside."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        wide = {torch.float32: torch.float64}
        args = tuple(wide[a] if isinstance(a, torch.dtype) and a in wide else a for a in args)
        named = {k: wide[v] if isinstance(v, torch.dtype) and v in wide else v for k, v in (kwargs or {}).items()}
        return func(*args, **named)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest magnitude."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that save_pretrained wrote."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def torch_pass(model: torch.nn.Module, ids: torch.Tensor, folder: Path) -> tuple[np.ndarray, float, dict]:
    """Logits, loss and gradients; these under checkpoint names, because transformers itself saves them."""
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    width = logits.shape[-1]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, width), ids[:, 1:].reshape(-1))
    loss.backward()
    for parameter in model.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.data = gradient
    model.save_pretrained(folder)
    return logits.detach().numpy(), loss.item(), read_tensors(folder)


def mlx_pass(loaded: LoadedModel, inputs: mx.array) -> tuple[float, dict[str, mx.array]]:
    """Loss and gradients through ``mx.compile`` in training mode, gradients under checkpoint names."""
    model = loaded.model
    model.train()

    def loss_of(parameters: dict) -> mx.array:
        model.update(parameters)
        logits = model(inputs)
        return nn.losses.cross_entropy(logits[:, :-1].astype(mx.float32), inputs[:, 1:], reduction="mean")

    parameters = model.parameters()
    loss, gradients = mx.compile(mx.value_and_grad(loss_of))(parameters)
    mx.eval(loss, gradients)
    model.update(parameters)
    model.eval()
    return loss.item(), loaded.names.export_weights(dict(tree_flatten(gradients)))


def _worst_gradient(ours: dict, theirs: dict, loaded: LoadedModel) -> tuple[float, str]:
    buffers = {n for path in loaded.buffers for n in loaded.names.to_hf_names(path)}
    largest = max(float(theirs[k].abs().max()) for k in ours)
    worst = (0.0, "")
    for name, gradient in ours.items():
        if name in buffers:
            continue
        # A tensor whose gradient is a hundredth of the model's largest is judged on that scale.
        scale = max(float(theirs[name].abs().max()), 1e-2 * largest)
        difference = float(np.abs(np.array(gradient) - theirs[name].double().numpy()).max()) / scale
        worst = max(worst, (difference, name))
    return worst


def _head_splits(loaded: LoadedModel, inputs: mx.array) -> bool | None:
    parts = split_head(loaded)
    if parts is None:
        return None
    backbone, head = parts
    return bool(mx.array_equal(head(loaded.model, backbone(loaded.model, inputs)), loaded.model(inputs)))


def _packed_difference(loaded: LoadedModel, inputs: mx.array) -> float:
    cut = 10
    apart = mx.concatenate([loaded.model(inputs[:, :cut]), loaded.model(inputs[:, cut:])], axis=1)
    segments = mx.broadcast_to((mx.arange(inputs.shape[1]) >= cut).astype(mx.int32), inputs.shape)
    packed = mx.compile(lambda ids, seg: loaded.model(ids, cache=packed_cache(loaded.model, seg)))(inputs, segments)
    return relative(np.array(packed), np.array(apart))
