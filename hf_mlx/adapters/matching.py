"""PEFT's matching rules: whether a LoraConfig reaches the module at a path, judging by names alone.

Source: ``peft.tuners.tuners_utils.check_target_module_exists`` and ``get_pattern_key`` (peft 0.21).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..settings.plan import LoraPlan

Selector = tuple[str, ...] | str


def is_matched(plan: LoraPlan, selector: Selector, path: str) -> bool:
    """Whether PEFT would adapt the module at this HF path, judging by its name alone."""
    if is_excluded(plan, path):
        return False
    if isinstance(selector, str):
        return re.fullmatch(selector, path) is not None
    if path in selector:
        return True
    if not any(path.endswith(f".{name}") for name in selector):
        return False
    if not plan.layers_to_transform:
        return True
    return layer_index(path, plan.layers_pattern) in plan.layers_to_transform


def pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches ``(.*\\.)?(pattern)$``, else the default."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def is_excluded(plan: LoraPlan, path: str) -> bool:
    """Whether PEFT leaves this module out, for ``exclude_modules`` or because it is trained in full."""
    excluded = plan.exclude_modules
    if isinstance(excluded, str) and excluded:
        if re.fullmatch(excluded, path):
            return True
    elif excluded and (path in excluded or any(path.endswith(f".{name}") for name in excluded)):
        return True
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in plan.modules_to_save or ())


def minimal_names(targets: Iterable[str], paths: Iterable[str]) -> list[str]:
    """The shortest list that, matched by suffix, selects exactly these modules.

    A module whose last name stands for nothing else is written by that name, any other in full.
    """
    targets = list(targets)
    others = {path.rsplit(".", 1)[-1] for path in set(paths) - set(targets)}
    names = (path.rsplit(".", 1)[-1] if path.rsplit(".", 1)[-1] not in others else path for path in targets)
    return list(dict.fromkeys(names))


def is_all_linear(selector: Selector) -> bool:
    """Whether this is PEFT's shorthand for every Linear layer but the head."""
    return isinstance(selector, str) and selector.lower() == "all-linear"


def layer_index(path: str, patterns: tuple[str, ...] | None) -> int | None:
    forms = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    match = next((m for form in forms if (m := re.match(form, path))), None)
    return int(match["idx"]) if match else None


def idle_patterns(plan: LoraPlan, paths: Iterable[str]) -> list[str]:
    """``rank_pattern`` and ``alpha_pattern`` entries that match none of these module paths; PEFT is silent there."""
    paths = list(paths)
    return [
        f"{name}={{{key!r}: {value!r}}}"
        for name in ("rank_pattern", "alpha_pattern")
        for key, value in getattr(plan, name).items()
        if not any(re.match(rf"(.*\.)?({key})$", path) for path in paths)
    ]
