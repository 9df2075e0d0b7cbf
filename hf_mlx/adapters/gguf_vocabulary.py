"""A byte-level BPE tokenizer as GGUF holds it.

Source: llama.cpp's ``convert_hf_to_gguf.py`` (build 11434), ``get_vocab_base``. llama.cpp knows how to split text by a
name; which name a tokenizer has is read from its own rules here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..intake import LARGE
from ..models.config import FILES

_LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|"
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
# Qwen 2 and 3: as Llama 3, one digit at a time.
_NAMES = {_LLAMA3: "llama-bpe", _LLAMA3.replace("\\p{N}{1,3}", "\\p{N}"): "qwen2"}
_CONVERTER = "llama.cpp's own converter: python convert_hf_to_gguf.py MODEL --outfile model.gguf"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id with their types, merges, and what a prompt is made with.

    Attributes:
        pre: llama.cpp's name of the rule that splits text.
        tokens: As many as the model embeds.
        types: ``gguf.TokenType`` of each.
        merges: In their order.
        special: Kind to id: bos, eos, unk, pad.
        add_bos: Whether a prompt begins with bos.
        template: The chat template, or None.
    """

    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    add_bos: bool
    template: str | None


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary of a model folder.

    Args:
        folder: With tokenizer.json.
        size: Rows of the model's embedding: ids without a token are filled up.

    Raises:
        ModelError: No byte-level BPE, or a way of splitting text whose name is not known here.
    """
    import gguf
    from transformers import AutoTokenizer

    content = FILES.read_json(folder / "tokenizer.json", limit=LARGE)
    model = content.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ModelError(
            f"{folder}: a tokenizer of type {model.get('type')!r}"
            + (" with byte_fallback (SentencePiece)" if model.get("byte_fallback") else ""),
            "a byte-level BPE",
            _CONVERTER,
        )
    if content.get("normalizer") not in (None, {"type": "NFC"}):
        raise ModelError(f"{folder}: a tokenizer that rewrites text first", "no normalizer, or NFC", _CONVERTER)
    pre = _name(folder, content.get("pre_tokenizer") or {})
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = gguf.TokenType
    tokens, types = [], []
    for index in range(size):
        token = by_id.get(index)
        kind = kinds.UNUSED if token is None else kinds.NORMAL
        if index in added:
            token = added[index].content
            kind = kinds.CONTROL if added[index].special else kinds.USER_DEFINED
        tokens.append(f"[PAD{index}]" if token is None else token)
        types.append(int(kind))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()]
    special = {
        kind: index
        for kind in ("bos", "eos", "unk", "pad")
        if (index := getattr(tokenizer, f"{kind}_token_id")) is not None
    }
    ids = tokenizer("a").input_ids
    add_bos = bool(ids) and ids[0] == special.get("bos")
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    return Vocabulary(pre, tuple(tokens), tuple(types), tuple(merges), special, add_bos, template)


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Write it through a ``gguf.GGUFWriter``."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.merges:
        writer.add_token_merges(list(vocabulary.merges))
    for kind, index in vocabulary.special.items():
        getattr(writer, f"add_{kind}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)


def _name(folder: Path, rule: Mapping[str, Any]) -> str:
    steps = list(rule.get("pretokenizers") or []) if rule.get("type") == "Sequence" else [rule]
    kinds = [step.get("type") for step in steps]
    last = steps[-1] if steps else {}
    plain = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if plain and kinds == ["ByteLevel"] and last.get("use_regex", True):
        return "gpt-2"
    if plain and kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
        return "smollm"
    if plain and kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        if pattern in _NAMES and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
            return _NAMES[pattern]
    raise ModelError(
        f"{folder}: a tokenizer that splits text by {' and '.join(map(str, kinds)) or 'nothing'}",
        "the rules of GPT-2, SmolLM, Llama 3 or Qwen 2, which llama.cpp has by name",
        _CONVERTER,
    )
