"""Preference rows to token ids: the rows of ``trl.DPOTrainer(...).train_dataset``, one by one.

A row holds ``chosen`` and ``rejected``, texts or messages, and mostly their ``prompt``. Preparation adds
``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` (trl 1.16 ``DPOTrainer._prepare_dataset``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DataError
from ..settings.plan import DataPlan
from .encoding import describe_tokenizer
from .faults import RowFault, drop_row, name_row, show
from .formats import refuse_images
from .messages import check_messages
from .prepare import Prepared
from .processes import naming_processes
from .report import Report
from .sources import read_first, read_source
from .tables import Tables
from .tokenize import Chat, check_text, parse_kwargs, parse_tools, tokenize_chats, tokenize_texts
from .tokenizer import missing_eos, prepare_tokenizer

logger = logging.getLogger(__name__)

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
_ANSWERS = ("chosen", "rejected")
#: Raise it when the same rows would encode differently, so that no cache of an older version is reused.
_VERSION = 1


def prepare_preference(
    dataset: Any, tokenizer: Any, plan: DataPlan, *, name: str, tables: Tables | None = None
) -> Prepared:
    """Prepares a preference dataset; its columns stay beside the ids.

    Args:
        dataset: Dataset, IterableDataset or list of dicts with ``chosen`` and ``rejected``, and mostly ``prompt``.
        tokenizer: A transformers tokenizer.
        plan: ``max_length``, ``truncation_mode``, ``pad_token`` and ``dataset_num_proc`` are read.
        name: What messages call the set.
        tables: What the model can embed; the tokenizer's size when None.

    Raises:
        DataError: A dataset, column or row that cannot be trained on, named.
    """
    from datasets import IterableDataset

    dataset = read_source(dataset, name, as_is=plan.skip_prepare_dataset)
    if plan.skip_prepare_dataset:
        read_first(dataset, name)
        return Prepared(dataset, Report(name, notes=("taken as it is",)), False, True)
    first, columns = read_first(dataset, name)
    check_pair_columns(columns, name)
    tokenizer = prepare_tokenizer(tokenizer, plan)
    # As upstream, the first row says for all of them whether there is a prompt and whether texts are closed.
    encoder = PairEncoder(tokenizer, name, implicit="prompt" not in first, closes=False)
    if not encoder.reads_messages(first):
        if tokenizer.eos_token is None:
            raise missing_eos(tokenizer)
        encoder = replace(encoder, closes=True)
    limit = plan.max_length if plan.truncation_mode == "keep_start" else None
    if isinstance(dataset, IterableDataset):
        encoded = dataset.map(encoder, batched=True, with_indices=True)
        encoded = encoded if limit is None else encoded.filter(_Fits(limit))
        return Prepared(encoded, Report(name, max_length=plan.max_length), False, True)
    with naming_processes(plan.dataset_num_proc, name):
        encoded = dataset.map(
            encoder,
            batched=True,
            with_indices=True,
            num_proc=plan.dataset_num_proc,
            desc=f"Tokenizing {name} dataset",
            new_fingerprint=_fingerprint(dataset, encoder),
        )
    return _finish(encoded, plan, limit, name)


@dataclass(frozen=True)
class PairEncoder:
    """Turns a batch of raw rows into their columns, prompts taken out and answers closed, and their ids.

    Attributes:
        implicit: There is no ``prompt``; what both answers share in front is one.
        closes: EOS ends each text.
    """

    tokenizer: Any
    name: str
    implicit: bool
    closes: bool

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        """Encodes rows numbered ``indices``.

        Raises:
            DataError: The first bad row, by index and column.
        """
        rows = [{column: values[at] for column, values in batch.items()} for at in range(len(indices))]
        try:
            split = [self.split(row, at) for at, row in enumerate(rows)]
            ids = self._encode(split)
        except RowFault as fault:
            raise name_row(fault, self.name, indices[fault.row]) from fault.__cause__
        made = {column: [row[column] for row in split] for column in ("prompt", *_ANSWERS)}
        return made | {column: [row[column] for row in ids] for column in ID_COLUMNS}

    def reads_messages(self, first: Mapping[str, Any]) -> bool:
        """Whether the set's first row holds messages rather than texts."""
        try:
            return _is_conversational(self.split(first, 0))
        except RowFault as fault:
            raise name_row(fault, self.name, 0) from None

    def split(self, row: Mapping[str, Any], at: int) -> dict[str, Any]:
        """``row`` with a prompt of its own, and its answers as they are trained on."""
        row = dict(row)
        if self.implicit:
            row |= extract_prompt(row, at)
        if self.closes:
            eos = self.tokenizer.eos_token
            for column in _ANSWERS:
                text = check_text(row[column], column, at)
                row[column] = text if text.endswith(eos) else text + eos
        return row

    def _encode(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, list[int]]]:
        wholes: dict[str, list[list[int]]] = {column: [[] for _ in rows] for column in ("prompt", *_ANSWERS)}
        chats = [at for at, row in enumerate(rows) if _is_conversational(row)]
        texts = [at for at, row in enumerate(rows) if not _is_conversational(row)]
        for column, found in wholes.items():
            for group, encode in ((chats, self._encode_chats), (texts, self._encode_texts)):
                for at, ids in zip(group, encode(rows, group, column), strict=True):
                    found[at] = ids
        return [self._divide(*sequences) for sequences in zip(*wholes.values(), strict=True)]

    def _divide(self, prompt: list[int], chosen: list[int], rejected: list[int]) -> dict[str, list[int]]:
        length = min(_common_prefix(prompt, chosen), _common_prefix(prompt, rejected))
        if length < len(prompt):
            _warn_once(self.tokenizer.decode(prompt[length:]))
        return dict(zip(ID_COLUMNS, (prompt[:length], chosen[length:], rejected[length:]), strict=True))

    def _encode_texts(self, rows: Sequence[Mapping[str, Any]], group: list[int], column: str) -> list[list[int]]:
        texts = []
        for at in group:
            text = check_text(rows[at]["prompt"], "prompt", at)
            texts.append(text if column == "prompt" else text + check_text(rows[at][column], column, at))
        if not texts:
            return []
        return tokenize_texts(self.tokenizer, texts, [column] * len(texts), special=True)["input_ids"]

    def _encode_chats(self, rows: Sequence[Mapping[str, Any]], group: list[int], column: str) -> list[list[int]]:
        chats = []
        for at in group:
            row = rows[at]
            messages = row["prompt"] if column == "prompt" else row["prompt"] + _messages(row[column], column, at)
            check_messages(messages, column, at)
            tools = parse_tools(row.get("tools"), at)
            kwargs = parse_kwargs(row.get("chat_template_kwargs"), at)
            chats.append(Chat(messages, column, at, tools, kwargs))
        return tokenize_chats(self.tokenizer, chats, None, prompt=column == "prompt") if chats else []


def extract_prompt(row: Mapping[str, Any], at: int = 0) -> dict[str, Any]:
    """What both answers share in front as the prompt, and the rest (``trl.data_utils.extract_prompt``).

    Upstream's edges are kept: of equal or nested answers the last shared item stays out of the prompt; one space
    before the split goes to the answers; where they differ from the start, the chosen answer's *last* item is asked.
    """
    chosen, rejected = (row[column] for column in _ANSWERS)
    for column, answer in zip(_ANSWERS, (chosen, rejected), strict=True):
        if not isinstance(answer, (str, list)) or not answer:
            raise RowFault(at, column, show(answer), "a text or messages, which hold the prompt too", drop_row())
    if type(chosen) is not type(rejected):
        raise RowFault(at, "rejected", show(rejected), f"a {type(chosen).__name__}, as chosen is", drop_row())
    shared = min(len(chosen), len(rejected))
    split = next((i for i in range(shared) if chosen[i] != rejected[i]), None)
    if split is None:
        split = shared - 1
    elif chosen[split - 1] == " ":
        split -= 1
    return {"prompt": chosen[:split], "chosen": chosen[split:], "rejected": rejected[split:]}


def check_pair_columns(columns: Sequence[str], name: str) -> None:
    """Refuse a set without both answers, or with images.

    Raises:
        DataError: Names the column.
    """
    refuse_images(columns, name)
    missing = [column for column in _ANSWERS if column not in columns]
    if missing:
        raise DataError(
            f"the {name} dataset has the columns {sorted(columns)}, and no {missing[0]!r}",
            "a preference dataset: 'chosen' and 'rejected', texts or messages, and mostly their 'prompt'",
            f"dataset = dataset.rename_column('your_column', {missing[0]!r})",
        )


def _is_conversational(row: Mapping[str, Any]) -> bool:
    prompt = row["prompt"]
    if isinstance(prompt, list) and not prompt:
        # Answers that share no message; upstream looks at whichever column comes first in a set.
        prompt = row["chosen"]
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict) and "role" in prompt[0]


def _messages(answer: Any, column: str, at: int) -> list[Any]:
    if not isinstance(answer, list):
        raise RowFault(at, column, show(answer), "a list of messages, as the prompt is", drop_row())
    return answer


def _common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    differing = (at for at, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b)
    return next(differing, min(len(ids), len(others)))


_warned = False


def _warn_once(left_out: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        logger.warning(
            "a prompt tokenizes differently alone than in front of its answers; the answers start where they diverge, "
            f"and this end of the prompt is left out: {left_out!r}. End prompts on a token boundary."
        )


@dataclass(frozen=True)
class _Fits:
    """Whether ``max_length`` leaves a row a token of its answers."""

    limit: int

    def __call__(self, row: Mapping[str, Any]) -> bool:
        return len(row["prompt_ids"]) < self.limit


def _finish(encoded: Any, plan: DataPlan, limit: int | None, name: str) -> Prepared:
    prompts, *answers = ([len(ids) for ids in encoded[column]] for column in ID_COLUMNS)
    kept = [at for at, length in enumerate(prompts) if limit is None or length < limit]
    if not kept:
        raise DataError(
            f"rows 0 to {len(prompts) - 1} of the {name} dataset: every prompt alone fills max_length={limit}",
            "at least one row with a token of its answers left",
            f"DPOConfig(max_length={max(prompts) + 1}), or more",
        )
    longest = [prompts[at] + max(each[at] for each in answers) for at in kept]
    cut = sum(plan.max_length is not None and length > plan.max_length for length in longest)
    report = Report(
        name,
        rows=len(prompts),
        cut=cut,
        dropped=len(prompts) - len(kept),
        tokens=sum(2 * prompts[at] + sum(each[at] for each in answers) for at in kept),
        trained=sum(each[at] for each in answers for at in kept),
        max_length=plan.max_length,
    )
    return Prepared(encoded if len(kept) == len(prompts) else encoded.select(kept), report, False, True)


def _fingerprint(dataset: Any, encoder: PairEncoder) -> str:
    from datasets.fingerprint import Hasher

    parts = (_VERSION, dataset._fingerprint, encoder.implicit, encoder.closes)
    return Hasher.hash((*parts, describe_tokenizer(encoder.tokenizer)))
