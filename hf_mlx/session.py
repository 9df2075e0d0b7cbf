"""The stages of a run, wired: data, model, adapter, step and evaluator, built from a frozen plan."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .adapters.adapter import Adapter
from .adapters.attach import attach
from .adapters.layers import LoRALinear
from .adapters.origin import resolve_origin
from .data.collate import Batch, collate, convert_batch
from .data.fitting import SAMPLE, fit_shapes
from .data.generator import TorchGenerator
from .data.guard import Guard
from .data.loader import RowLoader, StreamLoader, make_loader, read_ahead
from .data.order import Steps, count_steps, count_tokens, epoch_order, group_by_length
from .data.prepare import Prepared, prepare, prepare_eval
from .data.shapes import Shapes
from .data.tables import Tables
from .errors import ModelError
from .models.architectures import can_pack, check_packs
from .models.heads import layers
from .models.load import LoadedModel
from .models.precision import apply_autocast, store_frozen_weights
from .settings.plan import DataPlan, PrecisionPlan, TrainPlan
from .training.backward_order import order_backward
from .training.cast_weights import cast_weights
from .training.checkpointing import checkpoint_layers
from .training.evaluation import Evaluator
from .training.feed_forward import recompute_activations
from .training.inputs import HostInputs, Inputs, make_host_inputs, make_inputs
from .training.lanes import make_step
from .training.objective import Objective
from .training.optim import decay_names, make_optimizer
from .training.router import Routers
from .training.step import trainable_arrays

logger = logging.getLogger(__name__)

# Columns that trl 1.16 keeps of a prepared row when remove_unused_columns is on.
SIGNATURE_COLUMNS = ("input_ids", "labels", "seq_lengths")


@dataclass
class Means:
    """Running metrics of training, averaged and cleared at each log (trl 1.16 ``SFTTrainer._metrics``)."""

    entropy: float = 0.0
    accuracy: float = 0.0
    micro_batches: int = 0
    aux_loss: float | None = None

    def take(self) -> dict[str, float]:
        """The means since the last call; empty when nothing ran."""
        if not self.micro_batches:
            return {}
        means = {
            "entropy": self.entropy / self.micro_batches,
            "mean_token_accuracy": self.accuracy / self.micro_batches,
        }
        if self.aux_loss is not None:
            means["aux_loss"] = self.aux_loss / self.micro_batches
        self.entropy = self.accuracy = 0.0
        self.micro_batches, self.aux_loss = 0, None
        return means


@dataclass
class Progress:
    """Counters of a run that HF's TrainerState has no place for.

    Attributes:
        mode: ``"train"`` or ``"eval"``: whose metrics the next log entry carries (TRL reads ``model.training``).
        num_tokens: Tokens trained on so far, resumed runs included.
        padding, positions: Padded and all positions that were computed.
        means: Running metrics of training.
    """

    mode: str = "train"
    num_tokens: int = 0
    padding: int = 0
    positions: int = 0
    means: Means = field(default_factory=Means)

    def to_dict(self) -> dict[str, Any]:
        """A copy as plain values."""
        return vars(self) | {"means": dict(vars(self.means))}


class Data:
    """Prepared datasets and the loaders over them.

    Args:
        plan: The whole plan.
        tokenizer: Already prepared (eos, pad and chat template resolved).
        collator: The user's ``data_collator``, or None.
        formatting_func: Row to text, or None.
        keep_columns: Hand every column to the user's collator (``remove_unused_columns=False``).
        tables: Ids and positions that the model can embed; ids may be more than the tokenizer knows.

    Attributes:
        share_rows: Documents may share a row of the computation; True once the model is known to keep them apart.
    """

    def __init__(
        self,
        plan: TrainPlan,
        tokenizer: Any,
        *,
        collator: Callable | None = None,
        formatting_func: Callable | None = None,
        keep_columns: bool = False,
        tables: Tables | None = None,
    ) -> None:
        self.plan = plan
        self.tokenizer = tokenizer
        self._collator = collator
        self._guard = Guard(tables, tokenizer, plan.data, collated=collator is not None)
        self._limit = tables.positions if tables is not None else None
        self._options: dict[str, Any] = {"formatting_func": formatting_func, "tables": self._guard.rows}
        self._options["keep_columns"] = keep_columns and collator is not None
        self._keep_columns = keep_columns
        # Where the order depends on torch's global generator, this is that generator.
        self.rng = TorchGenerator(plan.batch.seed)
        self.share_rows = False

    def prepare_train(self, dataset: Any) -> Any:
        """Rows of ``dataset`` as token ids and labels, equal to TRL's ``train_dataset``."""
        self._train = prepare(
            dataset, self.tokenizer, self.plan.data, name="train", packing=self.plan.data.packing, **self._options
        )
        logger.info(self._train.report.describe())
        self._check(self._train, "train", self.plan.batch.train_batch_size)
        return self._train.dataset

    def prepare_eval(self, dataset: Any) -> Any:
        """The same for an evaluation dataset, or a dict of them."""
        if dataset is None:
            return None
        prepared = prepare_eval(dataset, self.tokenizer, self.plan.data, like=self._train, **self._options)
        named = prepared if isinstance(prepared, dict) else {"eval": prepared}
        for name, part in named.items():
            self._check(part, name, self.plan.batch.eval_batch_size)
        if isinstance(prepared, dict):
            return {name: part.dataset for name, part in prepared.items()}
        return prepared.dataset

    def _check(self, prepared: Prepared, name: str, batch_size: int) -> None:
        self._guard.dataset(prepared.dataset, name, batch_size, padding_free=self._train.padding_free)

    def train_loader(self, dataset: Any, rng: TorchGenerator | None = None) -> RowLoader | StreamLoader:
        """Micro-batches in the order of transformers' train dataloader.

        Args:
            dataset: A prepared one.
            rng: Stands for torch's global generator; None takes the run's.
        """
        plan = self.plan.batch
        lengths = self._row_lengths(dataset) if plan.sampling == "group_by_length" else None

        def order(epoch: int) -> Any:
            return epoch_order(len(dataset), plan, epoch, lengths=lengths, global_rng=rng or self.rng)

        return make_loader(dataset, plan.train_batch_size, self._collate, order=order, drop_last=plan.drop_last)

    def eval_loader(self, dataset: Any) -> RowLoader | StreamLoader:
        """Micro-batches from first to last; grouped by length when training is (as upstream)."""
        plan = self.plan.batch
        self.rng.seed_int64()  # opening a torch dataloader draws once, and later orders may depend on it
        if plan.sampling != "group_by_length" or not hasattr(dataset, "__len__"):
            return make_loader(dataset, plan.eval_batch_size, self._collate, drop_last=plan.drop_last)
        lengths = self._row_lengths(dataset)
        seed = plan.seed if plan.data_seed is None else plan.data_seed

        def order(_: int) -> Any:
            return group_by_length(lengths, plan.eval_batch_size, TorchGenerator(seed))

        return make_loader(dataset, plan.eval_batch_size, self._collate, order=order, drop_last=plan.drop_last)

    def inputs(self, batch: Batch, *, keep_rows: bool = False) -> Inputs:
        """``batch`` as device arrays, in one of the run's shapes.

        Args:
            batch: Of one of the loaders.
            keep_rows: Leave the rows as the collator made them, for logits that someone will look at.
        """
        return make_inputs(batch, self._guard.fill_id, None if keep_rows else self.shapes, limit=self._limit)

    def train_batches(
        self, loader: RowLoader | StreamLoader, epoch: int, skip: int
    ) -> Iterator[tuple[Batch, HostInputs]]:
        """The micro-batches of an epoch without the first ``skip``, laid into rows.

        They are made on another thread while the device computes, a window ahead: where nobody would notice, so not
        those of a stream, nor of a user's collator, which may draw random numbers.
        """
        fill_id, limit = self._guard.fill_id, self._limit
        batches = loader.batches(epoch, skip=skip)
        laid = ((batch, make_host_inputs(batch, fill_id, self.shapes, limit=limit)) for batch in batches)
        if self._collator is not None or not isinstance(loader, RowLoader):
            return laid
        return read_ahead(laid, self.plan.batch.gradient_accumulation_steps)

    def _row_lengths(self, dataset: Any) -> list[int]:
        # transformers looks for the column once it has removed those that the model does not take.
        column = self.plan.batch.length_column_name
        if self._keep_columns and column in dataset.column_names:
            return list(dataset[column])
        return count_tokens(dataset)

    @cached_property
    def shapes(self) -> Shapes:
        """The shapes of the run; the same for the same dataset and batch size, so for a resumed run too."""
        dataset = self._train.dataset
        # A user's collator may draw random numbers, and a stream cannot be looked ahead into.
        if self._collator is not None or not hasattr(dataset, "__len__"):
            return Shapes(share=self.share_rows, limit=self._limit)
        # A generator of its own leaves the run's order alone.
        loader = self.train_loader(dataset, TorchGenerator(self.plan.batch.seed))
        assert isinstance(loader, RowLoader)
        return fit_shapes(loader.sample(SAMPLE), share=self.share_rows, limit=self._limit)

    def count_steps(self, dataset: Any) -> Steps:
        """Batches, updates and steps of a run over ``dataset``."""
        return count_steps(len(dataset) if hasattr(dataset, "__len__") else None, self.plan.batch)

    def _collate(self, rows: list[dict[str, Any]]) -> Batch:
        if self._collator is not None:
            if not self._keep_columns:
                rows = [{key: row[key] for key in SIGNATURE_COLUMNS if key in row} for row in rows]
            return self._guard.batch(convert_batch(self._collator(rows)))
        if not self._train.padding_free:
            # Upstream's collator reads where documents begin for padding-free batches alone.
            rows = [{key: value for key, value in row.items() if key != "seq_lengths"} for row in rows]
        batch = collate(
            rows,
            pad_token_id=self.tokenizer.pad_token_id,
            padding_free=self._train.padding_free,
            pad_to_multiple_of=self.plan.data.pad_to_multiple_of,
        )
        return self._guard.batch(batch)


class Session:
    """A model with what is trained on it: adapter or all weights, the compiled step, the evaluator.

    Args:
        plan: The whole plan.
        loaded: The base model; changed in place.

    Attributes:
        adapter: The attached adapter, or None when all weights are trained.
        step: The compiled training step; owns the trainable arrays.
        evaluator: The compiled evaluation.
        routers: The routers whose load is balanced; None where there is no such loss.
        progress: Counters of the run.
        packs: Whether the model keeps documents that share a row apart.
    """

    def __init__(self, plan: TrainPlan, loaded: LoadedModel) -> None:
        self.plan = plan
        self.loaded = loaded
        self.packs = can_pack(loaded.model_type)
        _check_packing(loaded, plan.data)
        precision = plan.model.precision
        if precision.autocast:
            apply_autocast(loaded.model, getattr(mx, precision.autocast))
        self.adapter, names = self._choose_trainable()
        if precision.autocast:
            store_frozen_weights(loaded.model, getattr(mx, precision.autocast))
        loaded.read_weights()
        self.routers = Routers.attach(loaded, plan.loss)
        checkpoint_layers(loaded.model, plan.checkpointing, self.routers and self.routers.log)
        recompute_activations(layers(loaded.model))
        order_backward(layers(loaded.model))
        objective = Objective(loaded, names, plan.loss, self.routers)
        optimizer = make_optimizer(plan.optim, self._decayed(names))
        self.step = make_step(
            objective,
            optimizer,
            plan.clip,
            seed=plan.batch.seed,
            accepts_loss_kwargs=loaded.accepts_loss_kwargs,
            counts_every_label=loaded.counts_every_label,
            computed_in=partial(_computed_in, loaded.model),
        )
        self.evaluator = Evaluator(objective)
        self.progress = Progress()

    @contextmanager
    def evaluation(self, *, in_train: bool) -> Iterator[tuple[Evaluator, dict[str, mx.array]]]:
        """The evaluator and the parameters to evaluate with.

        Args:
            in_train: During ``train()`` the weights are those that are trained, whatever ``full_eval_dtype`` says
                (transformers 5.23 ``Trainer.evaluation_loop``).
        """
        objective, dtype = self.step.objective, self.plan.full_eval_dtype
        if dtype is None or in_train:
            yield self.evaluator, self.step.params
            return
        objective.slots.bind(self.step.params)
        with cast_weights(self.loaded.model, getattr(mx, dtype)):
            yield Evaluator(objective), objective.slots.read()

    def hf_name(self, name: str) -> str:
        """The name PEFT (or, without adapter, the HF checkpoint) gives a trainable array."""
        return self.adapter.hf_name(name) if self.adapter is not None else self.loaded.names.to_hf_names(name)[0]

    def describe_shapes(self) -> str:
        """How many shapes the step was traced for, and how much of what it computed was padding."""
        share = self.progress.padding / max(self.progress.positions, 1)
        return f"{self.step.traces} traces of the step; {100 * share:.1f}% of the positions were padding"

    @cached_property
    def flops_per_token(self) -> float:
        """transformers 5.23 ``PreTrainedModel.floating_point_ops``: 6 FLOP per non-embedding parameter and token."""
        parameters = dict(tree_flatten(self.loaded.model.parameters()))
        return 6.0 * sum(value.size for name, value in parameters.items() if not _is_embedding(name))

    def _choose_trainable(self) -> tuple[Adapter | None, list[str]]:
        plan, model = self.plan, self.loaded.model
        if plan.lora is None:
            _check_floating(self.loaded)
            model.unfreeze()
            self.loaded.freeze_buffers()
            return None, list(trainable_arrays(model))
        # A base without a name that others can load would only be noticed when the first checkpoint is written.
        resolve_origin(self.loaded)
        adapter = attach(
            self.loaded,
            plan.lora,
            seed=plan.batch.seed,
            compute_dtype=_lora_dtype(plan.model.precision),
            last_n_layers=plan.finetune_last_n_layers,
            seeded_before_loading=True,
        )
        return adapter, list(adapter.trainable())

    def _decayed(self, names: Iterable[str]) -> frozenset[str]:
        by_hf_name = {self.hf_name(name): name for name in names}
        to_hf = self.loaded.names.to_hf_modules
        norms = [to_hf(path)[0] for path, m in self.loaded.model.named_modules() if isinstance(m, nn.LayerNorm)]
        return frozenset(by_hf_name[hf_name] for hf_name in decay_names(by_hf_name, norms))


def _computed_in(model: nn.Module) -> dict[str, mx.Dtype]:
    adapted = ((path, module) for path, module in model.named_modules() if isinstance(module, LoRALinear))
    return {f"{path}.{name}": dtype for path, module in adapted for name, dtype in module.computed_in().items()}


def _check_packing(loaded: LoadedModel, plan: DataPlan) -> None:
    # "wrapped" cuts a stream of tokens into rows that are read as one text each, so nothing is kept apart.
    apart = plan.packing_strategy != "wrapped"
    if plan.padding_free:
        check_packs(loaded.model_type, "padding_free=True", "SFTConfig(padding_free=False)")
    elif apart and plan.packing:
        check_packs(loaded.model_type, f"packing=True ({plan.packing_strategy})", "SFTConfig(packing=False)")


def _check_floating(loaded: LoadedModel) -> None:
    if any("scales" in module for module in loaded.model.modules()):
        raise ModelError(
            f"all weights of {loaded.path}, which is quantised, to be trained",
            "an adapter on a quantised base, or a base in floating point (transformers' trainer raises too)",
            'peft_config=LoraConfig(target_modules="all-linear"), or the original model without quantization_config',
        )


def _is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed_tokens", "wte", "wpe", "embeddings", "embed_in"))


def _lora_dtype(precision: PrecisionPlan) -> mx.Dtype:
    # Without autocast PEFT casts the input to the adapter's fp32, whatever the base's dtype.
    return getattr(mx, precision.autocast) if precision.autocast else mx.float32
