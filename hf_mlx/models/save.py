"""Writing a whole model as a folder that ``AutoModelForCausalLM.from_pretrained`` loads."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..atomic import staged
from ..errors import ModelError
from ..intake import lies
from .config import FILES
from .load import LoadedModel
from .spelling import spell_out

WEIGHTS = "model.safetensors"
_DTYPES = {mx.float32: "float32", mx.bfloat16: "bfloat16", mx.float16: "float16"}


def write_model(loaded: LoadedModel, folder: str | Path, params: Mapping[str, mx.array] | None = None) -> None:
    """Write weights under HF names and layouts, generation_config.json, and a config.json that mlx-lm reads alike.

    Nothing is seen of it before all of it is on disk (:func:`hf_mlx.atomic.staged`).

    Args:
        loaded: The model.
        folder: Where to write; created if needed.
        params: Flat {MLX name: array}; None takes what is in the model.

    What the base stores and MLX does not load (a vision tower) is copied as it is.

    Raises:
        ModelError: The weights are quantised, or a part that transformers would look for is not in the base.
    """
    folder = Path(folder)
    _check_whole(loaded)
    params = dict(tree_flatten(loaded.model.parameters())) if params is None else params
    weights = loaded.names.export_weights(params)
    config = _config(loaded, weights)
    weights |= loaded.names.load_untouched(loaded.path)
    # A pending read of the very file that is replaced below would read the new bytes.
    mx.eval(weights)
    with staged(folder, ModelError) as temporary:
        (temporary / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        source = loaded.path / "generation_config.json"
        if lies(source) and not loaded.scores:
            (temporary / source.name).write_bytes(FILES.read_bytes(source))
        mx.save_safetensors(str(temporary / WEIGHTS), weights, metadata={"format": "pt"})


def _check_whole(loaded: LoadedModel) -> None:
    from transformers import CONFIG_MAPPING

    # mlx-lm leaves vision_config out of the config.json it writes, so the class has to tell.
    known = loaded.model_type in CONFIG_MAPPING
    parts: Any = CONFIG_MAPPING[loaded.model_type].sub_configs if known else {}
    towers = [key for key in ("vision_config", "audio_config") if key in parts]
    if loaded.names.converted and towers:
        raise ModelError(
            f"{loaded.path}, which mlx-lm converted without what {towers[0]} describes",
            "a base with every part, which AutoModelForCausalLM would otherwise fill with random weights",
            "train from the original Hugging Face folder, or save the adapter alone (nothing was written)",
        )


def _config(loaded: LoadedModel, weights: Mapping[str, mx.array]) -> dict[str, Any]:
    left_out = ("quantization", "quantization_config", "torch_dtype")
    config = {key: copy.copy(value) for key, value in loaded.config.items() if key not in left_out}
    dtypes = {value.dtype for value in weights.values() if mx.issubdtype(value.dtype, mx.floating)}
    if loaded.untied:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict) and (part is config or part.get("tie_word_embeddings")):
                part["tie_word_embeddings"] = False
    if len(dtypes) == 1:
        config["dtype"] = _DTYPES[dtypes.pop()]
    return spell_out(config)
