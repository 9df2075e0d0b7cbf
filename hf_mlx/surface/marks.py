"""How a frozen parameter of the user's object is known to be as it was, without a copy of it."""

from __future__ import annotations

from typing import Any

from ..models.bridge import TorchModel

# Of a larger tensor every n-th number is kept: a write through ``.data`` leaves no other trace.
_SAMPLE = 4096


class FrozenMarks:
    """Place, torch's count of writes and a sample of each parameter that is not trained.

    Args:
        source: The user's object.
    """

    def __init__(self, source: TorchModel) -> None:
        self._marks = {name: _mark(value) for name, value in _frozen(source)}

    def find_written(self, source: TorchModel) -> str | None:
        """Name of a parameter that was written since; None for none."""
        return next((name for name, value in _frozen(source) if not _same(self._marks.get(name), _mark(value))), None)


def _frozen(source: TorchModel) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in source.model.named_parameters() if not value.requires_grad]


def _mark(value: Any) -> tuple[int, int, Any]:
    flat = value.detach().reshape(-1)
    return value.data_ptr(), value._version, flat[:: max(1, flat.numel() // _SAMPLE)].clone()


def _same(old: tuple[int, int, Any] | None, new: tuple[int, int, Any]) -> bool:
    return old is not None and old[:2] == new[:2] and old[2].equal(new[2])
