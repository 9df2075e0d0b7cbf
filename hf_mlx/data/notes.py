"""What a prepared set's report says beyond its counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .batch import IGNORE
from .encode import RowEncoder


def collect_notes(encoder: RowEncoder, first: Mapping[str, Any], columns: list[str]) -> list[str]:
    """What to say once, seen on the first row; an error in that row is raised here, before any map starts.

    Args:
        encoder: The encoder of the set.
        first: Its first row.
        columns: Its column names.

    Raises:
        DataError: The first row cannot be trained on.
    """
    notes = []
    batch = {column: [first[column]] for column in encoder.format.columns}
    rows = encoder(batch, [0])
    ids = rows.input_ids[0]
    bos = encoder.tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        notes.append("rows start with BOS twice: the text holds it and the tokenizer adds one, as under TRL")
    if encoder.format.kind == "formatted" and {"messages", "prompt", "completion", "conversations"} & set(columns):
        notes.append("formatting_func's text is trained; TRL would ignore it for the row's own prompt or messages")
    if encoder.format.kind == "tokenized" and encoder.formatting_func is not None:
        notes.append(
            "formatting_func is not called, as under TRL: the rows are tokenized already; to format them, "
            "dataset = dataset.remove_columns('input_ids')"
        )
    if encoder.format.conversational and not rows.cut[0] and not _ends_turn(encoder.tokenizer, rows.labels[0]):
        notes.append("the last trained token of row 0 is no end-of-turn token, so the model may not learn to stop")
    mask = encoder.assistant
    if mask is not None and mask.family is not None:
        thinking = ", with a thinking block in every turn" if mask.template else ""
        notes.append(f"assistant turns found by the {mask.family.name} delimiters{thinking}")
    if encoder.packing and encoder.plan.packing_strategy == "wrapped":
        notes.append("wrapped packing: tokens attend across documents")
    elif encoder.packing and not encoder.plan.packing and not encoder.plan.padding_free:
        notes.append("packed documents see each other here, as under TRL, since the training set is not packed")
    if encoder.format.columns[:1] == ("conversations",):
        roles = sorted({str(turn.get("from")) for turn in first["conversations"]} - {"system", "user", "assistant"})
        notes += [f"the roles {roles} go to the chat template as they are"] if roles else []
    return notes


def _ends_turn(tokenizer: Any, labels: list[int]) -> bool:
    """Whether the last trained token, whitespace aside, is an added one; True where nothing is trained.

    As trl 1.16 ``is_chat_template_stop_token_trained`` judges a template.
    """
    added = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    for label in reversed(labels):
        if label != IGNORE and tokenizer.decode([label]).strip():
            return label in added
    return True
