"""Multimodal models of which the text part alone is built: its config in the words of its own type."""

from __future__ import annotations

from .contract import DIALECTS, Config, speaks


@speaks("llava", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe")
def _text_inside(config: Config) -> Config:
    text = config["text_config"]
    # transformers 5 ties by the outer config alone.
    text["tie_word_embeddings"] = bool(config.get("tie_word_embeddings"))
    dialect = DIALECTS.get(text["model_type"])
    config["text_config"] = dialect(text) if dialect else text
    return config
