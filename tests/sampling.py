"""A fixed part of a wide matrix runs with every `make test`; the rest of it is marked wide, for `make compat`."""

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """The cases for ``pytest.mark.parametrize``, each but the kept ones marked wide.

    Args:
        cases: Values, or a tuple of values each.
        kept: Those that run every time: one or two of each kind, chosen by hand.
    """
    cases = list(cases)
    assert all(case in cases for case in kept), [case for case in kept if case not in cases]
    return [pytest.param(*_values(case), marks=() if case in kept else pytest.mark.wide) for case in cases]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
