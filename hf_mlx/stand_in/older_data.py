"""``TextDataset`` and ``LineByLineTextDataset``, with which GPT-2 was fine-tuned on a text file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


class TextDataset(torch.utils.data.Dataset):
    """A text file cut into blocks of ids; what is left at its end is dropped.

    Source: transformers 4.57 ``TextDataset``.

    Args:
        tokenizer: Tokenizes the file as a whole.
        file_path: The file.
        block_size: Tokens of a block, with the special tokens that the tokenizer puts around one.
        overwrite_cache, cache_dir: No cache is written.
    """

    def __init__(
        self, tokenizer: Any, file_path: str, block_size: int, overwrite_cache: bool = False, cache_dir: Any = None
    ) -> None:
        block_size -= tokenizer.num_special_tokens_to_add(pair=False)
        ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(Path(file_path).read_text(encoding="utf-8")))
        self.examples = [_wrapped(tokenizer, ids[at : at + block_size]) for at in range(0, len(ids), block_size)]
        if ids and len(ids) % block_size:
            self.examples.pop()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(self.examples[index], dtype=torch.long)


class LineByLineTextDataset(torch.utils.data.Dataset):
    """The lines of a text file, each cut to a length.

    Source: transformers 4.57 ``LineByLineTextDataset``.
    """

    def __init__(self, tokenizer: Any, file_path: str, block_size: int) -> None:
        lines = [line for line in Path(file_path).read_text(encoding="utf-8").splitlines() if line.strip()]
        encoded = tokenizer(lines, add_special_tokens=True, truncation=True, max_length=block_size)
        self.examples = [{"input_ids": torch.tensor(ids, dtype=torch.long)} for ids in encoded["input_ids"]]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.examples[index]


def _wrapped(tokenizer: Any, ids: list[int]) -> list[int]:
    build = getattr(tokenizer, "build_inputs_with_special_tokens", None)
    return build(ids) if build is not None else ids
