"""Which tokens train: the completion, the assistant's turns, or both at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import SettingError
from .batch import IGNORE
from .families import Family, find_turns, has_markers, match_family, rewrite_template
from .faults import RowFault, drop_row
from .tokenize import Chat, apply_template, render_chats, tokenize_texts


@dataclass(frozen=True)
class AssistantMask:
    """How the assistant's tokens are found.

    Attributes:
        family: The delimiters to read turns by; None means the template's own ``{% generation %}`` markers.
        template: The template to render with; None means the tokenizer's.
    """

    family: Family | None = None
    template: str | None = None


def resolve_assistant_mask(tokenizer: Any) -> AssistantMask:
    """How to find the assistant's tokens under this tokenizer's chat template.

    Raises:
        SettingError: No template, a slow tokenizer, or a template of no known family.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise SettingError(
            "assistant_only_loss=True with a tokenizer that has no chat template",
            "a chat template",
            "SFTConfig(chat_template_path='template.jinja'), or set tokenizer.chat_template",
        )
    if not getattr(tokenizer, "is_fast", False):
        raise SettingError(
            f"assistant_only_loss=True with {type(tokenizer).__name__}, a tokenizer that keeps no text positions",
            "a fast tokenizer, which maps characters to tokens",
            "AutoTokenizer.from_pretrained(model, use_fast=True)",
        )
    if has_markers(template):
        return AssistantMask()
    family = match_family(template)
    return AssistantMask(family, rewrite_template(family, template))


def tokenize_marked(tokenizer: Any, chats: Sequence[Chat], mask: AssistantMask) -> tuple[list, list]:
    """Token ids of each conversation, and 1 for each token the assistant wrote.

    Returns:
        ``(input_ids, assistant_masks)``, lists of equal-length lists.
    """
    if mask.family is None:
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        rows = [apply_template(tokenizer, chat, mask.template, **options) for chat in chats]
        ids, masks = [list(row["input_ids"]) for row in rows], [list(row["assistant_masks"]) for row in rows]
    else:
        ids, masks = _tokenize_turns(tokenizer, chats, mask.family, mask.template)
    for chat, bits in zip(chats, masks, strict=True):
        if 1 not in bits:
            received = f"no assistant tokens; roles are {[m['role'] for m in chat.messages]}"
            required = "at least one assistant turn in each row, since assistant_only_loss=True"
            raise RowFault(chat.row, chat.column, received, required, drop_row())
    return ids, masks


def _tokenize_turns(tokenizer: Any, chats: Sequence[Chat], family: Family, template: str | None):
    texts = render_chats(tokenizer, chats, template, prompt=False)
    encoding = tokenize_texts(tokenizer, texts, [chat.column for chat in chats], special=False)
    masks = []
    for row, (chat, text) in enumerate(zip(chats, texts, strict=True)):
        roles = [message["role"] for message in chat.messages]
        turns = find_turns(text, family, tokenizer.eos_token or "", roles[-1] == "assistant")
        spoken = roles.count("assistant")
        if len(turns) not in (spoken, spoken + bool(family.final_eos and spoken)):
            # Text that forges a header, or a template that renders turns in another way, must not shift the mask.
            raise RowFault(
                chat.row,
                chat.column,
                f"{spoken} assistant turns, but {len(turns)} places in the text open with {family.header!r}",
                f"each assistant turn, and nothing else, rendered after the {family.name} header",
                "mark the turns in the template with {% generation %} … {% endgeneration %}",
            )
        masks.append(_mark_tokens(encoding, row, turns))
    return encoding["input_ids"], masks


def _mark_tokens(encoding: Any, row: int, turns: list[tuple[int, int]]) -> list[int]:
    """Characters to tokens, as transformers 5.23 ``apply_chat_template(return_assistant_tokens_mask=True)``."""
    bits = [0] * len(encoding["input_ids"][row])
    for start, end in turns:
        first, last = encoding.char_to_token(row, start), encoding.char_to_token(row, end - 1)
        if first is None:
            break
        stop = last + 1 if last else len(bits)
        bits[first:stop] = [1] * (stop - first)
    return bits


def match_prefix(prompt: Sequence[int], full: Sequence[int]) -> int:
    """How many leading tokens the prompt and the whole row share: the completion starts there.

    The length of the prompt is not enough, since tokens can merge across the boundary, or a template can render the
    prompt alone in another way (``trl.data_utils.common_prefix_length``).
    """
    if full[: len(prompt)] == prompt:
        return len(prompt)
    return next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))


def apply_mask(labels: Sequence[int], bits: Sequence[int]) -> list[int]:
    """Labels with -100 wherever ``bits`` is 0."""
    return [label if bit else IGNORE for label, bit in zip(labels, bits, strict=True)]
