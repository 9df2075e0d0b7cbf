"""MLXSFTTrainer: the HF-shaped front. It reads the HF objects once, wires the stages and owns no numerics."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from .checkpoints.files import check_output_dir, disk_errors
from .checkpoints.folders import rotate
from .checkpoints.inspection import ARGUMENTS, STATE
from .checkpoints.interrupt import Interrupt
from .checkpoints.torch_files import has_torch, pickle_object
from .checkpoints.trainer_state import write_trainer_state
from .data.prepare import prepare_tokenizer
from .errors import DataError, HFMLXError, SettingError
from .loop import Loop
from .session import Data
from .settings.legacy import merge_trainer_keywords
from .surface import reporting
from .surface.accelerator import Accelerator
from .surface.bases import open_base
from .surface.callbacks import make_handler, make_state
from .surface.checkpoints import Checkpoints, no_step
from .surface.estimate import estimate_memory
from .surface.evaluation import Evaluation
from .surface.hooks import check_overrides
from .surface.hub import HubRepo, write_card
from .surface.memory import MemoryMeter
from .surface.model_config import record_settings
from .surface.requests import (
    check_evaluation,
    check_functions,
    check_optimizers,
    default_args,
)
from .surface.startup import StartClock, StartUp
from .training.command_buffers import limit_pending_work, wait_for_memory
from .training.schedule import make_schedule

logger = logging.getLogger(__name__)

_ATTENTION_ONLY = 'LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]), or strict=False'


class MLXSFTTrainer:
    """Supervised fine-tuning on MLX with the interface of ``trl.SFTTrainer``.

    Settings are resolved into a frozen plan before anything is loaded; a setting that cannot be honoured is refused.
    Gradients are clipped as :func:`~hf_mlx.resolve_grad_clip` says; ``TrainingArguments(max_grad_norm=0)`` means off.

    Args:
        model: Hub id or local folder of a causal language model; or a transformers model or PeftModel, which is
            trained as it is and has the trained weights written back into it.
        args: ``TrainingArguments`` or ``SFTConfig``; None is TRL's default configuration.
        data_collator: Called with a list of prepared rows; returns ``input_ids``, ``labels`` and ``attention_mask``
            as numpy arrays or torch tensors.
        train_dataset: ``datasets.Dataset``, ``IterableDataset`` or a list of dicts.
        eval_dataset: Likewise, or a dict of datasets.
        processing_class: Tokenizer; None loads the model's own.
        compute_metrics: Called with a ``transformers.EvalPrediction``.
        callbacks: ``transformers.TrainerCallback`` instances or classes.
        optimizers: Must stay ``(None, None)``: optimizer and schedule are chosen by name in ``args``.
        preprocess_logits_for_metrics: Called with the logits and labels of each evaluation batch.
        peft_config: ``peft.LoraConfig``; None fine-tunes all weights, or the adapter of a PeftModel.
        formatting_func: Row to text.
        quantization_config: ``transformers.BitsAndBytesConfig`` or a dict; MLX affine quantisation takes its place.
        max_grad_value: Elementwise clip; wins over ``args.max_grad_norm``.
        finetune_last_n_layers: Put adapters on the last n blocks only.
        strict: Also refuse settings that are honoured another way with other numbers.
        **keywords: TRL's older constructor keywords (``tokenizer``, ``max_seq_length``, …), deprecated.

    Attributes:
        plan: The frozen :class:`~hf_mlx.settings.plan.TrainPlan`.
        ledger: What each setting does here.
        grad_clip: The clip in force.
        args, state, control, callback_handler: As in ``transformers.Trainer``.
        train_dataset, eval_dataset: The prepared rows.

    Raises:
        HFMLXError: One of its subclasses, before any training.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: Any = None,
        formatting_func: Callable | None = None,
        quantization_config: Any = None,
        *,
        max_grad_value: float | None = None,
        finetune_last_n_layers: int | None = None,
        strict: bool = False,
        **keywords: Any,
    ) -> None:
        self._clock = StartClock()
        check_overrides(type(self), MLXSFTTrainer)
        check_optimizers(optimizers)
        check_functions(keywords)
        self._base = base = open_base(model)
        overrides, tokenizer = merge_trainer_keywords({}, keywords)
        self.args = args if args is not None else default_args(base.name)
        self._memory = MemoryMeter(enabled=not self.args.skip_memory_metrics)
        self._memory.start("init")
        self.plan, self.ledger = base.resolve(
            self.args,
            peft_config,
            max_grad_value=max_grad_value,
            finetune_last_n_layers=finetune_last_n_layers,
            strict=strict,
            quantization_config=quantization_config,
            overrides=overrides,
        )
        reporting.set_log_level(self.args.log_level)
        self.grad_clip = self.plan.clip
        self.compute_metrics = compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        check_evaluation(self.args, eval_dataset)
        check_output_dir(self.args.output_dir)
        if self.plan.use_cpu:
            mx.set_default_device(mx.cpu)
        limit_pending_work(self.plan)
        self._clock.end("settings")
        tokenizer = processing_class or tokenizer
        base.find(tokenizer=tokenizer is None)
        self._clock.end("files")
        with base.reading_ahead():
            if tokenizer is None:
                tokenizer = base.read_tokenizer()
            self.processing_class = prepare_tokenizer(tokenizer, self.plan.data)
            self._clock.end("tokenizer")
            self.data = Data(
                self.plan,
                self.processing_class,
                collator=data_collator,
                formatting_func=formatting_func,
                keep_columns=not self.args.remove_unused_columns,
                tables=base.open(),
            )
            self.train_dataset = self.data.prepare_train(train_dataset)
            self.eval_dataset = self.data.prepare_eval(eval_dataset)
        self.steps = self.data.count_steps(self.train_dataset)
        self._clock.end("data")
        self.session, self._model = base.enter(self.args, peft_config, self.processing_class)
        self._clock.end("model")
        self.data.share_rows = self.session.packs
        self._evaluate_loader = Evaluation(self.session, self.data, before_metrics=base.write_back)
        adapter = self.session.adapter
        notes = adapter.notes if adapter is not None else ()
        if strict and adapter is not None and adapter.deviations:
            raise SettingError(adapter.deviations[0], "with strict=True, what has trl's numbers", _ATTENTION_ONLY)
        for line in (*self.ledger.notices(), *self.session.loaded.notes, *notes):
            logger.warning(line)
        self.callback_handler, self.control = make_handler(
            self.args,
            callbacks,
            model=self.model,
            tokenizer=self.processing_class,
            refresh=base.write_back if base.is_copied else None,
        )
        self.state = make_state(self.callback_handler, self.control)
        self.accelerator = Accelerator(
            mixed_precision="bf16" if self.plan.model.precision.autocast else "no",
            gradient_accumulation_steps=self.plan.batch.gradient_accumulation_steps,
        )
        self.hub = HubRepo(self.args)
        if self.args.push_to_hub:
            self.hub.create()
        self.control = self.callback_handler.on_init_end(self.args, self.state, self.control)
        record_settings(
            self.model.config,
            self.session.loaded,
            use_cache=self.args.use_cache,
            aux_coefficient=self.plan.loss.router_aux_loss_coef,
        )
        self._memory.stop("init")
        self._clock.end("callbacks")

    def train(self, resume_from_checkpoint: str | bool | None = None) -> Any:
        """Train to the end of the plan.

        Args:
            resume_from_checkpoint: A checkpoint folder, written here or by transformers' or trl's trainer, or True
                for the newest complete one in ``output_dir``.

        Returns:
            ``transformers.trainer_utils.TrainOutput`` with global_step, training_loss and metrics.

        Raises:
            CheckpointError: The checkpoint is not complete, or does not fit this run; nothing was changed.
            TrainingError: The loss became NaN or infinite.
            KeyboardInterrupt: After Ctrl-C, once a checkpoint of the last whole step is saved.
        """
        from transformers.trainer_utils import TrainOutput, align_special_tokens, speed_metrics

        self._memory.start("train")
        checkpoints = self._checkpoints = Checkpoints(self)
        folder = checkpoints.store.find(resume_from_checkpoint)
        self._reset_state()
        align_special_tokens(self.model, self.processing_class)
        logger.info(self.grad_clip.describe())
        start = time.time()
        schedule = make_schedule(self.plan.schedule, self.plan.optim, self.steps.total_steps)
        loader = self.data.train_loader(self.train_dataset)
        handler = self.callback_handler
        handler.optimizer, handler.lr_scheduler, handler.train_dataloader = (
            self.session.step.optimizer,
            schedule,
            loader,
        )
        loop = self._loop = self._make_loop(loader, schedule, checkpoints, folder)
        self._tokens_before, self.is_in_train = self.state.num_input_tokens_seen, True
        try:
            with (
                wait_for_memory(self.plan, lambda: estimate_memory(self).total),
                self._clock.first_step(handler),
                loop.interrupt.held_back(),
            ):
                result = loop.run(start)
        except BaseException as error:
            self.is_in_train = False
            self._memory.stop("train", {})
            if isinstance(error, KeyboardInterrupt):
                checkpoints.save_interrupted(loop.boundary)
            # The user's object gets what there is; the reason for stopping is what must be seen.
            with suppress(HFMLXError):
                self._base.write_back()
            raise
        self._base.write_back()
        done = self.state.global_step - loop.first_step
        metrics = speed_metrics("train", start, self._trained_rows(done), done)
        metrics |= {"total_flos": self.state.total_flos, **result}
        self._memory.stop("train", metrics)
        self.log(metrics)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            checkpoints.store.load_best(self.state.best_model_checkpoint)
            self._base.write_back()
        if self.args.save_total_limit == 1 and self.state.best_model_checkpoint is not None:
            # While training the last one is kept beside the best one, to resume from.
            rotate(self.args.output_dir, 1, keep=[self.state.best_model_checkpoint])
        self.control = handler.on_train_end(self.args, self.state, self.control)
        self.hub.finish()
        self.is_in_train = False
        return TrainOutput(self.state.global_step, result["train_loss"], metrics)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and metrics on ``eval_dataset`` (prepared like the training data), or on the trainer's own.

        Args:
            eval_dataset: A dataset, a dict of datasets, or the name of one of the trainer's eval datasets.
            ignore_keys: Of no effect: a model's output here is its logits alone.
            metric_key_prefix: Prefix of every key of the result.

        Returns:
            ``{prefix}_loss`` and the other metrics; also logged.
        """
        from transformers.trainer_utils import speed_metrics

        dataset = self._eval_rows(eval_dataset)
        if isinstance(dataset, dict):
            metrics = {}
            for name in dataset:
                part = name if eval_dataset is None else dataset[name]
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        self._memory.start("eval")
        start = time.time()
        output = self._evaluation(dataset, metric_key_prefix)
        batches = math.ceil(output.num_samples / self.plan.batch.eval_batch_size)
        metrics = output.metrics | speed_metrics(metric_key_prefix, start, output.num_samples, batches)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory.stop("eval", metrics)
        return metrics

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """Logits, labels and metrics on ``test_dataset``.

        Returns:
            ``transformers.trainer_utils.PredictionOutput``; predictions are (rows, length, vocabulary) float32,
            padded with -100.
        """
        from transformers.trainer_utils import PredictionOutput, speed_metrics

        self._memory.start("test")
        start = time.time()
        output = self._evaluation(self.data.prepare_eval(test_dataset), metric_key_prefix, keep_logits=True)
        batches = math.ceil(output.num_samples / self.plan.batch.eval_batch_size)
        metrics = output.metrics | speed_metrics(metric_key_prefix, start, output.num_samples, batches)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        self._memory.stop("test", metrics)
        return PredictionOutput(output.predictions, output.label_ids, metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add TRL's metrics to ``logs``, append the entry to ``state.log_history`` and tell the callbacks."""
        from transformers.trainer_utils import speed_metrics

        logs.update(self._evaluate_loader.running_metrics())
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
            if start_time is not None:
                tokens = self.state.num_input_tokens_seen - self._tokens_before
                logs.update(speed_metrics("train", start_time, num_tokens=tokens))
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter (or, fully fine-tuned, the model) and the tokenizer to ``output_dir``."""
        folder = check_output_dir(output_dir or self.args.output_dir)
        with disk_errors(folder):
            self._base.write_back()
            self._model.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)
            if has_torch():
                pickle_object(self.args, folder / ARGUMENTS)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the run's repository on the hub, unless it exists."""
        self.hub.create(token, private)

    @property
    def adapter(self) -> Any:
        """The attached :class:`~hf_mlx.adapters.adapter.Adapter`, or None when all weights are trained."""
        return self.session.adapter

    @property
    def startup(self) -> StartUp:
        """Seconds from launch to the first step, stage by stage; also said once in the log, at INFO."""
        return self._clock.read()

    @property
    def hub_model_id(self) -> str | None:
        """``owner/name`` on the hub, once the repository exists."""
        return self.hub.model_id

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **front_matter: Any,
    ) -> None:
        """Write README.md into ``output_dir``.

        Args:
            model_name: Heading; None is the name of the repository or folder.
            dataset_name: Id of the training data.
            tags: Further tags.
            **front_matter: Further metadata, such as ``language`` or ``license``.
        """
        base = getattr(self.model.config, "_name_or_path", None)
        write_card(
            self.args.output_dir,
            model_name=model_name or (self.hub_model_id or Path(self.args.output_dir).name).split("/")[-1],
            base_model=base if base and not Path(base).is_dir() else None,
            hub_model_id=self.hub_model_id,
            dataset_name=dataset_name,
            tags=tags,
            adapter=self.session.adapter is not None,
            settings=reporting.describe_plan(self.plan),
            extra=front_matter,
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Save into ``output_dir`` with a model card, and upload the folder without its checkpoints.

        Args:
            commit_message: Of the commit.
            blocking: False returns a Future.
            token, revision: In place of ``args.hub_token`` and ``args.hub_revision``.
            private: For a repository that is created now.
            **card: Keywords of :meth:`create_model_card`.

        Returns:
            ``huggingface_hub.CommitInfo``.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        self.create_model_card(**card)
        return self.hub.push(message=commit_message, blocking=blocking, token=token, revision=revision)

    def end(self) -> None:
        """Finish what runs beside training: uploads still in progress."""
        self.hub.finish()

    def num_examples(self, dataloader: Any) -> int:
        """Rows behind a loader or in a dataset."""
        return len(getattr(dataloader, "dataset", dataloader))

    def save_checkpoint(self) -> None:
        """Write ``checkpoint-{global_step}`` into ``output_dir``, in transformers' layout.

        Raises:
            CheckpointError: It cannot be written, or no step was made yet. Earlier checkpoints are as they were.
        """
        if self._loop is None or self._checkpoints is None:
            raise no_step()
        folder = self._checkpoints.save(self._loop.boundary, self._loop.schedule)
        if self.args.push_to_hub:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self.hub.push_checkpoint(folder, self.state.global_step, self.state.epoch)

    def adopt_additions(self) -> None:
        """Take what callbacks put into the checkpoint just written for a part of it."""
        if self._checkpoints is not None:
            self._checkpoints.store.adopt_additions(self.state.global_step)

    def save_state(self) -> None:
        """Write ``trainer_state.json`` into ``output_dir``."""
        folder = check_output_dir(self.args.output_dir)
        with disk_errors(folder):
            write_trainer_state(self.state, folder / STATE)

    def log_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        """Print ``metrics`` as a table."""
        reporting.print_metrics(split, metrics)

    def save_metrics(self, split: str, metrics: dict[str, Any], combined: bool = True) -> None:
        """Write ``{split}_results.json`` and, when ``combined``, ``all_results.json``."""
        reporting.write_metrics(self.args.output_dir, split, metrics, combined=combined)

    def add_callback(self, callback: Any) -> None:
        """Add a callback class or instance."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback and return it."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback."""
        self.callback_handler.remove_callback(callback)

    def is_world_process_zero(self) -> bool:
        """True: there is one process."""
        return True

    def is_local_process_zero(self) -> bool:
        """True: there is one process."""
        return True

    @property
    def model(self) -> Any:
        """The user's own object, with the weights trained so far; for a name, an :class:`MLXCausalLM`."""
        return self._model

    is_in_train: bool = False
    _tokens_before = 0
    _interrupt: Interrupt | None = None
    _loop: Loop | None = None
    _checkpoints: Checkpoints | None = None

    def _make_loop(self, loader: Any, schedule: Any, checkpoints: Checkpoints, folder: Path | None) -> Loop:
        """The loop of this call; from ``folder`` on, once everything in it is known to fit."""
        boundary = checkpoints.restore(folder, schedule) if folder is not None else None
        self._interrupt = Interrupt()
        loop = Loop(self, self.session, self.data, loader, self.steps, schedule, self._interrupt)
        if boundary is not None:
            loop.resume(boundary)
        return loop

    def _evaluation(self, dataset: Any, prefix: str, *, keep_logits: bool = False) -> Any:
        self.callback_handler.eval_dataloader = loader = self.data.eval_loader(dataset)
        return self._evaluate_loader(
            loader,
            prefix,
            compute_metrics=None if self.args.prediction_loss_only else self.compute_metrics,
            preprocess_logits=self.preprocess_logits_for_metrics,
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
                "trainer.evaluate(my_dataset), or MLXSFTTrainer(..., eval_dataset=my_dataset)",
            )
        return self.eval_dataset

    def _reset_state(self) -> None:
        self.state = make_state(self.callback_handler, self.control)
        self.state.train_batch_size = self.plan.batch.train_batch_size
        self.state.compute_steps(self.args, self.steps.total_steps)
        self.state.max_steps, self.state.num_train_epochs = self.steps.total_steps, self.steps.epochs

    def _trained_rows(self, done: int) -> float:
        plan, steps = self.plan.batch, self.steps
        if plan.max_steps > 0:
            rows = steps.total_steps * plan.train_batch_size * plan.gradient_accumulation_steps
        else:
            rows = len(self.train_dataset) * plan.num_train_epochs
        return rows * done / max(steps.total_steps, 1)
