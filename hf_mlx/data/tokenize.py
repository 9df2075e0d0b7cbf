"""Text and conversations to token ids: many rows a call where that cannot change an id, one by one elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .faults import MAX_CHARACTERS, RowFault, drop_row, show

# Keyword arguments of apply_chat_template that act on tokenizing, so a row that sets one is tokenized by itself.
_TOKENIZING = {"padding", "truncation", "max_length", "tokenizer_kwargs", "sanitize_control_tokens", "return_tensors"}


@dataclass(frozen=True)
class Chat:
    """One conversation and what its row says about rendering it."""

    messages: list[dict[str, Any]]
    column: str
    row: int
    tools: list[Any] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def parse_tools(tools: Any, row: int) -> list[Any] | None:
    """A row's ``tools``: a list, None, or either of them as JSON text."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise RowFault(
                row, "tools", f"text that is not JSON ({error})", "a list of tools, or one as JSON", "json.dumps(tools)"
            ) from None
    if tools is not None and not isinstance(tools, list):
        raise RowFault(row, "tools", show(tools), "a list of tools, or one as JSON", "put the tool in a list: [tool]")
    return tools


def parse_kwargs(kwargs: Any, row: int) -> Mapping[str, Any]:
    """A row's ``chat_template_kwargs``; None, which Arrow stores for rows without any, is empty."""
    if kwargs is not None and not isinstance(kwargs, Mapping):
        remedy = "for example {'enable_thinking': False}"
        raise RowFault(row, "chat_template_kwargs", show(kwargs), "a dict of template variables", remedy)
    return kwargs or {}


def check_text(text: Any, column: str, row: int) -> str:
    """Returns ``text``, or raises :class:`RowFault` where it is no text or far too much of it."""
    if not isinstance(text, str):
        raise RowFault(row, column, show(text), "a string", drop_row())
    if len(text) > MAX_CHARACTERS:
        raise RowFault(
            row,
            column,
            f"a text of {len(text):,} characters",
            f"at most {MAX_CHARACTERS:,} characters in a row",
            "split it into rows: [text[i:i + 100_000] for i in range(0, len(text), 100_000)]",
        )
    return text


def tokenize_texts(tokenizer: Any, texts: Sequence[str], columns: Sequence[str], *, special: bool) -> Any:
    """Token ids of each text, as the tokenizer alone gives them.

    Args:
        tokenizer: A transformers tokenizer.
        texts: The texts, one a row.
        columns: The column each came from, for errors.
        special: Whether BOS and EOS are added as the tokenizer is set up to.

    Returns:
        The tokenizer's own encoding of the batch; ``["input_ids"]`` is a list of lists.
    """
    call = {"add_special_tokens": special}
    if is_standard(tokenizer):
        call |= {"return_attention_mask": False, "return_token_type_ids": False}
    try:
        return tokenizer(list(texts), **call)
    except Exception as error:
        for row, text in enumerate(texts):
            try:
                tokenizer(text, **call)
            except Exception as cause:
                raise _untokenizable(text, columns[row], row, cause) from cause
        raise error


def _untokenizable(text: str, column: str, row: int, cause: Exception) -> RowFault:
    surrogates = [f"U+{ord(c):04X} at {i}" for i, c in enumerate(text) if 0xD800 <= ord(c) <= 0xDFFF][:3]
    if surrogates:
        received, remedy = f"a lone surrogate, {', '.join(surrogates)}", "text.encode('utf-8', 'replace').decode()"
        return RowFault(row, column, received, "text that UTF-8 can hold", remedy)
    received = f"the tokenizer failed on {show(text)}: {type(cause).__name__}: {cause}"
    return RowFault(row, column, received, "text the tokenizer can encode", drop_row())


def is_standard(tokenizer: Any) -> bool:
    """Whether a tokenizer keeps transformers' own call, so a batch gives what single rows give."""
    from transformers import PreTrainedTokenizerBase

    kind = type(tokenizer)
    return (
        kind.apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
        and kind.__call__ is PreTrainedTokenizerBase.__call__
    )


def apply_template(tokenizer: Any, chat: Chat, template: str | None, **options: Any) -> Any:
    """``tokenizer.apply_chat_template`` on one row, as trl 1.16 ``SFTTrainer`` calls it; a failure names the row."""
    settings = {"chat_template": template, "tools": chat.tools, **chat.kwargs}
    try:
        return tokenizer.apply_chat_template(chat.messages, **options, **settings)
    except Exception as cause:
        received = f"the chat template failed: {type(cause).__name__}: {cause}"
        required = "messages, tools and chat_template_kwargs that the template renders"
        raise RowFault(chat.row, chat.column, received, required, drop_row()) from cause


def render_chats(tokenizer: Any, chats: Sequence[Chat], template: str | None, prompt: bool) -> list[str]:
    """The text of each conversation; ``prompt`` ends it with the assistant's header."""
    extra = {"add_generation_prompt": True} if prompt else {}
    texts = [apply_template(tokenizer, chat, template, tokenize=False, **extra) for chat in chats]
    for chat, text in zip(chats, texts, strict=True):
        check_text(text, chat.column, chat.row)
    return texts


def tokenize_chats(tokenizer: Any, chats: Sequence[Chat], template: str | None, *, prompt: bool) -> list[list[int]]:
    """Token ids of each conversation, equal to ``apply_chat_template(tokenize=True)`` row by row."""
    if is_standard(tokenizer) and not any(_TOKENIZING & set(chat.kwargs) for chat in chats):
        texts = render_chats(tokenizer, chats, template, prompt)
        return tokenize_texts(tokenizer, texts, [chat.column for chat in chats], special=False)["input_ids"]
    extra = {"add_generation_prompt": True} if prompt else {}
    options = {"tokenize": True, "return_dict": True, **extra}
    return [list(apply_template(tokenizer, chat, template, **options)["input_ids"]) for chat in chats]
