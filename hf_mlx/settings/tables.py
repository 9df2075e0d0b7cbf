"""The ledger and its rules as tables: text and rich for a terminal, Markdown for the documentation."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from .dpo_config import DPO_CONFIG
from .entry import Entry
from .lora_config import LORA_CONFIG
from .reward_config import REWARD_CONFIG
from .sft_config import SFT_CONFIG, SFT_DEFAULTS
from .training_arguments import TRAINING_ARGUMENTS
from .verdicts import Case, DictRule, Rule, Verdict

_HEADER = ("field", "value", "verdict", "reason")
_STYLES = {Verdict.HONOUR: "green", Verdict.ADAPT: "yellow", Verdict.NO_OP: "dim", Verdict.REFUSE: "bold red"}
_VALUE_WIDTH = 28
_REASON_WIDTH = 70

CLASSES: dict[str, tuple[Rule, ...]] = {
    "TrainingArguments": TRAINING_ARGUMENTS,
    "SFTConfig": SFT_CONFIG,
    "DPOConfig": DPO_CONFIG,
    "RewardConfig": REWARD_CONFIG,
    "LoraConfig": LORA_CONFIG,
}


def text_table(entries: Sequence[Entry]) -> str:
    """A table in plain text, reasons wrapped; a refused field is followed by what to write instead."""
    rows = [_HEADER, *(_row(entry) for entry in entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    indent = sum(widths) + 6
    lines = []
    for row in rows:
        head = "  ".join(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True))
        lines += textwrap.wrap(
            f"{head}  {row[3]}", indent + _REASON_WIDTH, subsequent_indent=" " * indent, drop_whitespace=True
        ) or [head]
    return "\n".join(lines)


def rich_table(entries: Iterable[Entry]) -> Any:
    """The same as a ``rich.table.Table``, verdicts in colour."""
    from rich.table import Table
    from rich.text import Text

    table = Table(*_HEADER, show_lines=False)
    for entry in entries:
        field, value, verdict, reason = _row(entry)
        table.add_row(Text(field), Text(value), Text(verdict, style=_STYLES[entry.verdict]), Text(reason))
    return table


def markdown_table(name: str) -> str:
    """The rules of ``"TrainingArguments"``, ``"SFTConfig"`` or ``"LoraConfig"`` as one Markdown table."""
    lines = ["| field | default | value | verdict | what it does |", "|---|---|---|---|---|"]
    for rule in CLASSES[name]:
        default = f"`{rule.default!r}`"
        if name == "TrainingArguments" and rule.field in SFT_DEFAULTS:
            default += f" (SFTConfig: `{SFT_DEFAULTS[rule.field]!r}`)"
        for when, case in _documented(rule):
            lines.append(f"| `{rule.field}` | {default} | {when} | {_verdict(case)} | {_what(case)} |")
    return "\n".join(lines) + "\n"


def markdown_summary() -> str:
    """The README's short table: how many fields have which verdict, and the ones that are refused when set."""
    lines = ["| class | fields | honoured | adapted | no effect here | refused when set |", "|---|---|---|---|---|---|"]
    for name, rules in CLASSES.items():
        kinds = [_worst(rule) for rule in rules]
        counts = " | ".join(str(kinds.count(verdict)) for verdict in Verdict)
        lines.append(f"| `{name}` | {len(rules)} | {counts} |")
    return "\n".join(lines) + "\n"


def _row(entry: Entry) -> tuple[str, str, str, str]:
    value = entry.shown
    if len(value) > _VALUE_WIDTH:
        value = value[: _VALUE_WIDTH - 1] + "…"
    reason = f"{entry.reason}; write {entry.remedy}" if entry.verdict is Verdict.REFUSE else entry.reason
    return entry.field, value, str(entry.verdict), reason


def _documented(rule: Rule) -> Iterable[tuple[str, Case]]:
    if isinstance(rule, DictRule):
        for key in rule.keys:
            for when, case in _documented(key):
                yield f"`{key.field}`: {when}", case
        for case in rule.cases:
            yield "any other key" + (f" {case.when}" if case.when.startswith("with") else ""), case
        return
    for case in rule.cases:
        refuses_any = case.when == "any value" and case.ruling.verdict in (Verdict.REFUSE, Verdict.ADAPT)
        yield ("anything but the default" if refuses_any else _cell(case.when)), case


def _verdict(case: Case) -> str:
    numbers = " (changes numbers)" if case.ruling.changes_numbers else ""
    return f"**{case.ruling.verdict}**{numbers}"


def _what(case: Case) -> str:
    remedy = f"; write `{case.ruling.remedy}`" if case.ruling.verdict is Verdict.REFUSE else ""
    return _cell(case.ruling.reason) + remedy.replace("|", "\\|")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _worst(rule: Rule) -> Verdict:
    # A field counts as what most of its values get: honoured if any value is, refused only if every other one is.
    verdicts = [case.ruling.verdict for _, case in _documented(rule)]
    order = (Verdict.HONOUR, Verdict.ADAPT, Verdict.NO_OP, Verdict.REFUSE)
    return min(verdicts, key=order.index)
