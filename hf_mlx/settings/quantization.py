"""How a request for a quantised base (bitsandbytes on CUDA) is read, whatever object carries it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .verdicts import Case, Values, adapted, given, honoured, otherwise, refused

# Set on a model that was to be quantised on loading, by who loaded it in floating point instead.
REQUESTED_BITS = "_hf_mlx_requested_bits"

# MLX's affine quantisation and bitsandbytes' NF4 both scale groups of 64 weights by default.
GROUP_SIZE = 64


_ATTRIBUTES = (
    "quant_method",
    "load_in_4bit",
    "load_in_8bit",
    "llm_int8_skip_modules",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
)


def read_quantization(config: Any) -> dict[str, Any]:
    """A ``BitsAndBytesConfig``, or another quantization config, as a dict of what matters here."""
    found = {key: _get(config, key) for key in _ATTRIBUTES}
    method = found["quant_method"]
    found["quant_method"] = getattr(method, "value", method)
    return {key: value for key, value in found.items() if value}


def read_bits(config: Any) -> int | None:
    """The width a ``BitsAndBytesConfig`` (or its dict) asks for: 4, 8, or None when it asks for none."""
    for bits in (4, 8):
        if _get(config, f"load_in_{bits}bit"):
            return bits
    return None


def _get(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def _is_bitsandbytes(config: Any, values: Values) -> bool:
    return "bitsandbytes" in str(_get(config, "quant_method") or "bitsandbytes")


QUANTIZATION_CASES: tuple[Case, ...] = (
    given("None", lambda config, values: config is None, honoured("off")),
    given(
        "another method than bitsandbytes",
        lambda config, values: not _is_bitsandbytes(config, values),
        refused(
            "is a CUDA format that MLX does not read",
            write="quantization_config=BitsAndBytesConfig(load_in_4bit=True), or a model converted by mlx-lm",
        ),
    ),
    given(
        "BitsAndBytesConfig with llm_int8_skip_modules",
        lambda config, values: bool(_get(config, "llm_int8_skip_modules")),
        refused(
            "leaves some layers unquantised, which is not implemented",
            write="quantization_config=BitsAndBytesConfig(load_in_4bit=True), without llm_int8_skip_modules",
        ),
    ),
    given(
        "BitsAndBytesConfig, 4 or 8 bits",
        lambda config, values: read_bits(config) is not None,
        adapted(
            "becomes MLX affine quantisation with groups of 64, where NF4 and LLM.int8 round otherwise, and the "
            "adapter stays in fp32, where trl casts it to bf16 over a quantised base: the curve differs",
            write="quantization_config=None",
            changes_numbers=True,
        ),
    ),
    otherwise(honoured("asks for no quantization")),
)
