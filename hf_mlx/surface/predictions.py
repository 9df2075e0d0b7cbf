"""What ``compute_metrics`` is called with: logits, labels, inputs and losses of an evaluation."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, cast

import numpy as np

from ..data.batch import Batch
from ..errors import SettingError
from ..models.torch_arrays import like_torch, to_numpy
from ..processes.world import World
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
        remainder: Rows of a last batch that is not full, to which what comes of it is cut; 0 where it is not known.
        ends: Whether the last batch is known for the last.
        world: The processes that evaluate together; None for one.
        rows: Of the set, where several processes repeat some to have as many each.

    Raises:
        SettingError: Several processes cannot compute metrics from what is asked for.
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
        ends: bool,
        world: World | None = None,
        rows: int | None = None,
    ) -> None:
        if world is not None:
            _check_processes(args)
        self._world, self._rows = world, rows
        self._compute, self._preprocess = compute, preprocess
        self._by_batch = bool(args.batch_eval_metrics)
        self._keeps = keeps or not self._by_batch
        self._included = tuple(args.include_for_metrics or ())
        self._joins = args.eval_do_concat_batches
        self._size, self._remainder, self._ends = size, remainder, ends
        self._parts: dict[str, list[Any]] = {"predictions": [], "labels": [], "inputs": [], "losses": []}
        self._batch: dict[str, Any] = {}
        self._is_last = False
        self._metrics: Any = None

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """``batches``, each once it is known whether another follows, as accelerate's loaders give them."""
        rest = iter(batches)
        following = next(rest, None)
        while following is not None:
            batch, following = following, next(rest, None)
            self._is_last = self._ends and following is None
            yield batch

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
        is_cut = self._world is None and self._is_last and 0 < batch.examples <= self._remainder
        cut = self._remainder if is_cut else None
        if cut is not None:
            # accelerate leaves what cannot be cut as it is.
            with suppress(IndexError, TypeError):
                given = _map(lambda array: array[:cut], given)
            # Of a batch of pairs, which counts by pairs, it leaves the chosen answers.
            known = None if known is None else known[:cut]
        losses = None if loss is None else np.full(min(cut or self._size, self._size), loss, np.float32)
        self._batch = {"predictions": given, "labels": known, "losses": losses, "batch": batch}
        if not self._keeps:
            return
        inputs = batch.collated_ids[:cut].astype(np.int64) if "inputs" in self._included else None
        for name, value in {**self._batch, "inputs": inputs}.items():
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
        self._metrics = self._compute(prediction, compute_result=self._is_last)

    def finish(self) -> tuple[Any, Any, dict[str, Any]]:
        """Predictions and labels of all rows (None where there are none), and what ``compute_metrics`` returned."""
        found = {name: self._join(parts) for name, parts in self._parts.items()}
        predictions, labels = found["predictions"], found["labels"]
        if self._compute is not None and not self._by_batch and predictions is not None and labels is not None:
            kept = {name: found[name] if word in self._included else None for name, word in _WORDS.items()}
            self._metrics = self._compute(_prediction(predictions, labels, kept["inputs"], kept["losses"]))
        return predictions, labels, _plain(self._metrics if self._metrics is not None else {})

    def _join(self, parts: list[Any]) -> Any:
        if parts and self._world is not None:
            return _concatenate(_gather_rows(parts, self._world))[: self._rows]
        if not parts or not self._joins:
            return parts or None
        return _concatenate(parts)


# What include_for_metrics calls the fields of an EvalPrediction.
_WORDS = {"inputs": "inputs", "losses": "loss"}


def _check_processes(args: Any) -> None:
    asked = {
        "batch_eval_metrics": bool(args.batch_eval_metrics),
        "include_for_metrics": bool(args.include_for_metrics),
        "eval_do_concat_batches=False": not args.eval_do_concat_batches,
    }
    for name in (name for name, is_asked in asked.items() if is_asked):
        raise SettingError(
            f"{name} on several processes",
            "metrics are computed there from all predictions and labels at once",
            f"leave {name.split('=')[0]} out, or evaluate on one process",
        )


def _gather_rows(parts: list[Any], world: World) -> list[np.ndarray]:
    """The batches of all processes: of a round by rank, one round after the other."""
    if not all(isinstance(part, np.ndarray) for part in parts):
        raise SettingError(
            "several arrays from preprocess_logits_for_metrics, on several processes",
            "it returns one array of a batch there",
            "return one array, or evaluate on one process",
        )
    buffer = io.BytesIO()
    np.savez(buffer, *parts)
    gathered = [np.load(io.BytesIO(data)) for data in world.gather_bytes(buffer.getvalue(), "predictions")]
    return [archive[f"arr_{number}"] for number in range(len(parts)) for archive in gathered]


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
