"""One pass over an evaluation set, reported as transformers and TRL report it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from ..data.own_loader import OwnLoader
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
    """

    def __init__(self, session: Session, data: Feed, *, before_metrics: Callable[[], None]) -> None:
        self._session = session
        self._data = data
        self._before_metrics = before_metrics
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
        sink = reporting.PredictionSink(preprocess_logits) if wanted else None
        make_inputs = partial(self._data.inputs, keep_rows=sink is not None)
        with session.evaluation(in_train=in_train) as (evaluator, params):
            sums = evaluator.run(params, loader, make_inputs, on_batch=on_batch, logits_to=sink)
        session.progress.mode, self._sums = "eval", sums
        size, dataset = plan.batch.eval_batch_size, loader.dataset
        rows = len(dataset) if hasattr(dataset, "__len__") else None
        is_cut = not plan.batch.drop_last
        if isinstance(loader, OwnLoader):
            size, is_cut = loader.batch_size, loader.is_prepared
        kept = rows if is_cut else None
        predictions, labels = (None, None) if sink is None else sink.arrays(kept % size if kept and size else 0)
        metrics: dict[str, Any] = {}
        if compute_metrics is not None and predictions is not None:
            self._before_metrics()
            computed: Any = compute_metrics(EvalPrediction(predictions=predictions, label_ids=cast(Any, labels)))
            metrics.update(cast(Any, denumpify_detensorize(computed)))
        if sums.losses:
            metrics[f"{prefix}_loss"] = sums.loss(finite_only=plan.nan_inf_filter, batch_size=size, rows=kept)
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
