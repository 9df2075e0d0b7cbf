"""What preparation did to a set: rows read, cut and dropped, and the share of tokens that train."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """Counts of one prepared set. A streamed set is counted as it is read, so its counts are None.

    Attributes:
        name: What the set is called (``train``, ``eval``, …).
        rows: Rows read.
        cut: Rows longer than ``max_length`` (with ``bfd_split`` they are split, not cut).
        short, empty: Rows of one token, which nothing predicts, and of none.
        masked: Rows without a single trained token; dropped where ``dropped`` says so.
        dropped: Rows left out because truncation or masks leave nothing to train.
        tokens: Tokens that reach the model.
        trained: Tokens whose label is not -100.
        packed: Rows after packing; None when not packed.
        max_length: The limit rows were held to.
        notes: Sentences worth saying once: what was done differently from what a reader may expect.
    """

    name: str
    rows: int | None = None
    cut: int | None = None
    short: int | None = None
    empty: int | None = None
    masked: int | None = None
    dropped: int | None = None
    tokens: int | None = None
    trained: int | None = None
    packed: int | None = None
    max_length: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def trained_share(self) -> float | None:
        """Trained tokens over all tokens, 0 to 1."""
        return self.trained / self.tokens if self.tokens and self.trained is not None else None

    def describe(self) -> str:
        """One line for the log."""
        if self.rows is None:
            limit = "" if self.max_length is None else f"; rows over {self.max_length} tokens are cut"
            return "; ".join([f"{self.name}: streamed, prepared as it is read{limit}", *self.notes])
        parts = [f"{self.name}: {self.rows:,} rows"]
        if self.max_length is None:
            parts.append("none cut (max_length=None)")
        else:
            parts.append(f"{self.cut or 0:,} longer than max_length={self.max_length}")
        if self.short:
            parts.append(f"{self.short:,} of one token, which nothing predicts")
        if self.empty:
            parts.append(f"{self.empty:,} without a token")
        if self.dropped:
            parts.append(f"{self.dropped:,} dropped with nothing left to train")
        elif self.masked:
            parts.append(f"{self.masked:,} with nothing to train")
        if self.packed is not None:
            parts.append(f"packed into {self.packed:,}")
        if self.trained_share is not None:
            parts.append(f"{self.trained_share:.1%} of {self.tokens:,} tokens trained")
        return "; ".join([", ".join(parts), *self.notes])
