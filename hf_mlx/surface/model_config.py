"""What a trainer writes into the config of the model that it trains."""

from __future__ import annotations

from typing import Any

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
