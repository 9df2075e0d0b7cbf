"""What tokenizers did before transformers 5.0, for scripts that expect it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .callers import is_library
from .imports import Imports
from .talk import Talk


def keep_tokenizers(imports: Imports, talk: Talk) -> None:
    """Let tokenizers answer as they did, once transformers has them."""
    imports.after("transformers.tokenization_utils_base", functools.partial(_change, talk=talk))


def _change(module: Any, talk: Talk) -> None:
    cls = module.PreTrainedTokenizerBase
    for name in ("encode_plus", "batch_encode_plus"):
        # Calling the tokenizer does both.
        if not hasattr(cls, name):
            setattr(cls, name, lambda self, *args, **kwargs: self(*args, **kwargs))
    for name in cls.SPECIAL_TOKENS_ATTRIBUTES:
        # ``tokenizer._pad_token`` is None where there is none, without a warning.
        if not hasattr(cls, f"_{name}"):
            setattr(cls, f"_{name}", property(functools.partial(_read_token, name=name)))
    original: Callable = cls.apply_chat_template

    @functools.wraps(original)
    def apply_chat_template(self: Any, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, conversation, *args, **kwargs)
        if "return_dict" in kwargs or not isinstance(found, Mapping) or is_library(sys._getframe(1)):
            return found
        return _as_ids(found, talk)

    cls.apply_chat_template = apply_chat_template


def _read_token(tokenizer: Any, name: str) -> Any:
    return tokenizer._special_tokens_map.get(name)


def _as_ids(found: Mapping[str, Any], talk: Talk) -> Any:
    """The ids, as ``apply_chat_template`` returned them, which answer for the whole mapping too."""
    import torch

    ids = found["input_ids"]
    if isinstance(ids, torch.Tensor):
        talk.once("apply_chat_template returned ids before transformers 5.0: what it returns is both, ids and mapping")
        return _tensor_of(found)
    return _IdList(found) if isinstance(ids, list) else found


class _Both:
    """What ids and a mapping have in common with a mapping."""

    mapping: Mapping[str, Any]

    def keys(self) -> Any:
        """The names, so that ``**inputs`` is the mapping."""
        return self.mapping.keys()

    def items(self) -> Any:
        """Names and values."""
        return self.mapping.items()

    def values(self) -> Any:
        """The values."""
        return self.mapping.values()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a name."""
        return self.mapping.get(key, default)

    @property
    def input_ids(self) -> Any:
        """The ids."""
        return self.mapping["input_ids"]

    @property
    def attention_mask(self) -> Any:
        """Which of the ids count."""
        return self.mapping["attention_mask"]


class _IdList(_Both, list):
    """Ids in a list."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        list.__init__(self, found["input_ids"])
        self.mapping = found

    def __getitem__(self, key: Any) -> Any:
        return self.mapping[key] if isinstance(key, str) else list.__getitem__(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.mapping if isinstance(key, str) else list.__contains__(self, key)

    def __iter__(self) -> Iterator:
        return list.__iter__(self)


@functools.cache
def _tensor_class() -> type:
    import torch

    class IdTensor(_Both, torch.Tensor):
        """Ids in a tensor; what is computed from it is a plain one."""

        __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

        def __getitem__(self, key: Any) -> Any:
            return self.mapping[key] if isinstance(key, str) else torch.Tensor.__getitem__(self, key)

        def __contains__(self, key: object) -> bool:
            return key in self.mapping if isinstance(key, str) else torch.Tensor.__contains__(self, key)

        def to(self, *args: Any, **kwargs: Any) -> Any:
            """Everything in it, moved."""
            return _tensor_of({name: value.to(*args, **kwargs) for name, value in self.mapping.items()})

        def cuda(self, *args: Any, **kwargs: Any) -> Any:
            """Likewise."""
            return _tensor_of({name: value.cuda(*args, **kwargs) for name, value in self.mapping.items()})

        def cpu(self) -> Any:
            """Likewise."""
            return self.to("cpu")

    return IdTensor


def _tensor_of(found: Mapping[str, Any]) -> Any:
    both = found["input_ids"].as_subclass(_tensor_class())
    both.mapping = dict(found)
    return both
