"""One pass over an evaluation set, reported as transformers and TRL report it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from ..data.loader import RowLoader
from ..data.own_loader import OwnLoader
from ..errors import DataError
from ..feed import Feed, Loader
from ..session import Session
from ..training.evaluation import EvalSums
from . import reporting

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
            keep_logits: Return predictions and labels even without ``compute_metrics``.
            in_train: Whether ``train()`` is running (``bf16_full_eval`` then has no effect, as upstream).
            on_batch: Called after each batch.

        Returns:
            ``transformers.trainer_utils.EvalLoopOutput``.
        """
        from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, denumpify_detensorize

        plan, session = self._session.plan, self._session
        wanted = keep_logits or compute_metrics is not None
        world = session.world
        sink = reporting.PredictionSink(preprocess_logits, world) if wanted else None
        make_inputs = partial(self._data.inputs, keep_rows=sink is not None)
        with session.evaluation(in_train=in_train) as (evaluator, params):
            sums = evaluator.run(params, loader, make_inputs, on_batch=on_batch, logits_to=sink)
        size, dataset = plan.batch.eval_batch_size, loader.dataset
        rows = len(dataset) if hasattr(dataset, "__len__") else None
        kept = None
        if not world.is_alone:
            sums = self._gather(sums, loader)
            if rows is not None and not plan.batch.drop_last:
                kept = rows
        session.progress.mode, self._sums = "eval", sums
        predictions, labels = (None, None) if sink is None else sink.arrays(kept)
        metrics: dict[str, Any] = {}
        if compute_metrics is not None and predictions is not None:
            self._before_metrics()
            computed: Any = compute_metrics(EvalPrediction(predictions=predictions, label_ids=cast(Any, labels)))
            metrics.update(cast(Any, denumpify_detensorize(computed)))
        is_cut = not plan.batch.drop_last
        if isinstance(loader, OwnLoader):
            size, is_cut = loader.batch_size, loader.is_prepared
        if sums.losses:
            counted = rows if is_cut else None
            if not world.is_alone and counted is not None:
                counted = _repeated_rows(counted, loader, len(sums.losses), size)
            metrics[f"{prefix}_loss"] = sums.loss(finite_only=plan.nan_inf_filter, batch_size=size, rows=counted)
        else:
            logger.warning(
                f"{prefix}: no batch of per_device_eval_batch_size={size} rows in {rows} rows with "
                f"dataloader_drop_last=True, so nothing was measured and there is no {prefix}_loss (as under TRL)"
            )
        # In upstream's order: what has the prefix already comes first.
        bare = [key for key in metrics if not key.startswith(f"{prefix}_")]
        metrics |= {f"{prefix}_{key}": metrics.pop(key) for key in bare}
        count = rows if rows is not None else len(sums.losses) * size
        return EvalLoopOutput(cast(Any, predictions), labels, metrics, count)

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
