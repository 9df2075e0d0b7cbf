"""Where the assistant speaks in the text of well-known chat templates.

A template without ``{% generation %}`` markers does not say which tokens the assistant wrote. For these families the
rendered text does: each turn opens with a fixed header and closes with a fixed token. Reading the turns off the text
keeps the template, and so the token ids, as they are. Where trl 1.16 ships a training template
(``trl.chat_template_utils.get_training_chat_template``) the turns here are its ``{% generation %}`` blocks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import SettingError

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Family:
    """How one family delimits an assistant turn.

    Attributes:
        name: For messages.
        signs: Substrings of the template source that together identify the family.
        header: What opens an assistant turn; the trained span starts right after it.
        ends: What closes it, included in the span so that the model learns to stop; ``{eos}`` is the EOS token.
        newline: Whether the newline after the end belongs to the span, as in TRL's training templates.
        final_eos: Whether an EOS token after the last turn is trained when the assistant spoke last.
        rewrites: (pattern, replacement) on the template source, where TRL's training template renders other text.
    """

    name: str
    signs: tuple[str, ...]
    header: str
    ends: tuple[str, ...]
    newline: bool = False
    final_eos: bool = False
    rewrites: tuple[tuple[str, str], ...] = ()


# Qwen3 drops the thinking of earlier turns, so the same turn would render in two ways as a conversation grows;
# TRL's training template keeps a thinking block in every turn.
_ALWAYS_THINK = (
    (r"\{%-? if [^%]*loop\.index0 > ns\.last_query_index\)? -?%\}", "{%- if true %}"),
    (r"\{%-? if loop\.last or \(not loop\.last and reasoning_content\) -?%\}", "{%- if true %}"),
)

FAMILIES = (
    Family("Phi-4", ("<|im_start|>", "<|im_sep|>"), "<|im_start|>assistant<|im_sep|>", ("<|im_end|>",)),
    Family(
        "Qwen2.5",
        ("<|im_start|>' + message.role }}", "'\\n' + message.content", "<tool_call>"),
        "<|im_start|>assistant",
        ("<|im_end|>",),
        newline=True,
    ),
    Family(
        "Qwen3",
        ("<|im_start|>", "ns.last_query_index", "<think>"),
        "<|im_start|>assistant\n",
        ("<|im_end|>",),
        newline=True,
        rewrites=_ALWAYS_THINK,
    ),
    Family("ChatML", ("<|im_start|>", "<|im_end|>"), "<|im_start|>assistant\n", ("<|im_end|>",), newline=True),
    Family(
        "Llama 3",
        ("<|start_header_id|>", "<|eot_id|>"),
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|eot_id|>", "<|eom_id|>"),
    ),
    Family("Gemma", ("<start_of_turn>", "<end_of_turn>"), "<start_of_turn>model\n", ("<end_of_turn>",), newline=True),
    Family("Phi-3", ("<|assistant|>", "<|end|>"), "<|assistant|>\n", ("<|end|>",), newline=True, final_eos=True),
    Family("Zephyr", ("<|assistant|>", "<|user|>", "eos_token"), "<|assistant|>\n", ("{eos}",), newline=True),
    Family(
        "Command R7B",
        ("<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>"),
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>",
        ("<|END_OF_TURN_TOKEN|>",),
    ),
    Family(
        "Cohere",
        ("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        ("<|END_OF_TURN_TOKEN|>",),
    ),
    Family("Mistral", ("[INST]", "[/INST]"), "[/INST]", ("{eos}",)),
)


def has_markers(template: str) -> bool:
    """Whether the template marks the assistant's tokens itself."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template) is not None


def match_family(template: str) -> Family:
    """The family a template without markers belongs to.

    Raises:
        SettingError: Unknown family; says how to mark the template.
    """
    for family in FAMILIES:
        if all(sign in template for sign in family.signs):
            return family
    raise SettingError(
        "assistant_only_loss=True with a chat template that does not mark the assistant's tokens",
        "{% generation %} … {% endgeneration %} in the template, or one of the families known by their delimiters: "
        + ", ".join(family.name for family in FAMILIES),
        "wrap the assistant's text: tokenizer.chat_template = '… {% generation %}{{ message.content + eos_token }}"
        "{% endgeneration %} …', or SFTConfig(assistant_only_loss=False)",
    )


def rewrite_template(family: Family, template: str) -> str | None:
    """The template to render with, or None when the original is used as it is."""
    rewritten = template
    for pattern, replacement in family.rewrites:
        rewritten = re.sub(pattern, replacement, rewritten)
    return None if rewritten == template else rewritten


def find_turns(text: str, family: Family, eos: str, ends_with_assistant: bool) -> Spans:
    """Character spans [start, end) of the assistant's turns in rendered ``text``."""
    ends = [re.escape(end.format(eos=eos)) for end in family.ends]
    close = re.compile(f"(?:{'|'.join(ends)})" + (r"\n?" if family.newline else ""))
    spans, position = [], 0
    while (start := text.find(family.header, position)) >= 0:
        start += len(family.header)
        match = close.search(text, start)
        position = match.end() if match else len(text)
        spans.append((start, position))
    if family.final_eos and ends_with_assistant and text[position:] == eos:
        spans.append((position, len(text)))
    return spans
