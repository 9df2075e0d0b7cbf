"""What a trainer writes into the config of the model that it trains."""

from __future__ import annotations

from typing import Any

from ..intake import lies
from ..models.config import FILES, check_generation_config
from ..models.load import LoadedModel


def record_settings(
    config: Any, loaded: LoadedModel, *, use_cache: bool, aux_coefficient: float | None, routers: bool = True
) -> None:
    """Write ``use_cache`` and the routers' loss into ``config``, and into what is saved.

    Sources: transformers 5.23 ``Trainer.__init__`` for ``use_cache``; trl 1.16 ``SFTTrainer.__init__`` for
    ``output_router_logits`` and ``router_aux_loss_coef`` of mixture-of-experts models.

    Args:
        config: The config object that scripts see.
        loaded: Its own config is what ``config.json`` is written from.
        use_cache: ``args.use_cache``.
        aux_coefficient: ``args.router_aux_loss_coef``; None keeps the config's own.
        routers: Whether the trainer is one that writes the routers' loss.
    """
    config.use_cache = loaded.config["use_cache"] = use_cache
    text = config.get_text_config()
    if not routers or not hasattr(text, "router_aux_loss_coef"):
        return
    if aux_coefficient is not None:
        text.router_aux_loss_coef = aux_coefficient
    enabled = hasattr(text, "output_router_logits") and text.router_aux_loss_coef != 0.0
    text.output_router_logits = enabled
    saved = loaded.config.get("text_config") or loaded.config
    saved.update(output_router_logits=enabled, router_aux_loss_coef=text.router_aux_loss_coef)


def is_known(loaded: LoadedModel) -> bool:
    """Whether transformers has a class for the model's config."""
    from transformers import CONFIG_MAPPING

    # The mapping is lazy: its get() knows nothing that has not been imported yet.
    return loaded.model_type in CONFIG_MAPPING


def read_config(loaded: LoadedModel, name: str) -> Any:
    """The model's config as transformers' class for it, which says that it was loaded from ``name``."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    kind = CONFIG_MAPPING[loaded.model_type] if is_known(loaded) else PretrainedConfig
    values = {k: v for k, v in loaded.config.items() if k not in ("quantization", "quantization_config")}
    return kind.from_dict(values, name_or_path=name)


def read_generation_config(loaded: LoadedModel, config: Any) -> Any:
    """The model's generation config, or the one that ``config`` stands for."""
    from transformers import GenerationConfig

    path = loaded.path / "generation_config.json"
    if lies(path):
        check_generation_config(loaded.path)
        with FILES.understood(path, "a file that GenerationConfig.from_pretrained reads"):
            return GenerationConfig.from_pretrained(loaded.path)
    return GenerationConfig.from_model_config(config)
