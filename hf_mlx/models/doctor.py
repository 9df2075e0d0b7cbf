"""``hf-mlx doctor MODEL``: does this checkpoint compute here what it computes in transformers?"""

from __future__ import annotations

import platform
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..backends import macos_version
from ..blas import load_openblas
from ..device import on_cpu
from ..errors import MissingDependency, ModelError
from ..intake import describe
from ..settings.plan import ModelPlan
from ..version import find_version
from .config import FILES
from .heads import layers
from .load import LoadedModel, load_model
from .source import resolve_folder
from .tensor_parallel import describe_split

# fp32 on both sides: a right model differs by 1e-7 to 2e-5, a wrong one by 1e-3 and more.
TOLERANCE = 1e-4
# torch's own fp32 gradient lies 1e-4 from its fp64 one on a vocabulary of 262,000; a wrong one by 1e-2 and more.
GRADIENT_TOLERANCE = 1e-3
_LENGTH = 32
_PACKAGES = ("hf-mlx", "mlx", "mlx-lm", "transformers", "torch", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found. Prints as a report.

    Attributes:
        model: The folder.
        model_type: HF model type.
        state: ``"verified"`` or ``"unknown"`` among the architectures.
        logits: Largest logit difference over the largest logit, on 32 tokens in fp32.
        gradient: The same for one weight's gradient; None where that weight has no counterpart.
        gradient_of: HF name of that weight.
        environment: Device, BLAS and versions, and over how many processes the model may be split, by name.
    """

    model: str
    model_type: str
    state: str
    logits: float
    gradient: float | None
    gradient_of: str | None
    environment: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether both differences are within their tolerance."""
        return self.logits < TOLERANCE and (self.gradient is None or self.gradient < GRADIENT_TOLERANCE)

    def __str__(self) -> str:
        gradient = (
            "not compared"
            if self.gradient is None
            else f"{self.gradient:.1e}, limit {GRADIENT_TOLERANCE:.0e} ({self.gradient_of})"
        )
        rows = {
            "model": self.model,
            "model type": f"{self.model_type} ({self.state})",
            **self.environment,
            "logits": f"{self.logits:.1e} relative to torch, limit {TOLERANCE:.0e}",
            "gradient": gradient,
            "verdict": "computes what transformers computes" if self.ok else "WRONG: do not train this model here",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def diagnose(path_or_id: str | Path, plan: ModelPlan | None = None) -> Diagnosis:
    """Compares logits and one gradient with torch, on the user's own checkpoint.

    Both models are loaded in fp32, one after the other: the larger of the two must fit in memory.

    Args:
        path_or_id: Local folder or hub id.
        plan: Revision and token; the dtype is always fp32.

    Raises:
        MissingDependency: torch is not installed.
        ModelError: The model does not load, here or in transformers.
    """
    _require_torch()
    plan = ModelPlan(revision=plan.revision, token=plan.token) if plan else ModelPlan()
    folder = resolve_folder(path_or_id, plan)
    with warnings.catch_warnings():
        # The warning for an unknown type names this very command.
        warnings.simplefilter("ignore", UserWarning)
        loaded = load_model(folder, plan)
    ids = _ids(loaded)
    weight = _comparable_weight(loaded)
    ours, our_gradient = _mlx_pass(loaded, ids, weight)
    if not np.isfinite(ours).all():
        raise FILES.refuse(folder, "its logits are NaN or infinite", "finite weights")
    name = loaded.names.to_hf_module(weight) + ".weight" if weight else None
    theirs, their_gradient = _torch_pass(loaded, ids, name)
    comparable = our_gradient is not None and their_gradient is not None
    return Diagnosis(
        model=str(folder),
        model_type=loaded.model_type,
        state=loaded.state,
        logits=_relative(ours, theirs),
        gradient=_relative(our_gradient, their_gradient) if comparable else None,
        gradient_of=name if comparable else None,
        environment=environment() | {"tensor parallel": describe_split(loaded)},
    )


def environment() -> dict[str, str]:
    """Device, BLAS and package versions, for bug reports."""
    return {
        "machine": f"{_system()} {platform.machine()}, Python {platform.python_version()}",
        "device": _device(),
        "BLAS": _blas(),
        "versions": ", ".join(f"{package} {find_version(package) or 'not installed'}" for package in _PACKAGES),
    }


def _system() -> str:
    version = macos_version()
    return platform.system() if version is None else f"macOS {version[0]}.{version[1]}"


def _device() -> str:
    name = str(mx.default_device())
    if on_cpu():
        return name
    info: dict[str, Any] = dict(mx.device_info())
    sizes = [
        f"{info[key] / 2**30:.0f} GiB {what}"
        for key, what in (("memory_size", "of memory"), ("max_recommended_working_set_size", "of it recommended"))
        if key in info
    ]
    return ", ".join([name, *(str(info[key]) for key in ("device_name",) if key in info), *sizes])


def _blas() -> str:
    if platform.system() == "Darwin":
        return "Accelerate"
    if mx.default_device() == mx.Device(mx.gpu):
        return "cuBLAS"
    return "OpenBLAS" if load_openblas() else "MLX's bundled reference BLAS (slow on a CPU: install libopenblas)"


def _require_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "hf-mlx doctor without torch", "torch, to compute the same model in transformers", "pip install hf-mlx[hf]"
        ) from error


def _ids(loaded: LoadedModel) -> np.ndarray:
    text = loaded.config.get("text_config") or loaded.config
    vocabulary = text.get("vocab_size") or loaded.config.get("vocab_size") or 1000
    return np.random.default_rng(0).integers(0, vocabulary, size=(1, _LENGTH))


def _comparable_weight(loaded: LoadedModel) -> str | None:
    """A plain Linear of the last block that is one module on both sides."""
    block = layers(loaded.model)[-1]
    prefix = next(name for name, module in loaded.model.named_modules() if module is block)
    for name, module in sorted(block.named_modules()):
        path = f"{prefix}.{name}"
        if type(module) is nn.Linear and len(loaded.names.to_hf_modules(path)) == 1:
            return path
    return None


def _mlx_pass(loaded: LoadedModel, ids: np.ndarray, weight: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    model, inputs = loaded.model, mx.array(ids)
    logits = np.array(model(inputs).astype(mx.float32))
    if weight is None:
        return logits, None
    model.freeze()
    dict(model.named_modules())[weight].unfreeze(recurse=False, keys="weight")

    def loss(model: nn.Module) -> mx.array:
        return _cross_entropy(model(inputs)[0, :-1].astype(mx.float32), inputs[0, 1:])

    _, gradients = nn.value_and_grad(model, loss)(model)
    exported = dict(tree_flatten(gradients))
    return logits, np.array(exported[f"{weight}.weight"].astype(mx.float32))


def _cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Mean cross-entropy of (T, V) logits, summed over the vocabulary by a matrix product.

    mlx 0.32's CPU logsumexp and softmax add the terms one after the other: 4e-5 off at 49,000 entries and 1e-3 at
    262,000, which would hide what is looked for here.
    """
    shifted = logits - mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    total = mx.exp(shifted) @ mx.ones((shifted.shape[-1], 1))
    chosen = mx.take_along_axis(shifted, targets[:, None], axis=-1)
    return mx.mean(mx.log(total) - chosen)


def _torch_pass(loaded: LoadedModel, ids: np.ndarray, weight: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    import torch
    import transformers

    # As trl does (trl 1.16 create_model_from_path): the class that the config names.
    name = (loaded.config.get("architectures") or [""])[0]
    cls = getattr(transformers, name, transformers.AutoModelForCausalLM)
    try:
        model = cls.from_pretrained(str(loaded.path), dtype=torch.float32).eval()
    except Exception as error:  # each class and each tokenizer raises what it likes
        raise ModelError(
            f"{loaded.path}: transformers cannot load it ({describe(error)})",
            "a checkpoint that both libraries read, to compare them",
            "an MLX-converted folder has no torch counterpart: run doctor on the original model",
        ) from error
    model.requires_grad_(False)
    parameter = dict(model.named_parameters()).get(weight or "")
    if parameter is not None:
        parameter.requires_grad_(True)
    inputs = torch.from_numpy(ids)
    with torch.set_grad_enabled(parameter is not None):
        logits = model(input_ids=inputs, use_cache=False).logits
        gradient = None
        if parameter is not None:
            loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), inputs[0, 1:])
            gradient = _two_dimensional(torch.autograd.grad(loss, parameter)[0], name).numpy()
    return logits.detach().numpy(), gradient


def _two_dimensional(gradient: Any, architecture: str) -> Any:
    # GPT-2's Conv1D keeps its weight as (in, out).
    return gradient.T if architecture.startswith("GPT2") else gradient


def _relative(ours: Any, theirs: Any) -> float:
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))
