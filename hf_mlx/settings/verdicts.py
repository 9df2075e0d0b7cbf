"""The four verdicts, and the rules that give one to a field.

A :class:`Rule` is a field with its upstream default and an ordered list of cases; the first case that
matches the value decides. Rules are data: the tables in :mod:`~hf_mlx.settings.training_arguments`,
:mod:`~hf_mlx.settings.sft_config` and :mod:`~hf_mlx.settings.lora_config` are written with the small
constructors below, are judged by the ledger, and are rendered into the documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Values = Mapping[str, Any]
#: Among the values that a rule sees: how many processes train together. No field has this name.
PROCESS_COUNT = "<processes>"
#: Likewise: whether the model scores rows.
SCORES = "<scores>"
Match = Callable[[Any, Values], bool]


class Verdict(StrEnum):
    """What happens to a field. There is no fifth word: nothing is accepted and then ignored."""

    HONOUR = "HONOUR"  # same effect as upstream
    ADAPT = "ADAPT"  # an equivalent effect, reached another way and said once
    NO_OP = "NO-OP"  # cannot change results here
    REFUSE = "REFUSE"  # cannot be honoured, and ignoring it would change results


# The order in which the rulings on the keys of one dict combine into the ruling on the field.
_SEVERITY = (Verdict.REFUSE, Verdict.ADAPT, Verdict.HONOUR, Verdict.NO_OP)


@dataclass(frozen=True)
class Ruling:
    """One verdict with its reason.

    Attributes:
        verdict: One of the four.
        reason: Why, in a phrase that follows the field's name.
        remedy: The corrected line. Required for REFUSE, and for an ADAPT that changes numbers (``strict`` refuses it).
        changes_numbers: The loss curve differs from upstream's by more than rounding.
    """

    verdict: Verdict
    reason: str
    remedy: str = ""
    changes_numbers: bool = False


@dataclass(frozen=True)
class Case:
    """A condition on a field's value; ``when`` says it in words, for the documentation."""

    when: str
    matches: Match
    ruling: Ruling


@dataclass(frozen=True)
class Rule:
    """What happens to one field.

    Attributes:
        field: HF's own name.
        default: The upstream default, which is never refused.
        cases: Tried in order; the last one matches everything.
    """

    field: str
    default: Any
    cases: tuple[Case, ...]

    def judge(self, value: Any, values: Values) -> Ruling:
        """Rule on ``value``, given all the values it was set together with."""
        ruling = self._decide(value, values)
        if ruling.verdict in (Verdict.REFUSE, Verdict.ADAPT) and is_default(value, self.default):
            return Ruling(Verdict.HONOUR, "at its default")
        return ruling

    def _decide(self, value: Any, values: Values) -> Ruling:
        return next(case.ruling for case in self.cases if case.matches(value, values))


@dataclass(frozen=True)
class ComputedRule(Rule):
    """A field that a function rules on, with a reason that names the culprit; ``cases`` only document it."""

    compute: Callable[[Any, Values], Ruling]

    def _decide(self, value: Any, values: Values) -> Ruling:
        return self.compute(value, values)


@dataclass(frozen=True)
class DictRule(Rule):
    """A field that holds a dict: each key has a rule of its own, and ``cases`` is for a key that has none."""

    keys: tuple[Rule, ...] = ()

    def _decide(self, value: Any, values: Values) -> Ruling:
        if is_default(value, None):
            return Ruling(Verdict.HONOUR, "not set")
        if not isinstance(value, Mapping):
            return Ruling(Verdict.REFUSE, f"takes a dict, not {type(value).__name__}", f"{self.field}={{...}} or None")
        known = {rule.field: rule for rule in self.keys}
        rulings = {
            key: known[key].judge(item, values) if key in known else super(DictRule, self)._decide(item, values)
            for key, item in value.items()
        }
        verdict = min((ruling.verdict for ruling in rulings.values()), key=_SEVERITY.index)
        worst = {key: ruling for key, ruling in rulings.items() if ruling.verdict is verdict}
        return Ruling(
            verdict,
            "; ".join(f"{key!r} {ruling.reason}" for key, ruling in worst.items()),
            "; ".join(dict.fromkeys(ruling.remedy.replace("{key}", str(key)) for key, ruling in worst.items())),
            any(ruling.changes_numbers for ruling in rulings.values()),
        )


def is_default(value: Any, default: Any) -> bool:
    """Whether ``value`` asks for nothing beyond ``default``; None and the empty containers are one value."""
    if _is_empty(default):
        return _is_empty(value)
    return type(value) in (type(default), int, float) and value == default


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, tuple, dict, set, frozenset)) and not value)


# --- the constructors that the tables are written with ---------------------------------------------------------------


def honoured(reason: str) -> Ruling:
    """Same effect as upstream."""
    return Ruling(Verdict.HONOUR, reason)


def adapted(reason: str, *, write: str = "", changes_numbers: bool = False) -> Ruling:
    """An equivalent effect reached another way; ``write`` is the line that ``strict`` asks for."""
    return Ruling(Verdict.ADAPT, reason, write, changes_numbers)


def no_op(reason: str) -> Ruling:
    """Cannot change results here."""
    return Ruling(Verdict.NO_OP, reason)


def refused(reason: str, *, write: str) -> Ruling:
    """Cannot be honoured; ``write`` is the corrected line."""
    return Ruling(Verdict.REFUSE, reason, write)


def always(ruling: Ruling) -> Case:
    """The case that matches every value."""
    return Case("any value", lambda value, values: True, ruling)


def otherwise(ruling: Ruling) -> Case:
    """The last case, after others."""
    return Case("anything else", lambda value, values: True, ruling)


def one_of(*options: Any, ruling: Ruling) -> Case:
    """The value is one of ``options``; True and 1 are different values."""

    def matches(value: Any, values: Values) -> bool:
        return any(type(value) is type(option) and value == option for option in options)

    return Case(", ".join(repr(option) for option in options), matches, ruling)


def enabled(ruling: Ruling) -> Case:
    """The switch is on; 1 counts, as it does upstream."""
    return Case("True", lambda value, values: bool(value), ruling)


def given(when: str, matches: Match, ruling: Ruling) -> Case:
    """A condition in words and in code; ``matches`` gets the value and all the values set with it."""
    return Case(when, matches, ruling)


def several(ruling: Ruling) -> Case:
    """More than one process trains."""
    return Case("several processes", lambda value, values: values.get(PROCESS_COUNT, 1) > 1, ruling)


def honour(field: str, default: Any, reason: str) -> Rule:
    """A field that means what it means upstream, whatever its value."""
    return Rule(field, default, (always(honoured(reason)),))


def ignore(field: str, default: Any, reason: str) -> Rule:
    """A field that cannot change results here, whatever its value."""
    return Rule(field, default, (always(no_op(reason)),))


def adapt(field: str, default: Any, reason: str) -> Rule:
    """A field whose every other value is reached another way, with the same numbers."""
    return Rule(field, default, (always(adapted(reason)),))


def refuse(field: str, default: Any, reason: str, *, write: str) -> Rule:
    """A field that only its default is accepted for."""
    return Rule(field, default, (always(refused(reason, write=write)),))


def alone(field: str, default: Any, ruling: Ruling, reason: str, write: str, accepted: tuple[Any, ...] = ()) -> Rule:
    """A field that several processes take at its default only, or at ``accepted``; ``ruling`` is that of one."""

    def matches(value: Any, values: Values) -> bool:
        return values.get(PROCESS_COUNT, 1) > 1 and value not in (default, *accepted)

    refusal = given(
        "any other value on several processes", matches, refused(f"on several processes {reason}", write=write)
    )
    return cases(field, default, refusal, otherwise(ruling))


def cases(field: str, default: Any, *listed: Case) -> Rule:
    """A field whose verdict depends on its value; the last case must match everything."""
    return Rule(field, default, listed)
