"""One pass over an evaluation set, reported as transformers and TRL report it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

from ..data.batch import Batch
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

    Attributes:
        remainder: Rows that are no repetition of a last round that is at hand and not full; else 0.
    """

    def __init__(
        self, session: Session, data: Feed, *, before_metrics: Callable[[], None], counts_items: bool = False
    ) -> None:
        self._session = session
        self._data = data
        self._before_metrics = before_metrics
        self._counts_items = counts_items
        self._sums: EvalSums | None = None
        self._is_last, self.remainder = False, 0

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
        cut = _cut_of(loader, rows, size, drop_last=plan.batch.drop_last)
        sink = None
        if keep_logits or compute_metrics is not None:
            options: dict[str, Any] = {"size": size, "remainder": cut.remainder, "keeps": keep_logits}
            options["is_last"] = lambda: self._is_last
            if not world.is_alone:
                options |= {"world": world}
            sink = Predictions(args, compute=compute_metrics, preprocess=preprocess_logits, **options)
            if compute_metrics is not None:
                self._before_metrics()
        make_inputs = partial(self._data.inputs, keep_rows=sink is not None)

        def end_batch() -> None:
            session.world.check("an evaluation")
            on_batch()
            if sink is not None:
                sink.end_batch()

        with session.evaluation(in_train=in_train) as (evaluator, params):
            looks = sink is not None or (session.host_loss is not None and not world.is_alone)
            batches = self._watch(loader, cut.is_prepared, cut.remainder) if looks else loader
            # Processes that hold one model together wait for each other in every layer.
            with session.world.waiting("an evaluation", computes=True) if session.split else nullcontext():
                sums = evaluator.run(params, batches, make_inputs, on_batch=end_batch, logits_to=sink)
            self.remainder, self._is_last = 0, False
        if not world.is_alone:
            sums = self._gather(sums, loader)
        session.progress.mode, self._sums = "eval", sums
        predictions, labels, metrics = (None, None, {}) if sink is None else sink.finish()
        if sums.losses:
            counted = None
            if not world.is_alone and rows is not None and cut.is_cut:
                counted = _repeated_rows(rows, loader, len(sums.losses), size, world.size)
            elif cut.remainder:
                counted = (len(sums.losses) - 1) * size + min(cut.remainder, size)
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

    def _watch(self, loader: Loader, ends: bool, remainder: int) -> Iterator[Batch]:
        """The batches, each once it is known whether another follows, as accelerate's loaders give them."""
        rest = iter(loader)
        following = next(rest, None)
        while following is not None:
            batch, following = following, next(rest, None)
            self._is_last = ends and following is None
            self.remainder = remainder if self._is_last else 0
            yield batch

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
        elif isinstance(loader, OwnLoader):
            kept = loader.kept(kept)
        # A loss of the script's own has been divided already.
        by_all = (
            self._counts_items
            and session.host_loss is None
            and session.loaded.accepts_loss_kwargs
            and session.plan.batch.average_tokens
        )
        coefficient = session.step.objective.aux_coefficient
        weigh = session.step.weigh
        return EvalSums.gathered(parts, kept, weigh=weigh, by_all=by_all, aux_coefficient=coefficient)

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


class _Cut(NamedTuple):
    """What accelerate's gather_for_metrics leaves of a last batch that is not full.

    Attributes:
        is_prepared: Whether the loader went through accelerate.
        is_cut: Whether anything is left out.
        remainder: Rows of the last batch; 0 where it is full, or nothing is left out.
    """

    is_prepared: bool
    is_cut: bool
    remainder: int


def _cut_of(loader: Loader, rows: int | None, batch_size: int, *, drop_last: bool) -> _Cut:
    own = loader if isinstance(loader, OwnLoader) else None
    is_prepared = own is None or own.is_prepared
    drops = drop_last if own is None else own.drops_last
    if rows is None or not is_prepared or drops:
        return _Cut(is_prepared, False, 0)
    return _Cut(True, True, rows % _round_rows(loader, batch_size))


def _round_rows(loader: Loader, batch_size: int) -> int:
    """Rows that all processes evaluate at the same time."""
    if isinstance(loader, OwnLoader):
        return loader.batch_size
    share = loader.share if isinstance(loader, RowLoader) else None
    return batch_size if share is None else share.round_rows(loader.batch_size)


def _repeated_rows(rows: int, loader: Loader, batches: int, batch_size: int, processes: int) -> int:
    """How many of the repeated losses upstream keeps: of the last round as many as it has rows of its own."""
    rest = rows % _round_rows(loader, batch_size)
    repeated = batches * batch_size
    return repeated - processes * batch_size + rest if rest else repeated
