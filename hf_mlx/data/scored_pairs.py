"""Rows of a reward model: whole texts, chosen and rejected, to token ids and to a batch (trl 1.16 ``RewardTrainer``)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError
from ..settings.plan import DataPlan
from .batch import IGNORE, Batch
from .custom import convert_batch
from .encoding import describe_tokenizer
from .faults import RowFault, drop_row, name_row, show
from .messages import check_messages
from .preference import check_pair_columns
from .prepare import Prepared
from .processes import naming_processes
from .report import Report
from .sources import read_first, read_source
from .tokenize import Chat, check_text, parse_kwargs, parse_tools, tokenize_chats, tokenize_texts
from .tokenizer import missing_eos, prepare_tokenizer

ID_COLUMNS = ("chosen_ids", "rejected_ids")
MARGIN = "margin"
_LEGACY = {"chosen_input_ids": "chosen_ids", "rejected_input_ids": "rejected_ids"}
_ANSWERS = ("chosen", "rejected")
#: Raise it when the same rows would encode differently, so that no cache of an older version is reused.
_VERSION = 1


def prepare_scored(dataset: Any, tokenizer: Any, plan: DataPlan, *, name: str) -> Prepared:
    """Prepares a preference dataset for a reward model; its columns stay beside the ids.

    Args:
        dataset: Dataset, IterableDataset or list of dicts with ``chosen`` and ``rejected``, texts or messages, and maybe
            the ``prompt`` in front of both; or with ``chosen_ids`` and ``rejected_ids``. A ``margin`` counts in the loss.
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
            made: dict[str, list[Any]] = {column: [row[column] for row in kept] for column in _ANSWERS}
            return made | {f"{column}_ids": self._encode(whole, column) for column in _ANSWERS}
        except RowFault as fault:
            raise name_row(fault, self.name, indices[fault.row]) from fault.__cause__

    def _close(self, row: Mapping[str, Any], at: int) -> dict[str, Any]:
        row = dict(row)
        for column in _ANSWERS if self.closes else ():
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
    for column in _ANSWERS if "prompt" in row else ():
        if type(row["prompt"]) is not type(row[column]):
            kind = f"a {type(row['prompt']).__name__}, as the prompt is"
            raise RowFault(at, column, show(row[column]), kind, drop_row())
        row[column] = row["prompt"] + row[column]
    return row


def is_messages(answer: Any) -> bool:
    """Whether ``answer`` is a conversation rather than a text."""
    return isinstance(answer, list) and bool(answer) and isinstance(answer[0], dict) and "role" in answer[0]


@dataclass(frozen=True, eq=False)
class ScoredBatch(Batch):
    """A :class:`~hf_mlx.data.batch.Batch` of 2P rows, all chosen ones and then all rejected ones.

    Attributes:
        last: (2P,) int32, the position of each row that is scored: its last token that is not the padding token.
        margins: (P,) float32, or None.
    """

    last: np.ndarray = None  # pyright: ignore[reportAssignmentType]
    margins: np.ndarray | None = None

    @property
    def examples(self) -> int:
        """Pairs."""
        return len(self.input_ids) // 2


def collate_scored(
    rows: Sequence[Mapping[str, Any]], *, pad_token_id: int, pad_to_multiple_of: int | None = None
) -> ScoredBatch:
    """Pads as trl 1.16 ``reward_trainer.DataCollatorForPreference`` does.

    Args:
        rows: Dicts with ``chosen_ids``, ``rejected_ids`` and maybe ``margin``, which the first row decides.
        pad_token_id: Fills ``input_ids``.
        pad_to_multiple_of: Rounds the width up.
    """
    ids = [np.array(row[column], np.int32) for column in ID_COLUMNS for row in rows]
    lengths = np.array([len(row) for row in ids], np.int32)
    width = int(lengths.max(initial=0))
    if pad_to_multiple_of:
        width = -(-width // pad_to_multiple_of) * pad_to_multiple_of
    filled = np.full((len(ids), width), pad_token_id, np.int32)
    for into, sequence in zip(filled, ids, strict=True):
        into[: len(sequence)] = sequence
    margins = np.array([_margin(row) for row in rows], np.float32) if MARGIN in rows[0] else None
    return _batch(filled, lengths, int(lengths.sum()), pad_token_id, margins)


def convert_scored(mapping: Mapping[str, Any], pad_token_id: int) -> ScoredBatch:
    """What a user's collator returned in trl's layout, as a :class:`ScoredBatch`.

    Args:
        mapping: ``input_ids`` and mostly ``attention_mask`` (2P, T), all chosen rows first, and maybe ``margin`` (P,).
        pad_token_id: Tells where a row ends.

    Raises:
        DataError: Columns that are missing, unknown or of other shapes, a mask with holes, or rows that are padded
            with another id than the padding token, in which transformers reads the score.
    """
    ids = None if not isinstance(mapping, Mapping) or "input_ids" not in mapping else _to_numpy(mapping["input_ids"])
    if ids is None or ids.ndim != 2 or len(ids) % 2:
        found = sorted(mapping) if isinstance(mapping, Mapping) else type(mapping).__name__
        raise DataError(
            f"a data_collator that returns {found}" if ids is None else f"a data_collator's input_ids of {ids.shape}",
            "input_ids and attention_mask (2P, T), all chosen rows and then all rejected ones, and maybe margin (P,)",
            "trl.trainer.reward_trainer.DataCollatorForPreference shows the layout",
        )
    given = dict(mapping)
    margins = given.pop(MARGIN, None)
    batch = convert_batch({**given, "labels": np.full(ids.shape, IGNORE)})
    margins = None if margins is None else _to_numpy(margins).astype(np.float32).reshape(-1)
    if margins is not None and len(margins) != len(ids) // 2:
        raise DataError(
            f"a data_collator's margin of {len(margins)} values for {len(ids) // 2} pairs",
            "one for each pair",
            "batch['margin'] = torch.tensor([row['margin'] for row in rows])",
        )
    made = _batch(batch.input_ids, batch.lengths, batch.num_tokens, pad_token_id, margins, has_mask=batch.has_mask)
    if (made.last >= np.maximum(batch.lengths, 1)).any():
        raise DataError(
            f"a data_collator that pads with another id than the padding token, {pad_token_id}",
            "padding by which transformers finds the last token of a row",
            "pad with tokenizer.pad_token_id",
        )
    return made


def last_tokens(input_ids: np.ndarray, pad_token_id: int) -> np.ndarray:
    """The last position of each row (R, T) that does not hold the padding token, (R,) int32; 0 where all do.

    Source: transformers 5.23 ``GenericForSequenceClassification.forward``. A row that ends with the padding token
    itself, as with ``pad_token = eos_token``, is read before it.
    """
    counted = (input_ids != pad_token_id) * np.arange(input_ids.shape[1])
    return counted.argmax(axis=1).astype(np.int32)


def _batch(
    ids: np.ndarray,
    lengths: np.ndarray,
    tokens: int,
    pad_token_id: int,
    margins: np.ndarray | None,
    *,
    has_mask: bool = True,
) -> ScoredBatch:
    labels = np.full(ids.shape, IGNORE, np.int32)
    last = last_tokens(ids, pad_token_id)
    return ScoredBatch(ids, labels, lengths, tokens, has_mask=has_mask, last=last, margins=margins)


def _margin(row: Mapping[str, Any]) -> float:
    value = row.get(MARGIN)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(
            f"a row with the margin {value!r}",
            "a number in each row, where the first one has a margin",
            "dataset = dataset.remove_columns('margin'), or a margin of 0.0",
        )
    return float(value)


def _chat(row: Mapping[str, Any], column: str, at: int) -> Chat:
    check_messages(row[column], column, at)
    tools = parse_tools(row.get("tools"), at)
    return Chat(row[column], column, at, tools, parse_kwargs(row.get("chat_template_kwargs"), at))


def _encode(
    dataset: Any, first: Mapping[str, Any], tokenizer: Any, plan: DataPlan, name: str, *, streamed: bool
) -> Any:
    closes = not any(is_messages(first.get(column)) for column in ("prompt", *_ANSWERS))
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
            f"rows 0 to {len(longest) - 1} of the {name} dataset: each is longer than max_length={plan.max_length}, and "
            "longer rows are left out",
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


def _to_numpy(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
