"""Which of TRL's dataset formats a set has, read from its columns and its first row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import DataError, SettingError
from ..settings.plan import DataPlan
from .faults import show

Kind = Literal["text", "formatted", "messages", "prompt_completion", "tokenized"]

_CHAT_EXTRAS = ("tools", "chat_template_kwargs")
_LABELS = ("labels", "completion_mask", "assistant_masks")
_TOKENIZED = ("input_ids", *_LABELS)


@dataclass(frozen=True)
class RowFormat:
    """How rows are read.

    Attributes:
        kind: ``formatted`` means that a ``formatting_func`` makes the text.
        columns: The columns preparation reads and replaces; every other column stays beside the new ones.
        conversational: Rows hold messages rather than strings.
    """

    kind: Kind
    columns: tuple[str, ...]
    conversational: bool = False

    @property
    def main_column(self) -> str:
        """The column an error about the whole row names."""
        return {"formatted": "formatting_func", "prompt_completion": "completion"}.get(self.kind, self.columns[0])


def read_format(columns: Sequence[str], first: Mapping[str, Any], plan: DataPlan, formatted: bool, name: str):
    """Returns the :class:`RowFormat` of a set, or says which columns are missing or contradict each other.

    Args:
        columns: Column names of the set.
        first: Its first row. As in TRL, it decides for all rows; each row is checked against it later.
        plan: The data settings.
        formatted: Whether a ``formatting_func`` was given.
        name: What messages call the set (``train``, ``eval``, …).

    Raises:
        DataError: No trainable column, two formats at once, labels of other tokens, images, preference data.
        SettingError: A mask setting that this format cannot honour.
    """
    refuse_images(columns, name)
    if "input_ids" in columns:
        found = RowFormat("tokenized", tuple(c for c in _TOKENIZED if c in columns))
    elif formatted:
        found = RowFormat("formatted", tuple(columns))
    else:
        found = _match_columns(columns, first, plan, name)
    _refuse_labels(found, columns, name)
    _check_masks(found, columns, plan, name)
    return found


def _match_columns(columns: Sequence[str], first: Mapping[str, Any], plan: DataPlan, name: str) -> RowFormat:
    have = set(columns)
    extras = tuple(c for c in _CHAT_EXTRAS if c in have)
    matches = [c for c in ("messages", "conversations") if c in have]
    matches += [plan.dataset_text_field] if plan.dataset_text_field in have - set(matches) else []
    pair = [c for c in ("prompt", "completion") if c in have]
    if len(matches) + bool(pair) > 1:
        keep, *spare = [*matches, *pair] if pair != ["prompt", "completion"] else [*pair, *matches][1:]
        raise DataError(
            f"row 0 of the {name} dataset has the columns {sorted({*matches, *pair})}, which are two formats at once",
            "one of text, messages, conversations, or prompt with completion; TRL uses one and ignores the other, "
            "or stops with a KeyError",
            f"keep the one to train on: dataset = dataset.remove_columns({spare!r})  # trains on {keep!r}",
        )
    if matches == [plan.dataset_text_field] and matches[0] not in ("messages", "conversations"):
        return RowFormat("text", (matches[0],))
    if matches:
        return RowFormat("messages", (*matches, *extras), conversational=True)
    if len(pair) == 2:
        conversational = isinstance(first.get("prompt"), list)
        return RowFormat("prompt_completion", (*pair, *(extras if conversational else ())), conversational)
    raise _missing_column(columns, pair, plan, name)


def _missing_column(columns: Sequence[str], pair: list[str], plan: DataPlan, name: str) -> DataError:
    if "chosen" in columns or "rejected" in columns:
        return DataError(
            f"the {name} dataset holds preference pairs: row 0 has the columns {sorted(columns)}",
            "supervised fine-tuning trains on one answer",
            "dataset = dataset.rename_column('chosen', 'messages').remove_columns('rejected')",
        )
    if pair:
        lacking = "completion" if pair == ["prompt"] else "prompt"
        return DataError(
            f"the {name} dataset has {pair[0]!r} but row 0 has no {lacking!r}, only {sorted(columns)}",
            "prompt-completion rows have both columns",
            f"dataset = dataset.rename_column('your_column', {lacking!r})",
        )
    return DataError(
        f"the {name} dataset: row 0 has no column {plan.dataset_text_field!r}; its columns are {sorted(columns)}",
        "a text column, messages, conversations, prompt with completion, or input_ids",
        "name your text column: SFTConfig(dataset_text_field='your_column'), or pass a formatting_func",
    )


def refuse_images(columns: Sequence[str], name: str) -> None:
    """Refuse a set with a column of images, which would be left out.

    Raises:
        DataError: Names the column.
    """
    media = [c for c in ("image", "images", "pixel_values") if c in columns]
    if media:
        raise DataError(
            f"the {name} dataset: row 0 has the column {media[0]!r}",
            "text only: images are not trained on here, and training without them would change the task",
            f"dataset = dataset.remove_columns({media!r}), if the text alone is what you want to train on",
        )


def _refuse_labels(found: RowFormat, columns: Sequence[str], name: str) -> None:
    # trl 1.16, SFTTrainer._prepare_dataset, keeps such a column and trains on it, whatever the row's tokens are.
    spare = [c for c in _LABELS if c in columns and found.kind != "tokenized"]
    if spare:
        raise DataError(
            f"row 0 of the {name} dataset has the column {spare[0]!r} beside {found.main_column!r}",
            "labels and masks belong to tokens, so they come with input_ids; TRL would lay this column over the "
            "tokens that it makes of the row",
            f"dataset = dataset.remove_columns({spare!r}), or rename_column where it means something else",
        )


def _check_masks(found: RowFormat, columns: Sequence[str], plan: DataPlan, name: str) -> None:
    if plan.assistant_only_loss and not found.conversational and "assistant_masks" not in columns:
        raise SettingError(
            f"assistant_only_loss=True with a {name} dataset that is not conversational ({found.main_column!r})",
            "messages with roles, so that the assistant's turns can be told apart",
            "SFTConfig(assistant_only_loss=False), or give the dataset a 'messages' column",
        )


def check_mask_choice(found: RowFormat, columns: Sequence[str], plan: DataPlan, name: str) -> None:
    """Refuses a ``completion_mask`` that nobody said to use; TRL ignores it silently.

    Raises:
        SettingError: With both lines that settle it.
    """
    masked = found.kind == "tokenized" and "completion_mask" in columns and "labels" not in columns
    if masked and plan.completion_only_loss is None:
        raise SettingError(
            f"a completion_mask column in the tokenized {name} dataset, with completion_only_loss=None",
            "an explicit choice: TRL ignores the mask here and trains on the prompt too",
            "SFTConfig(completion_only_loss=True) to train on the completion, False to train on every token",
        )


def check_completion_only(found: RowFormat, columns: Sequence[str], plan: DataPlan, name: str) -> None:
    """Refuses ``completion_only_loss=True`` where there is no completion; TRL silently trains on everything.

    Raises:
        SettingError: With the line to write instead.
    """
    if plan.completion_only_loss is not True or found.kind == "prompt_completion":
        return
    if found.kind == "tokenized" and ("completion_mask" in columns or "labels" in columns):
        return
    if found.kind == "formatted":
        raise SettingError(
            "completion_only_loss=True with a formatting_func",
            "prompt and completion columns: the formatter joins them into one text",
            "format the dataset beforehand into prompt and completion, or SFTConfig(completion_only_loss=False)",
        )
    raise SettingError(
        f"completion_only_loss=True with a {name} dataset of {found.main_column!r} rows",
        "prompt and completion columns, or tokenized rows with a completion_mask",
        "SFTConfig(completion_only_loss=None), or split each row into 'prompt' and 'completion'",
    )


def is_from_value(first: Mapping[str, Any]) -> bool:
    """Whether ``conversations`` holds from/value turns (``trl.data_utils.is_conversational_from_value``)."""
    turns = first.get("conversations")
    return bool(isinstance(turns, list) and turns and isinstance(turns[0], dict) and {"from", "value"} <= set(turns[0]))


def check_turns(first: Mapping[str, Any], name: str) -> None:
    """Refuses ``conversations`` whose turns are not from/value, which TRL does not read.

    Raises:
        DataError: With the rename that makes TRL, and this library, read them.
    """
    turns = first.get("conversations")
    if not is_from_value(first) and isinstance(turns, list) and turns and isinstance(turns[0], dict):
        raise DataError(
            f"row 0 of the {name} dataset, column 'conversations': turns with the keys {sorted(turns[0])}, "
            f"such as {show(turns[0])}",
            "turns with 'from' and 'value'; role/content turns belong in a column called 'messages'",
            "dataset = dataset.rename_column('conversations', 'messages')",
        )
