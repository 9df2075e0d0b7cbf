"""Rows of a reward model to token ids: whole texts or conversations, chosen and rejected.

They are the rows of ``trl.RewardTrainer(...).train_dataset`` (trl 1.16), one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from ..settings.plan import DataPlan
from .encoding import describe_tokenizer
from .faults import RowFault, drop_row, name_row, show
from .messages import check_messages
from .preference import check_pair_columns
from .prepare import Prepared
from .processes import naming_processes
from .report import Report
from .scored_pairs import ANSWERS, ID_COLUMNS
from .sources import read_first, read_source
from .tokenize import Chat, check_text, parse_kwargs, parse_tools, tokenize_chats, tokenize_texts
from .tokenizer import missing_eos, prepare_tokenizer

_LEGACY = {"chosen_input_ids": "chosen_ids", "rejected_input_ids": "rejected_ids"}
#: Raise it when the same rows would encode differently, so that no cache of an older version is reused.
_VERSION = 1


def prepare_scored(dataset: Any, tokenizer: Any, plan: DataPlan, *, name: str) -> Prepared:
    """Prepares a preference dataset for a reward model; its columns stay beside the ids.

    Args:
        dataset: Dataset, IterableDataset or list of dicts with ``chosen`` and ``rejected``, texts or messages, and
            maybe the ``prompt`` in front of both; or with ``chosen_ids`` and ``rejected_ids``.
        tokenizer: A transformers tokenizer.
        plan: ``max_length``, beyond which a row is left out, and ``dataset_num_proc`` are read.
        name: What messages call the set.

    Raises:
        DataError: A dataset, column or row that cannot be trained on, named.
    """
    from datasets import IterableDataset

    dataset = read_source(dataset, name, as_is=plan.skip_prepare_dataset)
    first, columns = read_first(dataset, name)
    if plan.skip_prepare_dataset:
        return Prepared(dataset, Report(name, notes=("taken as it is",)), False, True)
    streamed = isinstance(dataset, IterableDataset)
    if not set(ID_COLUMNS) <= set(columns):
        if set(_LEGACY) <= set(columns):
            dataset = _rename(dataset)
        else:
            check_pair_columns(columns, name)
            dataset = _encode(dataset, first, prepare_tokenizer(tokenizer, plan), plan, name, streamed=streamed)
    if streamed:
        kept = dataset if plan.max_length is None else dataset.filter(_Fits(plan.max_length))
        return Prepared(kept, Report(name, max_length=plan.max_length), False, True)
    return _keep(dataset, plan, name)


@dataclass(frozen=True)
class ScoredEncoder:
    """Turns a batch of raw rows into whole texts or conversations, and their ids.

    Attributes:
        tokenizer: Prepared.
        name: What errors call the set.
        closes: EOS ends each text, by what the set's first row is.
        joins: Prompts stand in front of their answers in the columns too, as they do upstream but for a stream.
    """

    tokenizer: Any
    name: str
    closes: bool
    joins: bool = True

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """Encodes rows numbered ``indices``.

        Raises:
            DataError: The first bad row, by index and column.
        """
        rows = [{column: values[at] for column, values in batch.items()} for at in range(len(indices))]
        try:
            closed = [self._close(row, at) for at, row in enumerate(rows)]
            whole = [_join(row, at) for at, row in enumerate(closed)]
            kept = whole if self.joins else closed
            made: dict[str, list[Any]] = {column: [row[column] for row in kept] for column in ANSWERS}
            return made | {f"{column}_ids": self._encode(whole, column) for column in ANSWERS}
        except RowFault as fault:
            raise name_row(fault, self.name, indices[fault.row]) from fault.__cause__

    def _close(self, row: Mapping[str, Any], at: int) -> dict[str, Any]:
        row = dict(row)
        for column in ANSWERS if self.closes else ():
            text = check_text(row[column], column, at)
            row[column] = text if text.endswith(self.tokenizer.eos_token) else text + self.tokenizer.eos_token
        return row

    def _encode(self, rows: Sequence[Mapping[str, Any]], column: str) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in rows]
        chats = [at for at, row in enumerate(rows) if is_messages(row["chosen"])]
        texts = [at for at in range(len(rows)) if at not in set(chats)]
        if texts:
            plain = [check_text(rows[at][column], column, at) for at in texts]
            encoded = tokenize_texts(self.tokenizer, plain, [column] * len(plain), special=True)["input_ids"]
            for at, ids in zip(texts, encoded, strict=True):
                found[at] = list(ids)
        if chats:
            made = [_chat(rows[at], column, at) for at in chats]
            for at, ids in zip(chats, tokenize_chats(self.tokenizer, made, None, prompt=False), strict=True):
                found[at] = ids
        return found


def _join(row: Mapping[str, Any], at: int) -> dict[str, Any]:
    row = dict(row)
    for column in ANSWERS if "prompt" in row else ():
        if type(row["prompt"]) is not type(row[column]):
            kind = f"a {type(row['prompt']).__name__}, as the prompt is"
            raise RowFault(at, column, show(row[column]), kind, drop_row())
        row[column] = row["prompt"] + row[column]
    return row


def is_messages(answer: Any) -> bool:
    """Whether ``answer`` is a conversation rather than a text."""
    return isinstance(answer, list) and bool(answer) and isinstance(answer[0], dict) and "role" in answer[0]


def _chat(row: Mapping[str, Any], column: str, at: int) -> Chat:
    check_messages(row[column], column, at)
    tools = parse_tools(row.get("tools"), at)
    return Chat(row[column], column, at, tools, parse_kwargs(row.get("chat_template_kwargs"), at))


def _encode(
    dataset: Any, first: Mapping[str, Any], tokenizer: Any, plan: DataPlan, name: str, *, streamed: bool
) -> Any:
    closes = not any(is_messages(first.get(column)) for column in ("prompt", *ANSWERS))
    if closes and tokenizer.eos_token is None:
        raise missing_eos(tokenizer)
    encoder = ScoredEncoder(tokenizer, name, closes, joins=not streamed)
    if streamed:
        return dataset.map(encoder, batched=True, with_indices=True)
    with naming_processes(plan.dataset_num_proc, name):
        return dataset.map(
            encoder,
            batched=True,
            with_indices=True,
            num_proc=plan.dataset_num_proc,
            desc=f"Tokenizing {name} dataset",
            new_fingerprint=_fingerprint(dataset, encoder),
        )


def _rename(dataset: Any) -> Any:
    warnings.warn(
        "Detected legacy dataset columns `chosen_input_ids`/`rejected_input_ids`; they are deprecated and "
        "will not be supported in v1. Please migrate to `chosen_ids`/`rejected_ids`.",
        FutureWarning,
        stacklevel=2,
    )
    for old, new in _LEGACY.items():
        dataset = dataset.rename_column(old, new)
    return dataset


@dataclass(frozen=True)
class _Fits:
    limit: int

    def __call__(self, row: Mapping[str, Any]) -> bool:
        return all(len(row[column]) <= self.limit for column in ID_COLUMNS)


def _keep(dataset: Any, plan: DataPlan, name: str) -> Prepared:
    pairs = [[len(ids) for ids in dataset[column]] for column in ID_COLUMNS]
    longest = [max(pair) for pair in zip(*pairs, strict=True)]
    kept = [at for at, length in enumerate(longest) if plan.max_length is None or length <= plan.max_length]
    if not kept:
        raise DataError(
            f"rows 0 to {len(longest) - 1} of the {name} dataset: each is longer than max_length={plan.max_length}, so "
            "all are left out",
            "at least one row that fits",
            f"RewardConfig(max_length={min(longest)}), or more",
        )
    cut = len(longest) - len(kept)
    notes = ("those are left out, as by TRL",) if cut else ()
    report = Report(name, rows=len(longest), cut=cut, max_length=plan.max_length, notes=notes)
    return Prepared(dataset.select(kept) if cut else dataset, report, False, True)


def _fingerprint(dataset: Any, encoder: ScoredEncoder) -> str:
    from datasets.fingerprint import Hasher

    parts = ("scored", _VERSION, dataset._fingerprint, encoder.closes)
    return Hasher.hash((*parts, describe_tokenizer(encoder.tokenizer)))
