"""The torch model of a config, without its weights: its modules and their order, as PEFT sees them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from ..errors import ModelError


def has_skeletons() -> bool:
    """Whether torch and transformers are there to build one."""
    return find_spec("torch") is not None and find_spec("transformers") is not None


def build_skeleton(config: Mapping[str, Any]) -> Any:
    """The torch model of a config.json on torch's meta device, of the class that trl builds.

    Its parameters come in another order, and sometimes under other names, than the tensors of the files.

    Raises:
        ModelError: transformers cannot build the model.
    """
    import torch
    import transformers

    try:
        built = type(transformers.AutoConfig.for_model(config["model_type"])).from_dict(dict(config))
        named = getattr(transformers, (built.architectures or [""])[0], None)
        with torch.device("meta"):
            return named(built) if named else transformers.AutoModelForCausalLM.from_config(built)
    except Exception as error:
        raise ModelError(
            f"a model that transformers cannot build: {type(error).__name__}: {error}",
            "a config.json that transformers knows",
            "a newer transformers, or SFTConfig(save_only_model=True)",
        ) from error
