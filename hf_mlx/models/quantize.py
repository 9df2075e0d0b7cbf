"""4- and 8-bit bases for QLoRA: MLX's affine quantisation in place of bitsandbytes."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from ..errors import ModelError
from ..settings.plan import ModelPlan
from .bitsandbytes import is_four_bit

_BITS = (2, 3, 4, 5, 6, 8)


def quantize_base(model: nn.Module, plan: ModelPlan, config: dict[str, Any]) -> list[str]:
    """Quantises the Linear layers of a floating-point model in place, the head and embeddings excepted.

    bitsandbytes also leaves the head in floating point (transformers 5.23 ``get_keys_to_not_convert``).

    Args:
        model: The loaded model.
        plan: ``quantization_bits`` (None for no quantisation) and ``quantization_group_size``.
        config: HF config as written; an already quantised checkpoint says so there.

    Returns:
        ADAPT lines to say once.
    """
    bits, group = plan.quantization_bits, plan.quantization_group_size
    if bits is None:
        return _describe(config.get("quantization"))
    if bits not in _BITS:
        raise ModelError(f"quantization_bits={bits}", f"one of {_BITS}", "load_in_4bit=True")
    if bits == 4 and is_four_bit(config):
        # As in transformers, the checkpoint's own quantisation counts.
        return []
    if config.get("quantization") or config.get("quantization_config"):
        raise ModelError(
            f"a {bits}-bit request for a checkpoint that is quantised already",
            "one quantisation",
            "remove quantization_config= (the checkpoint's own quantisation is kept)",
        )
    skipped = [0]

    def takes(path: str, module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear) or path.split(".")[-1] == "lm_head":
            return False
        fits = module.weight.shape[-1] % group == 0
        skipped[0] += not fits
        return fits

    nn.quantize(model, group_size=group, bits=bits, class_predicate=takes)
    line = f"quantisation: MLX affine {bits}-bit in groups of {group} stands in for bitsandbytes"
    if skipped[0]:
        line += f" ({skipped[0]} layer(s) whose width is not a multiple of {group} stay in floating point)"
    return [line]


def _describe(quantization: Any) -> list[str]:
    if not isinstance(quantization, dict) or "bits" not in quantization:
        return []
    return [
        f"the base is quantised to {quantization['bits']} bits for MLX: the curve is that of these weights, and the "
        "adapter stays in fp32, where trl casts it to bf16 over a quantised base"
    ]
