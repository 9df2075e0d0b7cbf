"""The ledger itself: rulings on fields, to iterate over, to print, and to stop a run with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..errors import SettingError
from .entry import Entry
from .tables import rich_table, text_table
from .verdicts import Verdict


class Ledger:
    """What happens to each field; iterates as ``(field, value, verdict, reason)`` and prints as a table.

    Attributes:
        entries: All of them, in the order of the tables.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = tuple(entries)

    def __iter__(self) -> Iterator[tuple[str, Any, Verdict, str]]:
        return ((entry.field, entry.value, entry.verdict, entry.reason) for entry in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, field: str) -> Entry:
        """The entry of a field, by name; an argument comes before a LoraConfig field of the same name."""
        for entry in self.entries:
            if entry.field == field:
                return entry
        raise KeyError(field)

    def __str__(self) -> str:
        return self.as_text()

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.given(verdict))} {verdict}" for verdict in Verdict)
        return f"<Ledger of {len(self)} fields: {counts}>"

    def __rich__(self) -> Any:
        return rich_table(self.entries)

    def as_text(self, *, changed_only: bool = False) -> str:
        """A table in plain text; with ``changed_only``, of the fields that were set and those done another way."""
        return text_table(self.changed() if changed_only else self.entries)

    def show(self, *, changed_only: bool = False) -> None:
        """Print the table, with rich's colours where rich is installed."""
        try:
            import rich
        except ImportError:
            print(self.as_text(changed_only=changed_only))
            return
        rich.print(rich_table(self.changed() if changed_only else self.entries))

    def changed(self) -> tuple[Entry, ...]:
        """The entries that are not at upstream's default, and those whose default is done another way."""
        return tuple(entry for entry in self.entries if not entry.default or entry.verdict is Verdict.ADAPT)

    def given(self, verdict: Verdict | str) -> tuple[Entry, ...]:
        """The entries with one verdict."""
        return tuple(entry for entry in self.entries if entry.verdict == verdict)

    @property
    def refused(self) -> tuple[Entry, ...]:
        """The entries that stop the run."""
        return self.given(Verdict.REFUSE)

    def adapted(self, changes_numbers: bool | None = None) -> tuple[Entry, ...]:
        """The entries that are done another way; True: only those whose curve differs, False: only the others."""
        found = self.given(Verdict.ADAPT)
        return tuple(entry for entry in found if changes_numbers in (None, entry.ruling.changes_numbers))

    def notices(self) -> list[str]:
        """What the log says once: a line for each field that is done another way."""
        return [f"{entry.field}={entry.shown}: {entry.reason}" for entry in self.adapted()]

    def raise_refused(self, strict: bool = False) -> None:
        """Stop when a field cannot be honoured.

        Args:
            strict: Also stop at an ADAPT that changes numbers.

        Raises:
            SettingError: Names every such field: the value received, why, and what to write instead.
        """
        found = self.refused + (self.adapted(changes_numbers=True) if strict else ())
        if not found:
            return
        joined = "\n    " if len(found) > 1 else ""
        raise SettingError(
            ", ".join(f"{entry.field}={entry.shown}" for entry in found),
            joined + joined.join(f"{entry.owner}.{entry.field} {entry.reason}" for entry in found),
            joined + joined.join(f"write {entry.remedy}" for entry in found),
        )
