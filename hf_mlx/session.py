"""The stages of a run, wired: model, adapter, step and evaluator, built from a frozen plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from .adapters.adapter import Adapter
from .adapters.attach import attach
from .adapters.layers import LoRALinear
from .adapters.origin import resolve_origin
from .adapters.score_head import draw_head
from .adapters.tensor_parallel import Split, split_model
from .checkpoints.fingerprint import choose_samples, read_samples
from .errors import ModelError, SettingError
from .models.architectures import can_pack, check_packs, note_packs
from .models.frozen_products import turn_frozen_weights
from .models.heads import layers
from .models.load import LoadedModel
from .models.precision import apply_autocast, store_frozen_weights
from .processes.world import the_world
from .recipes.recipe import Recipe
from .settings.clipping import GradClip
from .settings.plan import DataPlan, PrecisionPlan, TrainPlan
from .training.backward_order import order_backward
from .training.block_memory import BlockMemory
from .training.blocked_attention import attend_in_blocks
from .training.cast_weights import cast_weights
from .training.checkpointing import checkpoint_layers
from .training.evaluation import Evaluator
from .training.exchange import Exchange, GradientExchange
from .training.feed_forward import recompute_activations
from .training.host_loss import HostEvaluator, HostLoss, HostLossStep, measuring_nothing
from .training.lanes import make_step
from .training.means import Progress
from .training.native_loss import NativeLoss
from .training.norm_gradients import improve_norms
from .training.objective import TokenObjective
from .training.optim import Optimizer, decay_names, make_optimizer
from .training.padding_row import hold_padding_row
from .training.routed_experts import route_experts
from .training.split_exchange import SplitExchange
from .training.step import Step
from .training.weight_gradients import lay_out_gradients
from .training.weighting import ByTokens


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
        decayed: MLX names of what weight decay applies to.
        host_loss: The script's own loss, in the place of the compiled one; see :meth:`adopt_loss`.
        packs: Whether the model keeps documents that share a row apart.
        world: The processes that train it together.
        split: How the trained arrays lie where they hold one model together; None where each holds all of it.
        fingerprint: What tells the base, of a model that was whole once; None where it still is.
        restored: Frozen weights that came from a checkpoint, as it stores them; see :meth:`adopt_frozen`.
    """

    adapter_name = "default"

    def __init__(self, plan: TrainPlan, loaded: LoadedModel, recipe: Recipe) -> None:
        self.plan = plan
        self.loaded = loaded
        self.recipe = recipe
        self.world = the_world()
        self.packs = can_pack(loaded.model_type)
        _check_packing(loaded, plan.data)
        if loaded.fresh_head:
            draw_head(loaded, plan.batch.seed)
        precision = plan.model.precision
        if precision.autocast:
            apply_autocast(loaded.model, getattr(mx, precision.autocast))
        self.adapter, names = self._choose_trainable()
        if precision.autocast:
            store_frozen_weights(loaded.model, getattr(mx, precision.autocast))
        self.split, self.fingerprint = self._split_model(names)
        loaded.read_weights()
        # A held padding row makes the embedding another class.
        lay_out_gradients(loaded.model)
        turn_frozen_weights(loaded.model)
        improve_norms(loaded.model)
        hold_padding_row(loaded)
        self.routers = recipe.make_routers(loaded, plan.loss)
        _check_routers(self.routers, plan)
        memory = BlockMemory.of(loaded.model, plan)
        checkpoint_layers(loaded.model, plan.checkpointing, self.routers and self.routers.log, memory)
        route_experts(layers(loaded.model))
        attend_in_blocks(layers(loaded.model))
        recompute_activations(layers(loaded.model))
        order_backward(layers(loaded.model))
        self._objective = recipe.make_objective(loaded, names, plan, self.routers)
        self._weigh = recipe.make_weighting(loaded)
        self.decayed = self._decayed(names)
        self.host_loss: HostLoss | None = None
        self.native_loss: NativeLoss | None = None
        self.step = self._make_step(make_optimizer(plan.optim, self.decayed), plan.clip)
        self.evaluator = self._make_evaluator()
        self.progress = Progress()
        self.restored: dict[str, mx.array] = {}

    def _make_step(self, optimizer: Optimizer, clip: GradClip) -> Step:
        options: dict[str, Any] = {"seed": self.plan.batch.seed}
        options["computed_in"] = partial(_computed_in, self.loaded.model)
        options["exchange"] = self._make_exchange()
        if self.host_loss is None:
            return make_step(self._objective, optimizer, clip, weigh=self._weigh, **options)
        silent, weigh = measuring_nothing(self._token_objective), cast(ByTokens, self._weigh)
        return HostLossStep(silent, optimizer, clip, loss=self.host_loss, count=weigh.count, **options)

    def _make_exchange(self) -> GradientExchange | None:
        if self.split is not None:
            return SplitExchange(self.split)
        return None if self.world.is_alone else Exchange(self.world)

    def _make_evaluator(self) -> Evaluator:
        if self.host_loss is None:
            return Evaluator(self._objective)
        weigh = cast(ByTokens, self._weigh)
        return HostEvaluator(measuring_nothing(self._token_objective), self.host_loss, count=weigh.count)

    @property
    def _token_objective(self) -> TokenObjective:
        """The objective, of a trainer whose rows are texts: the others refuse a loss of the logits."""
        return cast(TokenObjective, self._objective)

    def retrace(self) -> None:
        """Forget what was traced."""
        turn_frozen_weights(self.loaded.model)
        self.step.retrace()
        self.evaluator = self._make_evaluator()

    def adopt_native_loss(self, loss: NativeLoss) -> None:
        """Minimise a loss of the script's own that MLX compiles with the rest of the step."""
        self.native_loss = self._objective.native = loss  # pyright: ignore[reportAttributeAccessIssue]
        self.retrace()

    def adopt_loss(self, loss: HostLoss | None) -> None:
        """Train and evaluate by a loss of the script's from here on; None goes back to the compiled one."""
        old, self.host_loss = self.step, loss
        self.step = self._make_step(old.optimizer, old.clip)
        self.step.load(old.params, old.state)
        self.step.draws, self.step.updates = old.draws, old.updates
        self.evaluator = self._make_evaluator()

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
            yield self._make_evaluator(), objective.slots.read()

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
            self.retrace()

    def adopt_plan(self, plan: TrainPlan) -> None:
        """Go on under ``plan``, which differs in how the run is batched, optimised, scheduled and clipped."""
        optimizer = self.step.optimizer
        if plan.optim != self.plan.optim and not optimizer.on_host:
            optimizer = make_optimizer(plan.optim, self.decayed)
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

    def _split_model(self, names: list[str]) -> tuple[Split | None, dict[str, Any] | None]:
        """Leave this process's part of a model that several hold together; and what tells its base, while it is whole.

        Nothing is read whole but the few arrays that it is told by, one at a time.
        """
        if not self.world.tensor_parallel or self.adapter is None:
            return None, None
        # Of the whole model.
        _ = self.flops_per_token
        samples = choose_samples(self.loaded, names)
        self.adapter = split_model(self.adapter, self.world)
        return self.adapter.split, read_samples(self.loaded, samples)

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
    else:
        return
    loaded.notes.extend(note_packs(loaded.model_type))


def _check_routers(routers: Any, plan: TrainPlan) -> None:
    # Each process has all of a router, but a part of what its choice makes: the two gradients do not add up alike.
    if routers is not None and plan.model.tensor_parallel > 1:
        raise SettingError(
            f"a loss with the balance of routers, on a model split over {plan.model.tensor_parallel} processes",
            "the loss of the tokens alone",
            "SFTConfig(router_aux_loss_coef=0.0)",
        )


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
