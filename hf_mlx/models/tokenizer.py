"""The tokenizer beside a model, through transformers' own AutoTokenizer (which needs no torch)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..settings.plan import ModelPlan

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


def load_tokenizer(path: str | Path, plan: ModelPlan) -> Any:
    """Loads the tokenizer of a model folder.

    Args:
        path: The model's folder (:attr:`LoadedModel.path`).
        plan: ``trust_remote_code`` applies to the tokenizer only.

    Returns:
        A transformers ``PreTrainedTokenizerBase``.

    Raises:
        ModelError: The folder has no tokenizer, or one that transformers cannot read.
    """
    folder = Path(path)
    if not any((folder / name).exists() for name in _FILES):
        raise ModelError(
            f"{folder}: no tokenizer ({', '.join(_FILES[:3])} …)",
            "a tokenizer beside the model, or processing_class=",
            'MLXSFTTrainer(…, processing_class=AutoTokenizer.from_pretrained("owner/name")), or '
            f'tokenizer.save_pretrained("{folder}")',
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=plan.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{folder}: a tokenizer with Python code of its own",
                "your word that the code may run",
                "SFTConfig(trust_remote_code=True), once you have read it",
            ) from error
        raise ModelError(
            f"{folder}: transformers cannot read the tokenizer ({' '.join(str(error).split())[:200]})",
            "tokenizer files that AutoTokenizer.from_pretrained reads",
            f'save it again: tokenizer.save_pretrained("{folder}")',
        ) from error
