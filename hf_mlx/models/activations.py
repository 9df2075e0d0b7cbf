"""Which activation each model type's mlx-lm code has built in, checked against the config's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ModelError

_SILU = frozenset({"silu", "swish"})
_TANH_GELU = frozenset({"gelu_pytorch_tanh", "gelu_new", "gelu_fast"})
_KEYS = ("hidden_act", "hidden_activation", "activation_function", "activation", "mlp_hidden_act")
# Of mixers beside the MLP: a SiLU in mlx-lm, whatever the type.
_MIXER_KEYS = ("mamba_hidden_act",)

_RELU2 = frozenset({"relu2"})

# Everything not named here is a gated SiLU in mlx-lm. ``None``: overrides.activations computes what the config names.
_BUILT_IN: dict[str, frozenset[str] | None] = {
    **dict.fromkeys(("arcee", "bitnet", "cwm", "falcon", "llama", "ministral", "mistral", "nanochat", "opt")),
    "gemma": None,
    "starcoder2": None,
    "gpt_bigcode": None,
    "gpt_neox": None,
    "gemma2": _TANH_GELU,
    "gemma3_text": _TANH_GELU,
    "gemma3": _TANH_GELU,
    "gemma4_text": _TANH_GELU,
    "gemma4": _TANH_GELU,
    "recurrent_gemma": _TANH_GELU,
    "phi": _TANH_GELU,
    "gpt2": _TANH_GELU,
    "gptj": _TANH_GELU,
    "nemotron": _RELU2,
    "nemotron_h": _RELU2,
    "apertus": frozenset({"xielu"}),
}


def check_activation(model_type: str, config: dict[str, Any], folder: Path) -> None:
    """Refuses an activation that the model code would replace by its own.

    Raises:
        ModelError: Names the key and both activations.
    """
    allowed = _BUILT_IN.get(model_type, _SILU)
    if allowed is None:
        from .overrides.activations import ACTIVATIONS

        allowed = frozenset(ACTIVATIONS)
    for key in (*_KEYS, *_MIXER_KEYS):
        value, known = config.get(key), _SILU if key in _MIXER_KEYS else allowed
        if value is not None and value not in known:
            raise ModelError(
                f"{folder}: config.json has {key}={value!r}",
                f"one of {sorted(known)}, which is what the MLX code of {model_type!r} computes",
                "train this checkpoint with trl.SFTTrainer",
            )
