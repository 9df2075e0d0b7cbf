"""One pass over an evaluation set, reported as transformers and TRL report it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

from ..data.loader import RowLoader
from ..data.own_loader import OwnLoader
from ..errors import DataError
from ..feed import Feed, Loader
from ..session import Session
from ..training.evaluation import EvalSums
from .predictions import Predictions

logger = logging.getLogger(__name__)


class Evaluation:
    """Runs evaluation sets and remembers the metrics for the next log.

    Args:
        session: Model, parameters and counters.
        data: Turns batches into device arrays.
        before_metrics: Called before ``compute_metrics``, which may look at the user's model.
        counts_items: The upstream trainer divides a batch by the tokens that all processes evaluate at the same time.
    """

    def __init__(
        self, session: Session, data: Feed, *, before_metrics: Callable[[], None], counts_items: bool = False
    ) -> None:
        self._session = session
        self._data = data
        self._before_metrics = before_metrics
        self._counts_items = counts_items
        self._sums: EvalSums | None = None

    def __call__(
        self,
        loader: Loader,
        prefix: str,
        *,
        compute_metrics: Callable | None,
        preprocess_logits: Callable | None,
        args: Any,
        keep_logits: bool,
        in_train: bool,
        on_batch: Callable[[], None],
    ) -> Any:
        """Evaluate every batch of ``loader``.

        Args:
            loader: Batches of a prepared set.
            prefix: Of every metric's name.
            compute_metrics: Called with a ``transformers.EvalPrediction``; None reports the loss alone.
            preprocess_logits: Called with the logits and labels of each batch.
            args: Read for what ``compute_metrics`` is called with.
            keep_logits: Return predictions and labels even without ``compute_metrics``.
            in_train: Whether ``train()`` is running (``bf16_full_eval`` then has no effect, as upstream).
            on_batch: Called after each batch.

        Returns:
            ``transformers.trainer_utils.EvalLoopOutput``.
        """
        from transformers.trainer_utils import EvalLoopOutput

        plan, session = self._session.plan, self._session
        world = session.world.sharing
        size, dataset = plan.batch.eval_batch_size, loader.dataset
        rows = len(dataset) if hasattr(dataset, "__len__") else None
        own = loader if isinstance(loader, OwnLoader) else None
        is_prepared = own is None or own.is_prepared
        drops = plan.batch.drop_last if own is None else own.drops_last
        # What accelerate's gather_for_metrics leaves of a last batch that is not full.
        is_cut = rows is not None and is_prepared and not drops
        remainder = rows % (size if own is None else own.batch_size) if rows is not None and is_cut else 0
        sink = None
        if keep_logits or compute_metrics is not None:
            options: dict[str, Any] = {"size": size, "remainder": remainder, "ends": is_prepared, "keeps": keep_logits}
            if not world.is_alone:
                options |= {"world": world, "rows": rows if is_cut else None}
            sink = Predictions(args, compute=compute_metrics, preprocess=preprocess_logits, **options)
            if compute_metrics is not None:
                self._before_metrics()
        make_inputs = partial(self._data.inputs, keep_rows=sink is not None)

        def end_batch() -> None:
            on_batch()
            if sink is not None:
                sink.end_batch()

        with session.evaluation(in_train=in_train) as (evaluator, params):
            batches = loader if sink is None else sink.watch(loader)
            # Processes that hold one model together wait for each other in every layer.
            with session.world.waiting("an evaluation", computes=True) if session.split else nullcontext():
                sums = evaluator.run(params, batches, make_inputs, on_batch=end_batch, logits_to=sink)
        if not world.is_alone:
            sums = self._gather(sums, loader)
        session.progress.mode, self._sums = "eval", sums
        predictions, labels, metrics = (None, None, {}) if sink is None else sink.finish()
        if sums.losses:
            counted = None
            if not world.is_alone and rows is not None and is_cut:
                counted = _repeated_rows(rows, loader, len(sums.losses), size)
            elif remainder:
                counted = (len(sums.losses) - 1) * size + min(remainder, size)
            measured = sums.loss(finite_only=plan.nan_inf_filter, batch_size=size, counted=counted)
            metrics[f"{prefix}_loss"] = measured
        elif not sums.batches:
            logger.warning(
                f"{prefix}: no batch of per_device_eval_batch_size={size} rows in {rows} rows with "
                f"dataloader_drop_last=True, so nothing was measured and there is no {prefix}_loss (as under TRL)"
            )
        # In upstream's order: what has the prefix already comes first.
        bare = [key for key in metrics if not key.startswith(f"{prefix}_")]
        metrics |= {f"{prefix}_{key}": metrics.pop(key) for key in bare}
        return EvalLoopOutput(cast(Any, predictions), labels, metrics, rows if rows is not None else sums.rows)

    def _gather(self, sums: EvalSums, loader: Loader) -> EvalSums:
        session, world = self._session, self._session.world
        parts = [EvalSums(**part) for part in world.gather_object(vars(sums), "the end of an evaluation")]
        counts = [len(part.losses) for part in parts]
        if len(set(counts)) > 1:
            raise DataError(
                f"an evaluation stream of {counts} batches on ranks 0 to {world.size - 1}, whose shards are unlike",
                "the same number on all processes (upstream waits for ever)",
                "rows.to_iterable_dataset(num_shards=1), which is dealt in rounds, or a Dataset",
            )
        kept = world.size
        if isinstance(loader, RowLoader) and sums.losses:
            kept = loader.kept(len(loader) - 1)
        by_all = self._counts_items and session.loaded.accepts_loss_kwargs and session.plan.batch.average_tokens
        coefficient = session.step.objective.aux_coefficient
        return EvalSums.gathered(parts, kept, by_all=by_all, aux_coefficient=coefficient)

    def running_metrics(self) -> dict[str, float]:
        """What the upstream trainer adds to an entry: the running means of the mode the model is in."""
        progress, arrange = self._session.progress, self._session.recipe.log_metrics
        tokens = float(progress.num_tokens)
        if progress.mode == "train":
            means = progress.means.take()
            return arrange(means, tokens) if means else {}
        sums, self._sums = self._sums, None
        if sums is None or not sums.metrics:
            return {}
        means = {name: sum(values) / len(values) for name, values in sums.metrics.items()}
        return {f"eval_{name}": value for name, value in arrange(means, tokens).items()}


def _repeated_rows(rows: int, loader: Loader, batches: int, batch_size: int) -> int:
    """How many of the repeated losses upstream keeps: of the last round as many as it has rows of its own."""
    if not isinstance(loader, RowLoader) or loader.share is None:
        return rows
    rest = rows % loader.share.round_rows(loader.batch_size)
    repeated = batches * batch_size
    return repeated - loader.share.processes * batch_size + rest if rest else repeated
