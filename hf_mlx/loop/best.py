"""The best metric so far, as transformers keeps it."""

from __future__ import annotations

import math
from typing import Any


def read_metric(name: str, metrics: dict[str, float]) -> float:
    """The evaluation metric called ``name``, with or without its ``eval_`` prefix.

    Raises:
        KeyError: As upstream, with the metrics there are.
    """
    key = name if name.startswith("eval_") else f"eval_{name}"
    if key not in metrics:
        raise KeyError(
            f"received: metric_for_best_model={name!r}; required: one of the evaluation metrics {sorted(metrics)}; "
            f"remedy: return {key.removeprefix('eval_')!r} from compute_metrics or name another metric"
        )
    return metrics[key]


def update_best(args: Any, state: Any, metrics: dict[str, float]) -> bool:
    """Record a new best metric in ``state``; True when there is one (transformers ``_determine_best_metric``)."""
    if args.metric_for_best_model is None:
        return False
    value = read_metric(args.metric_for_best_model, metrics)
    better = state.best_metric is None or (
        value > state.best_metric if args.greater_is_better else value < state.best_metric
    )
    # Upstream compares with an infinite start, so a NaN is never the best.
    if not better or math.isnan(value):
        return False
    state.best_metric = value
    if args.save_strategy != "no":
        state.best_global_step = state.global_step
    return True
