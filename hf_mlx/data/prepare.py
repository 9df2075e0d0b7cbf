"""A dataset made ready to train on: the rows of ``trl.SFTTrainer(...).train_dataset``, and what it took."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, SettingError
from ..settings.plan import DataPlan
from .encode import RowEncoder
from .encoding import encode_set, stream_set
from .formats import RowFormat, check_completion_only, check_mask_choice, check_turns, read_format, refuse_images
from .masks import resolve_assistant_mask
from .notes import collect_notes
from .order import count_tokens
from .packing import pack_rows
from .processes import naming_processes
from .report import Report
from .sources import read_first, read_source
from .tables import Check, Tables
from .tokenizer import missing_eos, prepare_tokenizer


@dataclass(frozen=True)
class Prepared:
    """A prepared set.

    Attributes:
        dataset: Dataset or IterableDataset with ``input_ids``, ``labels`` and, packed by bfd, ``seq_lengths``.
        report: What preparation counted.
        padding_free: Whether its batches are collated into one row of documents.
        completion_only: The resolved ``completion_only_loss``, which evaluation sets follow.
    """

    dataset: Any
    report: Report
    padding_free: bool
    completion_only: bool


def prepare(
    dataset: Any,
    tokenizer: Any,
    plan: DataPlan,
    *,
    name: str,
    packing: bool,
    formatting_func: Callable[[dict[str, Any]], str] | None = None,
    like: Prepared | None = None,
    tables: Tables | None = None,
    keep_columns: bool = False,
) -> Prepared:
    """Prepares a dataset as trl 1.16 ``SFTTrainer._prepare_dataset`` does, row for row.

    Args:
        dataset: Dataset, IterableDataset or list of dicts, in any format TRL trains on.
        tokenizer: A transformers tokenizer; see :func:`~hf_mlx.data.tokenizer.prepare_tokenizer`.
        plan: The data settings.
        name: What messages and progress bars call the set: ``train``, ``eval``, …
        packing: Whether this set is packed (``plan.packing``, or ``plan.eval_packing`` for evaluation).
        formatting_func: Makes the text of a row; wins over the row's own columns.
        like: The prepared training set. An evaluation set follows its ``completion_only_loss``, as TRL's does.
        keep_columns: Raw columns stay beside the tokens (for a collator under ``remove_unused_columns=False``).
        tables: What the model can embed; the tokenizer's size when None. Rows are checked against it.

    Returns:
        A :class:`Prepared`. Its report is worth logging once.

    Raises:
        DataError: A dataset, column or row that cannot be trained on, named.
        SettingError: A setting this dataset cannot honour.
    """
    _check_settings(plan, packing)
    padding_free = plan.padding_free or (plan.packing and plan.packing_strategy != "wrapped")
    dataset = read_source(dataset, name, as_is=plan.skip_prepare_dataset)
    first, columns = read_first(dataset, name)
    if plan.skip_prepare_dataset:
        refuse_images(columns, name)
        return Prepared(dataset, _skip(dataset, columns, plan, name), padding_free, bool(plan.completion_only_loss))
    tokenizer = prepare_tokenizer(tokenizer, plan)
    tables = tables or Tables(len(tokenizer))
    found = read_format(columns, first, plan, formatting_func is not None, name)
    if found.columns[:1] == ("conversations",):
        check_turns(first, name)
    if tokenizer.eos_token is None and found.kind != "tokenized" and not found.conversational:
        raise missing_eos(tokenizer)
    if like is None:
        check_completion_only(found, columns, plan, name)
        check_mask_choice(found, columns, plan, name)
    encoder = RowEncoder(
        tokenizer=tokenizer,
        plan=plan,
        format=found,
        name=name,
        completion_only=like.completion_only if like else _resolve_completion_only(found, plan),
        assistant=resolve_assistant_mask(tokenizer) if plan.assistant_only_loss and found.conversational else None,
        packing=packing,
        tables=tables,
        formatting_func=formatting_func,
    )
    notes = collect_notes(encoder, first, columns)
    encoded, report = _encode(dataset, encoder, notes, trains=like is None, keep=keep_columns)
    if packing:
        encoded = _pack(encoded, plan, name)
        _check_packed(encoded, tables, name)
        report = report if report.rows is None else Report(**{**vars(report), "packed": len(encoded)})
    if plan.shuffle_dataset:
        encoded = encoded.shuffle(seed=plan.seed)
    return Prepared(encoded, report, padding_free, encoder.completion_only)


def prepare_eval(
    eval_dataset: Any, tokenizer: Any, plan: DataPlan, *, like: Prepared | None = None, **options: Any
) -> Prepared | dict[str, Prepared]:
    """Prepares an evaluation set, or each set of a dict (or DatasetDict), under ``eval_packing``.

    Args:
        eval_dataset: A set, or a mapping of names to sets.
        like: The prepared training set; None decides by each set alone.
        tokenizer, plan, options: As for :func:`prepare`.
    """
    packing = plan.packing if plan.eval_packing is None else plan.eval_packing
    settings = {"packing": packing, "like": like, **options}
    if isinstance(eval_dataset, Mapping):
        return {key: prepare(rows, tokenizer, plan, name=key, **settings) for key, rows in eval_dataset.items()}
    return prepare(eval_dataset, tokenizer, plan, name="eval", **settings)


def _resolve_completion_only(found: RowFormat, plan: DataPlan) -> bool:
    if plan.completion_only_loss is None:
        return found.kind == "prompt_completion"
    return plan.completion_only_loss


def _encode(dataset: Any, encoder: RowEncoder, notes: list[str], *, trains: bool, keep: bool) -> tuple[Any, Report]:
    from datasets import IterableDataset

    plan = encoder.plan
    drops = plan.max_length is not None and not encoder.packing
    # An evaluation set whose rows all stay has a loss of 0, as upstream; nothing can be learned from a training set.
    needed = trains or drops
    if isinstance(dataset, IterableDataset):
        encoded, counts = stream_set(dataset, encoder, keep=keep)
        if not counts.trained and needed:
            raise _nothing_to_train(encoder, counts)
        return encoded, Report(encoder.name, max_length=plan.max_length, notes=tuple(notes))
    with naming_processes(plan.dataset_num_proc, encoder.name):
        encoded, counts = encode_set(dataset, encoder, keep=keep)
    if counts.diverged:
        notes.append(
            f"{counts.diverged:,} rows tokenize differently where prompt and completion meet; the completion starts "
            "where they diverge, so end prompts on a token boundary"
        )
    if not counts.trained and needed:
        raise _nothing_to_train(encoder, counts)
    report = Report(
        encoder.name,
        rows=counts.rows,
        cut=counts.cut,
        short=counts.short,
        empty=counts.empty,
        masked=counts.masked,
        dropped=counts.masked if drops else 0,
        tokens=counts.tokens,
        trained=counts.trained,
        max_length=plan.max_length,
        notes=tuple(notes),
    )
    return encoded, report


def _nothing_to_train(encoder: RowEncoder, counts: Any) -> DataError:
    last, column = counts.rows - 1, encoder.format.main_column
    cut = f", and {counts.cut:,} of them are longer than max_length={encoder.plan.max_length}" if counts.cut else ""
    return DataError(
        f"rows 0 to {last} of the {encoder.name} dataset, column {column!r}: no row has a token to train on{cut}",
        "at least one row with a label that is not -100",
        "SFTConfig(max_length=None), or larger than the prompts" if counts.cut else "check the labels and masks",
    )


def _pack(encoded: Any, plan: DataPlan, name: str) -> Any:
    from datasets import IterableDataset

    assert plan.max_length is not None
    encoded = encoded.select_columns(["input_ids", "labels"])
    if plan.shuffle_dataset:
        encoded = encoded.shuffle(seed=plan.seed)
    streamed = isinstance(encoded, IterableDataset)
    options = {} if streamed else {"num_proc": plan.dataset_num_proc, "desc": f"Packing {name} dataset"}
    with naming_processes(None if streamed else plan.dataset_num_proc, name):
        return pack_rows(encoded, plan.max_length, plan.packing_strategy, **options)


def _check_packed(packed: Any, tables: Tables, name: str) -> None:
    if tables.positions is None or not hasattr(packed, "__len__"):
        return  # rows of a stream are checked as they come
    longest = max(count_tokens(packed), default=0)
    if longest > tables.positions:
        received, required, remedy = Check(tables, None).describe_length(longest)
        raise DataError(f"a packed row of the {name} dataset with {received}", required, remedy)


def _skip(dataset: Any, columns: list[str], plan: DataPlan, name: str) -> Report:
    """A set that its owner prepared: taken as it is, once its masks are sure to count."""
    masks = [column for column in ("completion_mask", "assistant_masks") if column in columns]
    if masks and "labels" not in columns:
        raise DataError(
            f"row 0 of the {name} dataset has the columns {masks} but no 'labels', with skip_prepare_dataset=True",
            "labels: masks become labels in preparation, so skipping it would train on every token",
            "add labels (-100 where the loss does not count), or drop skip_prepare_dataset",
        )
    rows = None if not hasattr(dataset, "__len__") else len(dataset)
    return Report(name, rows=rows, notes=("preparation skipped (skip_prepare_dataset=True)",))


def _check_settings(plan: DataPlan, packing: bool) -> None:
    if packing and plan.max_length is None:
        raise SettingError(
            "packing=True with max_length=None",
            "max_length is the length rows are packed to",
            "SFTConfig(packing=True, max_length=1024)",
        )
    if plan.max_length is not None and plan.max_length < 2:
        raise SettingError(
            f"max_length={plan.max_length}",
            "at least 2: each token is predicted from those before it",
            "SFTConfig(max_length=1024)",
        )
    if plan.padding_free and not plan.packing and plan.max_length is not None and not plan.skip_prepare_dataset:
        raise SettingError(
            f"padding_free=True without packing, and max_length={plan.max_length}",
            "max_length=None or packing; TRL refuses this too",
            "SFTConfig(padding_free=True, max_length=None)",
        )
