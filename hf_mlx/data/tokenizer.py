"""The tokenizer a run uses: its EOS, its padding and its chat template, resolved as TRL resolves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ModelError, SettingError
from ..intake import Intake, lies
from ..settings.plan import DataPlan


def prepare_tokenizer(tokenizer: Any, plan: DataPlan) -> Any:
    """Sets ``eos_token``, ``pad_token`` and the chat template on the tokenizer, and returns it.

    The tokenizer is changed in place, as TRL changes ``processing_class``, since it is the one saved beside the
    model. Calling twice changes nothing more. Padding falls back to the tokenizer's own pad token, then to EOS
    (trl 1.16 ``SFTTrainer.__init__``).

    Args:
        tokenizer: A transformers tokenizer.
        plan: ``eos_token``, ``pad_token`` and ``chat_template_path`` are read.

    Raises:
        ModelError: Not a tokenizer, or one with neither a pad nor an EOS token.
        SettingError: A token outside the vocabulary, or a chat template that is not a Jinja file.
    """
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        inner = " (it has a tokenizer inside)" if hasattr(tokenizer, "tokenizer") else ""
        raise ModelError(
            f"processing_class is a {type(tokenizer).__name__}{inner}",
            "a transformers tokenizer; processors of image and audio models are not trained here",
            "processing_class=processor.tokenizer" if inner else "AutoTokenizer.from_pretrained(model)",
        )
    vocabulary = tokenizer.get_vocab()
    if plan.eos_token is not None:
        _check_token("eos_token", plan.eos_token, vocabulary)
        tokenizer.eos_token = plan.eos_token
    pad_token: Any = plan.pad_token or tokenizer.pad_token or tokenizer.eos_token
    if pad_token is None:
        raise missing_eos(tokenizer)
    _check_token("pad_token", pad_token, vocabulary)
    if tokenizer.pad_token != pad_token:
        tokenizer.pad_token = pad_token
    if plan.chat_template_path is not None:
        tokenizer.chat_template = _read_template(plan.chat_template_path)
    return tokenizer


def missing_eos(tokenizer: Any) -> ModelError:
    """The error for a tokenizer without EOS, where one is needed to end texts or to pad."""
    return ModelError(
        f"{type(tokenizer).__name__} has no EOS token",
        "an EOS token: it ends each text, and without it a model never learns to stop",
        "SFTConfig(eos_token='</s>'), with a token of the vocabulary",
    )


def _check_token(field: str, token: str, vocabulary: dict[str, int]) -> None:
    if token not in vocabulary:
        raise SettingError(
            f"{field}={token!r}, which is not in the tokenizer's vocabulary of {len(vocabulary):,} tokens",
            f"a {field} the vocabulary holds, so that it is one token with a trained embedding",
            f"SFTConfig({field}={next(iter(vocabulary), '</s>')!r}), or leave {field} unset",
        )


def _read_template(path: str) -> str:
    file = Path(path)
    if file.suffix not in (".jinja", ".j2"):
        raise SettingError(
            f"chat_template_path={path!r}, the path of a tokenizer",
            "a Jinja file: cloning another tokenizer's template adds tokens and resizes the embeddings",
            "write the template to a file: open('chat.jinja', 'w').write(other_tokenizer.chat_template), then "
            "SFTConfig(chat_template_path='chat.jinja')",
        )
    if not lies(file):
        raise SettingError(
            f"chat_template_path={path!r}, which does not exist",
            "a .jinja or .j2 file",
            f"check the folder: {str(file.parent.absolute())!r}",
        )
    return Intake(SettingError, "SFTConfig(chat_template_path='chat.jinja') with a Jinja file").read_text(file)
