"""What ``compute_metrics`` is called with: logits, labels, inputs and losses of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, cast

import numpy as np

from ..data.batch import Batch
from ..models.torch_arrays import like_torch, to_numpy
from ..processes.world import World
from .gathering import gather, pad
from .own_loss import read_inputs


class Predictions:
    """Collects an evaluation batch by batch, as transformers 5.23 ``Trainer.evaluation_loop`` does.

    Args:
        args: Read for ``batch_eval_metrics``, ``include_for_metrics`` and ``eval_do_concat_batches``.
        compute: ``compute_metrics``, or None.
        preprocess: ``preprocess_logits_for_metrics``: called with logits (B, T, V) and labels (B, T), as torch tensors
            where torch is installed; may return tuples, lists and dicts of arrays.
        keeps: Keep predictions even where metrics are computed by batch.
        size: What the loss of each batch counts for: ``per_device_eval_batch_size``.
        remainder: Rows of a last batch that is not full, of all processes together, to which what comes of it is cut; 0
            where it is not known.
        is_last: Whether the batch at hand is known for the last.
        world: The processes that evaluate together; None for one.
    """

    def __init__(
        self,
        args: Any,
        *,
        compute: Callable | None,
        preprocess: Callable | None,
        keeps: bool,
        size: int,
        remainder: int,
        is_last: Callable[[], bool],
        world: World | None = None,
    ) -> None:
        self._world = world
        self._compute, self._preprocess = compute, preprocess
        self._by_batch = bool(args.batch_eval_metrics)
        self._keeps = keeps or not self._by_batch
        self._included = tuple(args.include_for_metrics or ())
        self._joins = args.eval_do_concat_batches
        self._size, self._remainder, self._is_last = size, remainder, is_last
        self._parts: dict[str, list[Any]] = {"predictions": [], "labels": [], "inputs": [], "losses": []}
        self._batch: dict[str, Any] = {}
        self._metrics: Any = None

    def __call__(
        self, logits: np.ndarray, labels: np.ndarray | tuple[()] | None, batch: Batch, loss: float | None
    ) -> None:
        """Take one batch; ``labels`` and ``loss`` are None where it has no labels, ``()`` where its loss needs none."""
        if self._world is not None:
            # As accelerate's pad_across_processes, before the script sees them.
            own = np.array([logits.shape[1], labels.shape[1] if isinstance(labels, np.ndarray) else 0])
            widths = self._world.gather("a batch of predictions", own).max(axis=0)
            logits = _widen(logits, int(widths[0]))
            labels = _widen(labels, int(widths[1])) if isinstance(labels, np.ndarray) else labels
        given: Any = like_torch(logits)
        known: Any = like_torch(labels.astype(np.int64)) if isinstance(labels, np.ndarray) else labels
        if self._preprocess is not None:
            given = self._preprocess(given, known)
        inputs = batch.collated_ids.astype(np.int64) if "inputs" in self._included and self._keeps else None
        losses = None if loss is None else np.full(self._size, loss, np.float32)
        examples = batch.examples
        if self._world is not None:
            inputs = None if inputs is None else pad(inputs, self._world, 1, -100, False)
            given, known, inputs, losses = (
                None if value is None else gather(value, self._world) for value in (given, known, inputs, losses)
            )
            examples = self._remainder
        cut = self._remainder if self._is_last() and 0 < examples <= self._remainder else None
        if cut is not None:
            # accelerate leaves what cannot be cut as it is.
            with suppress(IndexError, TypeError):
                given = _map(lambda array: array[:cut], given)
            # Of a batch of pairs, which counts by pairs, it leaves the chosen answers.
            known = None if known is None else known[:cut]
        losses = None if losses is None else losses[:cut]
        self._batch = {"predictions": given, "labels": known, "losses": losses, "batch": batch}
        if not self._keeps:
            return
        for name, value in {**self._batch, "inputs": None if inputs is None else inputs[:cut]}.items():
            if name in self._parts and value is not None:
                self._parts[name].append(_map(to_numpy, value))

    def end_batch(self) -> None:
        """Compute metrics of the batch at hand, where that is asked for."""
        made, self._batch = self._batch, {}
        if not self._by_batch or self._compute is None or made.get("labels") is None:
            return
        losses = like_torch(made["losses"]) if "loss" in self._included and made["losses"] is not None else None
        inputs = read_inputs(made["batch"], "cpu") if "inputs" in self._included else None
        prediction = _prediction(made["predictions"], made["labels"], inputs, losses)
        self._metrics = self._compute(prediction, compute_result=self._is_last())

    def finish(self) -> tuple[Any, Any, dict[str, Any]]:
        """Predictions and labels of all rows (None where there are none), and what ``compute_metrics`` returned."""
        found = {name: self._join(parts) for name, parts in self._parts.items()}
        predictions, labels = found["predictions"], found["labels"]
        if self._compute is not None and not self._by_batch and predictions is not None and labels is not None:
            kept = {name: found[name] if word in self._included else None for name, word in _WORDS.items()}
            self._metrics = self._compute(_prediction(predictions, labels, kept["inputs"], kept["losses"]))
        return predictions, labels, _plain(self._metrics if self._metrics is not None else {})

    def _join(self, parts: list[Any]) -> Any:
        if not parts or not self._joins:
            return parts or None
        return _concatenate(parts)


# What include_for_metrics calls the fields of an EvalPrediction.
_WORDS = {"inputs": "inputs", "losses": "loss"}


def _widen(array: np.ndarray, width: int) -> np.ndarray:
    """Padded with -100 to (B, width, …)."""
    pads = [(0, 0), (0, width - array.shape[1]), *[(0, 0)] * (array.ndim - 2)]
    return np.pad(array, pads, constant_values=-100)


def _prediction(predictions: Any, labels: Any, inputs: Any, losses: Any) -> Any:
    from transformers import EvalPrediction

    return EvalPrediction(predictions=predictions, label_ids=labels, inputs=inputs, losses=losses)


def _plain(metrics: Any) -> dict[str, Any]:
    from transformers.trainer_utils import denumpify_detensorize

    return cast(dict[str, Any], denumpify_detensorize(metrics))


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Source: transformers 5.23 ``trainer_pt_utils.nested_numpify``."""
    if isinstance(value, (list, tuple)):
        return type(value)(_map(function, item) for item in value)
    if isinstance(value, Mapping):
        return type(value)({key: _map(function, item) for key, item in value.items()})  # pyright: ignore
    return function(value)


def _concatenate(parts: list[Any]) -> Any:
    """Source: transformers 5.23 ``trainer_pt_utils.nested_concat``: padded with -100 to one length."""
    first = parts[0]
    if isinstance(first, (list, tuple)):
        return type(first)(_concatenate(list(items)) for items in zip(*parts, strict=True))
    if isinstance(first, Mapping):
        return type(first)({key: _concatenate([part[key] for part in parts]) for key in first})  # pyright: ignore
    parts = list(map(np.atleast_1d, parts))
    if parts[0].ndim < 2:
        return np.concatenate(parts)
    length = max(part.shape[1] for part in parts)
    return np.concatenate([_widen(part, length) for part in parts])
