"""One ruling of the ledger: a field, its value and what happens to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .verdicts import Ruling, Verdict

_SECRETS = ("hub_token", "token")
_HIDDEN = "***"


@dataclass(frozen=True)
class Entry:
    """One field and what happens to it.

    Attributes:
        owner: The class it was set on, by name.
        field: HF's name.
        value: What was received, as a plain value.
        default: Whether that is upstream's default, so that nobody asked for it.
        ruling: The verdict, the reason and, for REFUSE, the corrected line.
    """

    owner: str
    field: str
    value: Any
    default: bool
    ruling: Ruling

    @property
    def shown(self) -> str:
        """The value for people to read; a token is never printed."""
        value = self.value
        if isinstance(value, Mapping):
            value = {key: _HIDDEN if item and key in _SECRETS else item for key, item in value.items()}
        return repr(_HIDDEN if value and self.field in _SECRETS else value)

    @property
    def verdict(self) -> Verdict:
        """One of the four."""
        return self.ruling.verdict

    @property
    def reason(self) -> str:
        """Why, in a phrase."""
        return self.ruling.reason

    @property
    def remedy(self) -> str:
        """The corrected line, or an empty string."""
        return self.ruling.remedy
