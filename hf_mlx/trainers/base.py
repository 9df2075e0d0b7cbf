"""What every trainer is: the HF-shaped front. It reads the HF objects once, wires the stages and owns no numerics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from ..checkpoints.files import check_output_dir
from ..data.process_generator import seed_process
from ..feed import Feed
from ..processes.world import the_world
from ..reports.recorder import Recorder
from ..settings.changes import Asked
from ..settings.trainer_keywords import merge_trainer_keywords
from ..surface import reporting
from ..surface.accelerator import Accelerator
from ..surface.assignments import check_presets
from ..surface.bases import open_base
from ..surface.callbacks import make_handler, make_state
from ..surface.evaluation import Evaluation
from ..surface.hooks import check_overrides
from ..surface.hub import HubRepo
from ..surface.memory import MemoryMeter
from ..surface.model_config import record_settings
from ..surface.requests import check_evaluation, check_functions
from ..surface.startup import StartClock, StartUp
from ..surface.together import check_recipe, check_split, tell_accelerate
from ..surface.wording import in_its_words
from ..training.command_buffers import limit_pending_work
from ..training.kernel_header import compiling_header
from ..version import warn_untested
from .running import Running

logger = logging.getLogger(__name__)


def handed_over(arguments: Mapping[str, Any], *left_out: str) -> dict[str, Any]:
    """What a trainer's constructor gives to :class:`TrainerBase`'s: its own arguments, by name.

    Args:
        arguments: Its ``locals()``, ``**keywords`` among them.
        left_out: Names that it deals with itself.
    """
    own = {"self", "__class__", "keywords", *left_out}
    return {name: value for name, value in arguments.items() if name not in own} | arguments["keywords"]


class TrainerBase(Running):
    """One trainer: settings resolved into a plan, data prepared, model opened, in this order.

    The arguments are those of :class:`~hf_mlx.trainers.sft.MLXSFTTrainer`. Each trainer is a class with a ``recipe``.
    """

    @in_its_words
    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        *,
        peft_config: Any = None,
        formatting_func: Callable | None = None,
        quantization_config: Any = None,
        max_grad_value: float | None = None,
        finetune_last_n_layers: int | None = None,
        strict: bool = False,
        **keywords: Any,
    ) -> None:
        self._clock = StartClock()
        warn_untested()
        # What derives from the class that names the recipe is a user's.
        house = next(cls for cls in type(self).__mro__ if "recipe" in vars(cls))
        check_overrides(type(self), house, self.recipe.never_called)
        check_presets(self)
        check_functions(keywords)
        self._start_own(optimizers, keywords)
        self._base = base = open_base(model)
        overrides, tokenizer = merge_trainer_keywords({}, keywords, self.recipe.name.removeprefix("MLX"))
        self.args = args if args is not None else self.recipe.make_args(base.name)
        self.world = the_world()
        self._memory = MemoryMeter(enabled=not self.args.skip_memory_metrics)
        self._memory.start("init")
        self._recorder = Recorder()
        with self.world.meeting():
            self.plan, self.ledger = base.resolve(
                self.args,
                peft_config,
                max_grad_value=max_grad_value,
                finetune_last_n_layers=finetune_last_n_layers,
                strict=strict,
                quantization_config=quantization_config,
                overrides=overrides,
                table=self.recipe.config,
                processes=self.world.size,
                tensor_parallel=self.world.tensor_parallel,
            )
            check_recipe(self.recipe, self.world)
            check_split(self.plan, self._base, self.recipe)
            if self.plan.use_cpu:
                mx.set_default_device(mx.cpu)
            limit_pending_work(self.plan)
        tell_accelerate(self.args, self.world)
        self._asked = Asked(
            self.args,
            self.ledger,
            max_grad_value=max_grad_value,
            strict=strict,
            overrides=dict(overrides),
            table=self.recipe.config,
            processes=self.world.size,
            tensor_parallel=self.world.tensor_parallel,
        )
        reporting.set_log_level(self.args, self.world)
        self.grad_clip = self.plan.clip
        self.compute_metrics = compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        check_evaluation(self.args, eval_dataset, self.recipe.name)
        if self.world.is_main:
            check_output_dir(self.args.output_dir)
        self._clock.end("settings")
        with compiling_header():
            self._read(train_dataset, eval_dataset, processing_class or tokenizer, data_collator, formatting_func)
            self._enter(peft_config)
        self._clock.end("model")
        self._begin(callbacks)
        self._memory.stop("init")
        self._clock.end("callbacks")
        self._build_done()

    def _read(
        self,
        train_dataset: Any,
        eval_dataset: Any,
        tokenizer: Any,
        data_collator: Callable | None,
        formatting_func: Callable | None,
    ) -> None:
        """The tokenizer and the rows, while the weights are read from disk."""
        base = self._base
        rows = self.recipe.rows
        reads = tokenizer is None and rows.reads_tokenizer
        base.find(tokenizer=reads)
        self._clock.end("files")
        with base.reading_ahead():
            if reads:
                tokenizer = base.read_tokenizer()
            self.processing_class = rows.prepare_tokenizer(tokenizer, self.plan.data)
            self._clock.end("tokenizer")
            tables = base.open()
            self.data = Feed(
                self.plan,
                self.processing_class,
                self.recipe,
                collator=data_collator,
                formatting_func=formatting_func,
                keep_columns=not self.args.remove_unused_columns,
                signature_columns=() if rows.signature_columns is not None else base.columns(),
                tables=tables,
            )
            self.train_dataset = self.data.prepare_train(train_dataset)
            self.eval_dataset = self.data.prepare_eval(eval_dataset)
        if train_dataset is not None:
            self.steps = self.data.count_steps(self.train_dataset)
        self._clock.end("data")

    def _enter(self, peft_config: Any) -> None:
        """The model with its adapter, the step and the evaluator; says what is done another way."""
        base = self._base
        self.session, self._model = base.enter(self.args, peft_config, self.processing_class, self.recipe)
        self.data.share_rows = self.session.packs
        self._settle_loss()
        self._evaluate_loader = Evaluation(
            self.session, self.data, before_metrics=base.write_back, counts_items=self.counts_in_evaluation
        )
        adapter = self.session.adapter
        notes = adapter.notes if adapter is not None else ()
        for line in (*self.ledger.notices(), *self.session.loaded.notes, *notes):
            # Once for all processes.
            logger.log(logging.WARNING if self.world.is_main else logging.DEBUG, line)

    def _begin(self, callbacks: list | None) -> None:
        """HF's objects around the run: callbacks, state, accelerator, hub."""
        base = self._base
        self.callback_handler, self.control = make_handler(
            self.args,
            callbacks,
            model=self.model,
            tokenizer=self.processing_class,
            before=lambda event: base.write_back(),
            after=base.take_over,
        )
        self.state = make_state(self.callback_handler, self.control, self.world)
        self.accelerator = Accelerator(
            self.world,
            mixed_precision="bf16" if self.plan.model.precision.autocast else "no",
            gradient_accumulation_steps=self.plan.batch.gradient_accumulation_steps,
            seedable_sampler=self.plan.batch.seedable_sampler,
            split_batches=self.plan.batch.split_batches,
            data_seed=self.plan.batch.data_seed,
        )
        self.hub = HubRepo(self.args)
        if self.args.push_to_hub and self.world.is_main:
            self.hub.create()
        seed_process(self.plan.batch.seed, self.data.rng)
        self.control = self.callback_handler.on_init_end(self.args, self.state, self.control)
        record_settings(
            self.model.config,
            self.session.loaded,
            use_cache=self.args.use_cache,
            aux_coefficient=self.plan.loss.router_aux_loss_coef,
            routers=self.recipe.writes_router_settings,
        )

    @property
    def adapter(self) -> Any:
        """The attached :class:`~hf_mlx.adapters.adapter.Adapter`, or None when all weights are trained."""
        return self.session.adapter

    @property
    def startup(self) -> StartUp:
        """Seconds from launch to the first step, stage by stage; also said once in the log, at INFO."""
        return self._clock.read()
