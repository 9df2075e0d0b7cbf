"""The stages of a run, wired: model, adapter, step and evaluator, built from a frozen plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .adapters.adapter import Adapter
from .adapters.attach import attach
from .adapters.layers import LoRALinear
from .adapters.origin import resolve_origin
from .errors import ModelError
from .models.architectures import can_pack, check_packs
from .models.heads import layers
from .models.load import LoadedModel
from .models.precision import apply_autocast, store_frozen_weights
from .recipes.recipe import Recipe
from .settings.plan import DataPlan, PrecisionPlan, TrainPlan
from .training.backward_order import order_backward
from .training.cast_weights import cast_weights
from .training.checkpointing import checkpoint_layers
from .training.evaluation import Evaluator
from .training.feed_forward import recompute_activations
from .training.lanes import make_step
from .training.means import Progress
from .training.optim import decay_names, make_optimizer


class Session:
    """A model with what is trained on it: adapter or all weights, the compiled step, the evaluator.

    Args:
        plan: The whole plan.
        loaded: The base model; changed in place.
        recipe: What is minimised, and what a micro-batch weighs.

    Attributes:
        adapter: The attached adapter, or None when all weights are trained.
        step: The compiled training step; owns the trainable arrays.
        evaluator: The compiled evaluation.
        adapter_name: What PEFT calls the adapter.
        routers: The routers whose load is balanced; None where there is no such loss.
        progress: Counters of the run.
        packs: Whether the model keeps documents that share a row apart.
        restored: Frozen weights that came from a checkpoint, as it stores them; see :meth:`adopt_frozen`.
    """

    adapter_name = "default"

    def __init__(self, plan: TrainPlan, loaded: LoadedModel, recipe: Recipe) -> None:
        self.plan = plan
        self.loaded = loaded
        self.recipe = recipe
        self.packs = can_pack(loaded.model_type)
        _check_packing(loaded, plan.data)
        precision = plan.model.precision
        if precision.autocast:
            apply_autocast(loaded.model, getattr(mx, precision.autocast))
        self.adapter, names = self._choose_trainable()
        if precision.autocast:
            store_frozen_weights(loaded.model, getattr(mx, precision.autocast))
        loaded.read_weights()
        self.routers = recipe.make_routers(loaded, plan.loss)
        checkpoint_layers(loaded.model, plan.checkpointing, self.routers and self.routers.log)
        recompute_activations(layers(loaded.model))
        order_backward(layers(loaded.model))
        objective = recipe.make_objective(loaded, names, plan, self.routers)
        optimizer = make_optimizer(plan.optim, self._decayed(names))
        self.step = make_step(
            objective,
            optimizer,
            plan.clip,
            seed=plan.batch.seed,
            weigh=recipe.make_weighting(loaded),
            computed_in=partial(_computed_in, loaded.model),
        )
        self.evaluator = Evaluator(objective)
        self.progress = Progress()
        self.restored: dict[str, mx.array] = {}

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

    def adopt_frozen(self, arrays: Mapping[str, mx.array]) -> None:
        """Take a checkpoint's frozen weights in place of those at hand, where they differ.

        Args:
            arrays: MLX path → array in any dtype; kept in ``restored``, for a user's own model.
        """
        held: dict[str, mx.array] = dict(tree_flatten(self.loaded.model.parameters()))
        cast = {name: value.astype(held[name].dtype) for name, value in arrays.items()}
        changed = {name for name, value in cast.items() if not mx.array_equal(value, held[name]).item()}
        if changed:
            self.restored |= {name: arrays[name] for name in changed}
            self.loaded.model.update(tree_unflatten([(name, cast[name]) for name in changed]))
            # Frozen weights are constants of a trace.
            self.step.retrace()
            self.evaluator = Evaluator(self.step.objective)

    def adopt_plan(self, plan: TrainPlan) -> None:
        """Go on under ``plan``, which differs in how the run is batched, optimised, scheduled and clipped."""
        optimizer = self.step.optimizer
        if plan.optim != self.plan.optim:
            optimizer = make_optimizer(plan.optim, optimizer.decay)
        if optimizer is not self.step.optimizer or plan.clip != self.plan.clip:
            self.step.adopt(optimizer, plan.clip)
        self.plan = plan

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
            return None, list(dict(tree_flatten(model.trainable_parameters())))
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
