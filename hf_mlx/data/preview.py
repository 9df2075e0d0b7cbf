"""A few prepared rows as a picture: tokens that train in colour, masked ones dim. For the terminal and as HTML."""

from __future__ import annotations

import html as markup
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TextIO

from ..errors import DataError
from ..settings.plan import DataPlan
from .batch import IGNORE
from .pairs import collate_pairs
from .plain import take_rows
from .preference import prepare_preference
from .prepare import Prepared, prepare, prepare_tokenizer
from .scored_pairs import ANSWERS, ID_COLUMNS, collate_scored
from .scored_rows import prepare_scored

# Name, ids and labels.
Answer = tuple[str, list[int], list[int]]

_TRAINED, _MASKED, _RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {code: f"\\x{code:02x}" for code in range(0x7F, 0xA0)}

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.6 ui-monospace, Menlo, monospace; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  background: #fff; color: #1b1f24; }}
h1 {{ font-size: 1.1rem }} h2 {{ font-size: .9rem; margin: 2rem 0 .5rem; font-weight: 600 }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #d0d7de; border-radius: 6px; padding: 1rem }}
.t {{ background: #d7f5dd; color: #0a5c23 }} .m {{ color: #59636e }} .i {{ opacity: .6 }}
span[title]:hover {{ outline: 1px solid #0969da }}
@media (prefers-color-scheme: dark) {{ body {{ background: #0d1117; color: #e6edf3 }} pre {{ border-color: #30363d }}
  .t {{ background: #12391f; color: #7ee2a0 }} .m {{ color: #8b949e }} }}
</style></head><body>
<h1>{title}</h1><p>{report}</p>
<p><span class="t">{marked}</span> <span class="m">{other}</span>; hover for token id and position</p>
{rows}
</body></html>
"""


@dataclass(frozen=True)
class Marks:
    """What tells tokens apart.

    Attributes:
        marked: What those in colour are.
        other: What the dim ones are.
    """

    marked: str = "trained"
    other: str = "masked (label -100)"


_TRAINS, _SCORES = Marks(), Marks("scored", "read by the model")


@dataclass(frozen=True)
class Token:
    """One token of a row: its id, its text as far as it can be told alone, and whether its label counts."""

    id: int
    text: str
    trained: bool
    starts_document: bool = False


def preview(
    dataset: Any,
    tokenizer: Any,
    plan: DataPlan,
    *,
    rows: int = 3,
    html: str | os.PathLike[str] | None = None,
    formatting_func: Any = None,
    file: TextIO | None = None,
) -> Prepared:
    """Prints a few rows as they will be trained on, and writes them as one HTML file that needs nothing else.

    Args:
        dataset: Any training set :func:`~hf_mlx.data.prepare.prepare` takes.
        tokenizer: The model's tokenizer.
        plan: The data settings.
        rows: How many rows to show.
        html: Where to write the HTML page; None writes none.
        formatting_func: As for the trainer.
        file: Where to print; standard output when None. Colours are used on a terminal unless NO_COLOR is set.

    Returns:
        What :func:`~hf_mlx.data.prepare.prepare` returned, with its report.

    Raises:
        DataError, SettingError: As ``prepare`` does.
    """
    packing = plan.packing
    prepared = prepare(dataset, tokenizer, plan, name="train", packing=packing, formatting_func=formatting_func)
    hidden = () if prepared.padding_free else ("seq_lengths",)
    taken = ({key: row[key] for key in row if key not in hidden} for row in islice(iter(prepared.dataset), rows))
    shown = {f"row {number}": read_row(row, tokenizer) for number, row in enumerate(taken)}
    _show(shown, prepared.report.describe(), html, file)
    return prepared


def preview_pairs(
    dataset: Any,
    tokenizer: Any,
    plan: DataPlan,
    *,
    rows: int = 3,
    html: str | os.PathLike[str] | None = None,
    file: TextIO | None = None,
) -> Prepared:
    """The same of preference rows: each prompt with its chosen answer, and with its rejected one, cut as in training.

    Args:
        dataset: Rows with ``chosen`` and ``rejected``, and mostly ``prompt``.
        tokenizer, plan, rows, html, file: As of :func:`preview`.

    Raises:
        DataError, SettingError: As the trainer does.
    """
    tokenizer = prepare_tokenizer(tokenizer, plan)

    def answers(row: Any) -> Iterator[Answer]:
        pair = collate_pairs([row], pad_token_id=0, max_length=plan.max_length, truncation_mode=plan.truncation_mode)
        for at, answer in enumerate(ANSWERS):
            yield answer, *(part[at, : pair.lengths[at]].tolist() for part in (pair.input_ids, pair.labels))

    prepared = prepare_preference(dataset, tokenizer, plan, name="train")
    shown = _read_answers(islice(iter(prepared.dataset), rows), answers, tokenizer)
    _show(shown, prepared.report.describe(), html, file)
    return prepared


def preview_scored(
    dataset: Any,
    tokenizer: Any,
    plan: DataPlan,
    *,
    rows: int = 3,
    html: str | os.PathLike[str] | None = None,
    file: TextIO | None = None,
) -> Prepared:
    """The same of a reward model's rows: both texts of a pair, each with the token that its score is read at.

    Args:
        dataset: Rows with ``chosen`` and ``rejected``, maybe ``prompt`` and ``margin``.
        tokenizer, plan, rows, html, file: As of :func:`preview`.

    Raises:
        DataError, SettingError: As the trainer does.
    """
    tokenizer = prepare_tokenizer(tokenizer, plan)

    def answers(row: Any) -> Iterator[Answer]:
        pair = collate_scored([row], pad_token_id=tokenizer.pad_token_id)
        margin = "" if pair.margins is None else f", by {pair.margins[0]:g} at least"
        for answer, column, last in zip(ANSWERS, ID_COLUMNS, pair.last.tolist(), strict=True):
            labels = [token if place == last else IGNORE for place, token in enumerate(row[column])]
            yield f"{answer}{margin if answer == 'chosen' else ''}", list(row[column]), labels

    prepared = prepare_scored(dataset, tokenizer, plan, name="train")
    shown = _read_answers(islice(iter(prepared.dataset), rows), answers, tokenizer)
    _show(shown, prepared.report.describe(), html, file, _SCORES)
    return prepared


def preview_tokens(
    dataset: Any,
    tokenizer: Any,
    *,
    rows: int = 3,
    html: str | os.PathLike[str] | None = None,
    file: TextIO | None = None,
) -> Prepared:
    """The same of rows of ``input_ids``, which a collator gets as they are; without ``labels`` all of them train.

    Args:
        dataset, tokenizer, rows, html, file: As of :func:`preview`.

    Raises:
        DataError: Rows without ``input_ids``.
    """
    prepared, shown = take_rows(dataset, "train"), {}
    for number, row in enumerate(islice(iter(prepared.dataset), rows)):
        if "input_ids" not in row:
            raise DataError(
                f"row {number} of the train dataset with {sorted(row)}",
                "rows with input_ids (this trainer tokenizes nothing, as transformers.Trainer)",
                "dataset = dataset.map(lambda row: tokenizer(row['text']))",
            )
        ids = list(row["input_ids"])
        shown[f"row {number}"] = read_row({"input_ids": ids, "labels": list(row.get("labels", ids))}, tokenizer)
    _show(shown, prepared.report.describe(), html, file)
    return prepared


def _read_answers(
    rows: Iterable[Any], answers: Callable[[Any], Iterable[Answer]], tokenizer: Any
) -> dict[str, list[Token]]:
    """By name, what ``answers`` makes of each row: (name, ids, labels) of one answer after the other."""
    return {
        f"row {number}, {name}": read_row({"input_ids": ids, "labels": labels}, tokenizer)
        for number, row in enumerate(rows)
        for name, ids, labels in answers(row)
    }


def _show(
    shown: dict[str, list[Token]],
    report: str,
    html: str | os.PathLike[str] | None,
    file: TextIO | None,
    marks: Marks = _TRAINS,
) -> None:
    out = sys.stdout if file is None else file
    coloured = out.isatty() and "NO_COLOR" not in os.environ
    print(report, file=out)
    for name, row in shown.items():
        print(f"\n{_title(name, row, marks)}\n{render_terminal(row, coloured)}", file=out)
    if html is not None:
        Path(html).write_text(render_page(shown, report, marks), encoding="utf-8")


def read_row(row: dict[str, Any], tokenizer: Any) -> list[Token]:
    """The tokens of a prepared row.

    Args:
        row: ``input_ids``, ``labels`` and perhaps ``seq_lengths``.
        tokenizer: Gives each token's text; bytes of a character that spans tokens are shown with its last token.
    """
    starts, position = set(), 0
    for size in row.get("seq_lengths") or ():
        starts.add(position)
        position += size
    labels = [IGNORE if place in starts else label for place, label in enumerate(row["labels"])]
    texts = _split_text(row["input_ids"], tokenizer)
    return [
        Token(int(token), text, label != IGNORE, place in starts and place > 0)
        for place, (token, text, label) in enumerate(zip(row["input_ids"], texts, labels, strict=True))
    ]


def _split_text(ids: list[int], tokenizer: Any) -> Iterator[str]:
    """Text of each token, so that the texts joined are the text of the row."""
    pending: list[int] = []
    for place, token in enumerate(ids):
        pending.append(token)
        text = tokenizer.decode(pending, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and len(pending) < 4 and place + 1 < len(ids):
            yield ""
            continue
        pending = []
        yield text


def render_terminal(row: list[Token], coloured: bool = True) -> str:
    """A row for a terminal; without colours, trained stretches stand between ``[[`` and ``]]``."""
    parts = []
    for trained, run in groupby(row, key=lambda token: token.trained):
        text = "".join(("\n— next document —\n" if token.starts_document else "") + token.text for token in run)
        text = _visible(text)
        if coloured:
            parts.append(f"{_TRAINED if trained else _MASKED}{text}{_RESET}")
        else:
            parts.append(f"[[{text}]]" if trained else text)
    return "".join(parts)


def render_page(rows: dict[str, list[Token]], report: str, marks: Marks = _TRAINS) -> str:
    """All rows, by name, as one HTML page without scripts, fonts or links."""
    blocks = []
    for name, row in rows.items():
        tokens = "".join(_mark(place, token) for place, token in enumerate(row))
        blocks.append(f"<h2>{markup.escape(_title(name, row, marks))}</h2>\n<pre>{tokens}</pre>")
    legend = {"marked": marks.marked, "other": marks.other}
    return _PAGE.format(title="Training rows", report=markup.escape(report), rows="\n".join(blocks), **legend)


def _mark(place: int, token: Token) -> str:
    rule = '<hr title="next document">' if token.starts_document else ""
    text = markup.escape(_visible(token.text)).replace("\n", '<span class="i">↵</span>\n')
    return f'{rule}<span class="{"t" if token.trained else "m"}" title="id {token.id} at {place}">{text}</span>'


def _title(name: str, row: list[Token], marks: Marks) -> str:
    marked = sum(token.trained for token in row)
    return f"{name}: {len(row)} tokens, {marked} {marks.marked}"


def _visible(text: str) -> str:
    """Control characters replaced by their pictures, so that a row cannot steer the terminal."""
    return "".join(_PICTURES.get(ord(c), c) for c in text)
