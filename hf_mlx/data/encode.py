"""A batch of rows to token ids and labels, in TRL's order: text, EOS, tokens, labels, truncation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..settings.plan import DataPlan
from .batch import IGNORE
from .faults import RowFault, drop_row, name_row
from .formats import RowFormat
from .masks import AssistantMask, apply_mask, match_prefix, tokenize_marked
from .messages import check_messages, check_order, convert_turns
from .tables import Check, Tables, check_row
from .tokenize import Chat, check_text, parse_kwargs, parse_tools, tokenize_chats, tokenize_texts
from .tokenized import read_tokens


@dataclass
class EncodedRows:
    """Rows as token ids and labels of the same lengths.

    Attributes:
        diverged: Rows whose prompt, tokenized alone, is no prefix of the row: its last tokens merged or changed.
        cut: Which rows were longer than the limit.
    """

    input_ids: list[list[int]]
    labels: list[list[int]]
    diverged: list[bool] = field(default_factory=list)
    cut: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class RowEncoder:
    """Turns a batch of raw rows into :class:`EncodedRows`. Picklable, so that ``num_proc`` workers can hold it.

    Attributes:
        name: What errors call the set.
        completion_only: Whether the prompt of prompt-completion rows is masked.
        assistant: How to find the assistant's tokens; None trains on all of them.
        packing: Rows are packed afterwards, so they are not truncated here.
        tables: What the ids of each row are checked against, as far as the row is kept.
    """

    tokenizer: Any
    plan: DataPlan
    format: RowFormat
    name: str
    completion_only: bool
    assistant: AssistantMask | None
    packing: bool
    tables: Tables
    formatting_func: Callable[[dict[str, Any]], str] | None = None

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> EncodedRows:
        """Encodes rows numbered ``indices``.

        Raises:
            DataError: The first bad row, by index and column.
        """
        columns = {column: batch[column] for column in self.format.columns}
        try:
            return self._finish(self._encode(columns, len(indices)))
        except RowFault as fault:
            raise name_row(fault, self.name, indices[fault.row]) from fault.__cause__

    def _encode(self, columns: Mapping[str, Sequence[Any]], count: int) -> EncodedRows:
        match self.format.kind:
            case "tokenized":
                return EncodedRows(*read_tokens(columns, self.completion_only))
            case "messages":
                return self._encode_messages(columns, count)
            case "prompt_completion" if self.format.conversational:
                return self._encode_dialogues(columns, count)
            case "prompt_completion":
                return self._encode_pairs(columns["prompt"], columns["completion"])
            case "formatted":
                texts = [self.format_row({c: columns[c][row] for c in columns}, row) for row in range(count)]
            case _:
                texts = list(columns[self.format.columns[0]])
        return self._encode_texts(texts)

    def format_row(self, row: dict[str, Any], number: int) -> str:
        """The text that ``formatting_func`` makes of a row."""
        assert self.formatting_func is not None
        try:
            return self.formatting_func(row)
        except Exception as cause:
            received = f"formatting_func raised {type(cause).__name__}: {cause}"
            required = "a function of one row that returns its text"
            raise RowFault(number, "formatting_func", received, required, "def formatting_func(row): …") from cause

    def close(self, text: Any, column: str, row: int) -> str:
        """The text ending with EOS (once), which is what teaches a model to stop."""
        eos = self.tokenizer.eos_token
        return check_text(text, column, row) if text.endswith(eos) else text + eos

    def _encode_texts(self, texts: list[Any]) -> EncodedRows:
        column = self.format.main_column
        for row, text in enumerate(texts):
            check_text(text, column, row)
        closed = [self.close(text, column, row) for row, text in enumerate(texts)]
        ids = tokenize_texts(self.tokenizer, closed, [column] * len(closed), special=True)["input_ids"]
        return EncodedRows(ids, ids)

    def _encode_pairs(self, prompts: Sequence[Any], completions: Sequence[Any]) -> EncodedRows:
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            check_text(prompt, "prompt", row)
            check_text(completion, "completion", row)
        whole = [
            p + self.close(c, "completion", row) for row, (p, c) in enumerate(zip(prompts, completions, strict=True))
        ]
        heads = tokenize_texts(self.tokenizer, prompts, ["prompt"] * len(whole), special=True)["input_ids"]
        ids = tokenize_texts(self.tokenizer, whole, ["completion"] * len(whole), special=True)["input_ids"]
        return self._mask_prompts(heads, ids, ids)

    def _encode_dialogues(self, columns: Mapping[str, Sequence[Any]], count: int) -> EncodedRows:
        heads, whole = [], []
        for row in range(count):
            prompt, completion = columns["prompt"][row], columns["completion"][row]
            check_messages(prompt, "prompt", row)
            check_messages(completion, "completion", row)
            heads.append(self._chat(prompt, "prompt", columns, row))
            whole.append(self._chat(prompt + completion, "completion", columns, row))
        ids, labels = self._tokenize_whole(whole)
        template = self.assistant.template if self.assistant else None
        return self._mask_prompts(tokenize_chats(self.tokenizer, heads, template, prompt=True), ids, labels)

    def _encode_messages(self, columns: Mapping[str, Sequence[Any]], count: int) -> EncodedRows:
        column = self.format.columns[0]
        chats = []
        for row in range(count):
            messages = columns[column][row]
            if column == "conversations":
                messages = convert_turns(messages, row)
            check_messages(messages, column, row)
            chats.append(self._chat(messages, column, columns, row))
        return EncodedRows(*self._tokenize_whole(chats))

    def _chat(self, messages: list, column: str, columns: Mapping[str, Sequence[Any]], row: int) -> Chat:
        check_order(messages, column, row)
        tools = parse_tools(columns["tools"][row], row) if "tools" in columns else None
        kwargs = columns.get("chat_template_kwargs")
        return Chat(messages, column, row, tools, parse_kwargs(kwargs[row], row) if kwargs is not None else {})

    def _tokenize_whole(self, chats: list[Chat]) -> tuple[list, list]:
        if self.assistant is None:
            ids = tokenize_chats(self.tokenizer, chats, None, prompt=False)
            return ids, ids
        ids, masks = tokenize_marked(self.tokenizer, chats, self.assistant)
        return ids, [apply_mask(row, bits) for row, bits in zip(ids, masks, strict=True)]

    def _mask_prompts(self, heads: list[list[int]], ids: list[list[int]], labels: list[list[int]]) -> EncodedRows:
        starts = [match_prefix(head, row) for head, row in zip(heads, ids, strict=True)]
        if self.completion_only:
            labels = [[IGNORE] * start + row[start:] for start, row in zip(starts, labels, strict=True)]
        return EncodedRows(ids, labels, [start < len(head) for start, head in zip(starts, heads, strict=True)])

    def _finish(self, rows: EncodedRows) -> EncodedRows:
        """Truncates as ``truncation_mode`` says, and checks what is kept."""
        if self.plan.padding_free and not self.packing and self.plan.max_length is None:
            for row, ids in enumerate(rows.input_ids):
                if not ids:
                    received, required = "no token", "at least one token in a padding-free batch (TRL raises too)"
                    raise RowFault(row, self.format.main_column, received, required, drop_row())
        rows.diverged = rows.diverged or [False] * len(rows.input_ids)
        limit = self.plan.max_length
        rows.cut = [limit is not None and len(ids) > limit for ids in rows.input_ids]
        if limit is not None and not self.packing and any(rows.cut):
            kept = slice(None, limit) if self.plan.truncation_mode == "keep_start" else slice(-limit, None)
            same = rows.labels is rows.input_ids
            rows.input_ids = [ids[kept] for ids in rows.input_ids]
            rows.labels = rows.input_ids if same else [labels[kept] for labels in rows.labels]
        self._check(rows)
        return rows

    def _check(self, rows: EncodedRows) -> None:
        # Packing cuts rows afterwards, and makes others of them.
        cut = self.plan.max_length if self.packing and self.plan.packing_strategy == "bfd" else None
        check = Check(replace(self.tables, positions=None) if self.packing else self.tables, self.tokenizer)
        columns = self.format.main_column, "labels" if self.format.kind == "tokenized" else self.format.main_column
        for row, (ids, labels) in enumerate(zip(rows.input_ids, rows.labels, strict=True)):
            same = labels is ids
            ids = ids if cut is None else ids[:cut]
            check_row(ids, ids if same else labels[: len(ids)], row, columns, check)
