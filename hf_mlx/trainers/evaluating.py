"""Evaluation and prediction, in transformers' order of events."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

from ..data.own_loader import OwnLoader
from ..errors import DataError
from ..surface.requests import check_ignored
from ..surface.wording import in_its_words
from .loaders import LaterLoader
from .publishing import Publishing


class Evaluating(Publishing):
    """``evaluate`` and ``predict``."""

    @in_its_words
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and metrics on ``eval_dataset`` (prepared like the training data), or on the trainer's own.

        Args:
            eval_dataset: A dataset, a dict of datasets, or the name of one of the trainer's eval datasets.
            ignore_keys: Of the model's outputs, which here are its logits alone.
            metric_key_prefix: Prefix of every key of the result.

        Returns:
            ``{prefix}_loss`` and the other metrics; also logged.
        """
        from transformers.trainer_utils import speed_metrics

        self._settle(training=False)
        dataset = self._eval_rows(eval_dataset)
        if isinstance(dataset, dict):
            metrics = {}
            for name in dataset:
                part = name if eval_dataset is None else dataset[name]
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        self._memory.start("eval")
        start = time.time()
        named = eval_dataset is None or isinstance(eval_dataset, str)
        own_loader = self._own_eval_loader(eval_dataset if named else dataset)
        output = self._evaluation(dataset, metric_key_prefix, own_loader, ignore_keys)
        batches = math.ceil(output.num_samples / (self.plan.batch.eval_batch_size * self.world.sharing.size))
        metrics = output.metrics | speed_metrics(metric_key_prefix, start, output.num_samples, batches)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory.stop("eval", metrics)
        return metrics

    @in_its_words
    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """Logits, labels and metrics on ``test_dataset``.

        Returns:
            ``transformers.trainer_utils.PredictionOutput``; predictions are (rows, length, vocabulary) float32,
            padded with -100. Rows without labels are predicted, with no loss.
        """
        from transformers.trainer_utils import PredictionOutput, speed_metrics

        self._settle(training=False)
        self._memory.start("test")
        start = time.time()
        dataset = self.data.prepare_eval(test_dataset)
        loader = self._own_test_loader(dataset)
        output = self._evaluation(dataset, metric_key_prefix, loader, ignore_keys, keep_logits=True)
        batches = math.ceil(output.num_samples / (self.plan.batch.eval_batch_size * self.world.sharing.size))
        metrics = output.metrics | speed_metrics(metric_key_prefix, start, output.num_samples, batches)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        self._memory.stop("test", metrics)
        return PredictionOutput(output.predictions, output.label_ids, metrics)

    def _evaluation(
        self,
        dataset: Any,
        prefix: str,
        own_loader: OwnLoader | None,
        ignore_keys: list[str] | None,
        *,
        keep_logits: bool = False,
    ) -> Any:
        self._base.take_over("")
        compute = None if self.args.prediction_loss_only else self.compute_metrics
        keep_logits = keep_logits and not self.args.prediction_loss_only
        if keep_logits or compute is not None:
            check_ignored(ignore_keys, getattr(self.session.step.objective, "unseen", ()))
        if own_loader is None:
            self.callback_handler.eval_dataloader = LaterLoader(partial(self.get_eval_dataloader, dataset))
            loader = self.data.eval_loader(dataset)
        else:
            self.callback_handler.eval_dataloader, loader = own_loader.loader, own_loader
        return self._evaluate_loader(
            loader,
            prefix,
            compute_metrics=compute,
            preprocess_logits=self.preprocess_logits_for_metrics,
            args=self.args,
            keep_logits=keep_logits,
            in_train=self.is_in_train,
            on_batch=self._on_prediction_step,
        )

    def _on_prediction_step(self) -> None:
        if self._interrupt is not None:
            self._interrupt.check()
        self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def _eval_rows(self, dataset: Any) -> Any:
        if isinstance(dataset, str):
            return self.eval_dataset[dataset]
        if dataset is not None:
            return self.data.prepare_eval(dataset)
        if self.eval_dataset is None:
            raise DataError(
                "evaluate() without a dataset, on a trainer without eval_dataset",
                "a dataset to evaluate on",
                f"trainer.evaluate(my_dataset), or {self.recipe.name}(..., eval_dataset=my_dataset)",
            )
        return self.eval_dataset
