"""The function a step differentiates: parameters and one micro-batch in, loss out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..adapters.draws import row_keys
from ..adapters.dropout import KeyedDropout
from ..data.batch import Batch
from ..device import on_cpu
from ..models.architectures import can_pack, check_packs
from ..models.heads import Head, split_head
from ..models.load import LoadedModel
from ..models.masks import masked_cache, packed_cache, row_cache
from ..settings.plan import AnyLossPlan, LossPlan
from .blocked_attention import written_windows
from .inputs import Inputs
from .linear_cross_entropy import block_rows, linear_token_sums
from .loss import TokenSums, token_sums
from .native_loss import NativeLoss, native_sums
from .noise import NoisyEmbedding
from .optimizers.contract import Arrays
from .router import Routers

# Beside the loss of each micro-batch trl 1.16 logs these, as means over its scored tokens.
TOKEN_METRICS = ("entropy", "mean_token_accuracy")


class Slots:
    """Where each trainable array lives in the model, resolved once so that binding is a plain assignment."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._slots: dict[str, tuple[Any, str | int]] = {}
        for name in names:
            *path, leaf = name.split(".")
            owner: Any = model
            for key in path:
                owner = owner[int(key)] if isinstance(owner, list) else owner[key]
            self._slots[name] = (owner, int(leaf) if isinstance(owner, list) else leaf)

    def bind(self, params: dict[str, mx.array]) -> None:
        """Put ``params`` into the model."""
        for name, value in params.items():
            owner, key = self._slots[name]
            owner[key] = value

    @property
    def names(self) -> list[str]:
        """Flat MLX names, in the order they came in."""
        return list(self._slots)

    def read(self) -> dict[str, mx.array]:
        """The arrays that are in the model now, in the order of the names."""
        return {name: owner[key] for name, (owner, key) in self._slots.items()}


class Objective(Protocol):
    """What a trainer minimises: the loss of a micro-batch as a function of the trainable parameters.

    Attributes:
        model: The module that is trained.
        slots: Where the trained arrays are bound.
        plan: Which loss.
        routers: The routers whose load is balanced, if any.
        head: The vocabulary projection; None where the model's code does not divide there.
        metrics: What is measured beside the loss, by the name it is logged under, in the order of the log.
        aux_coefficient: What the metric ``aux_loss`` is multiplied by in what is minimised; 0 where there is none.
        whole: A micro-batch is not cut at all.
    """

    model: nn.Module
    slots: Slots
    routers: Routers | None
    head: Head | None
    metrics: tuple[str, ...]
    aux_coefficient: float
    whole: bool

    @property
    def captured(self) -> Arrays | None:
        """Arrays that a compiled function reads anew at each call, beside its arguments; None where there are none."""
        ...

    @property
    def plan(self) -> AnyLossPlan:
        """Which loss."""
        ...

    def rows_together(self, arrays: Arrays) -> int:
        """Rows that a cut of these arrays leaves together."""
        ...

    def __call__(self, params: Arrays, arrays: Arrays) -> tuple[mx.array, Arrays]:
        """The loss and the metrics of a micro-batch, each a float32 scalar and a sum that pieces add up to."""
        ...

    def logits(self, arrays: Arrays) -> mx.array:
        """(B, T, V) for the rows of a batch."""
        ...

    def divisor(self, inputs: Inputs) -> int:
        """What the loss of a batch is divided by in evaluation."""
        ...

    def predictions(self, logits: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray | tuple[()]]:
        """Logits and labels of a batch as ``compute_metrics`` gets them; ``()`` where the loss needs no labels."""
        ...


class TokenObjective:
    """The loss of next-token prediction, as a sum over the tokens that are scored.

    Args:
        loaded: The model, with adapters already attached.
        names: Flat MLX names of what is trained.
        plan: Which loss.
        routers: The routers whose load is balanced, if any.

    Attributes:
        head: The vocabulary projection; None where the model's code does not divide there.
        native: The script's own loss, in the place of the plan's.
        unseen: What the torch model returns beside its logits, and this one does not.
    """

    captured: Arrays | None = None
    native: NativeLoss | None = None
    unseen: tuple[str, ...] = ()

    def __init__(
        self, loaded: LoadedModel, names: Iterable[str], plan: LossPlan, routers: Routers | None = None
    ) -> None:
        self.model = loaded.model
        self.model_type = loaded.model_type
        self.plan = plan
        self.routers = routers
        self.aux_coefficient = routers.coefficient if routers is not None else 0.0
        self.metrics: tuple[str, ...] = TOKEN_METRICS if routers is None else (*TOKEN_METRICS, "aux_loss")
        self.whole = routers is not None
        self.slots = Slots(loaded.model, names)
        self._split = split_head(loaded)
        self._written = written_windows(loaded)
        self.head = self._split[1] if self._split is not None else None
        self._blocks = HeadBlocks(loaded.model, self.head, self.slots) if self.head is not None else None
        self._dropouts = [module for module in loaded.model.modules() if isinstance(module, KeyedDropout)]
        self._noise = NoisyEmbedding.attach(loaded, plan.neftune_noise_alpha) if plan.neftune_noise_alpha else None

    def __call__(self, params: Arrays, arrays: Arrays) -> tuple[mx.array, Arrays]:
        """Sums over the scored tokens: the loss, and the metrics by name.

        Args:
            params: Flat {MLX name: array}.
            arrays: :attr:`hf_mlx.training.inputs.Inputs.arrays`; in training also ``key`` (3,) uint32, what
                dropout and NEFTune draw from: seed, number of the micro-batch, and of the first row in it.
        """
        self.slots.bind(params)
        if self.model.training:
            self._bind_keys(arrays)
        if self.routers is None:
            return _named(self._sums(params, arrays))
        with self.routers.log.recording() as logits:
            loss, metrics = _named(self._sums(params, arrays))
        counted = mx.arange(arrays["input_ids"].shape[1]) < arrays["lengths"][:, None]
        return loss, {**metrics, "aux_loss": self.routers.balance(logits, arrays.get("keys", counted))}

    def rows_together(self, arrays: Arrays) -> int:
        """1: rows do not depend on each other."""
        return 1

    def divisor(self, inputs: Inputs) -> int:
        """The scored tokens, at least one."""
        return max(inputs.valid, 1)

    def predictions(self, logits: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Logits and labels of a batch as ``compute_metrics`` gets them."""
        return logits, batch.labels

    def _bind_keys(self, arrays: dict[str, mx.array]) -> None:
        if not self._dropouts and self._noise is None:
            return
        keys = mx.random.split(arrays["key"][:2], len(self._dropouts) + 1)
        rows = arrays["key"][2] + mx.arange(arrays["input_ids"].shape[0]).astype(mx.uint32)
        for index, dropout in enumerate(self._dropouts):
            dropout.bind(row_keys(keys[index + 1], rows))
        if self._noise is not None:
            self._noise.keys, self._noise.width = row_keys(keys[0], rows), arrays["width"]

    @property
    def draws(self) -> bool:
        """Whether a pass in training depends on ``key``."""
        return bool(self._noise is not None or any(dropout.p for dropout in self._dropouts))

    def forward(self, params: Arrays, arrays: Arrays) -> mx.array:
        """All logits (B, T, V) as a function of the parameters; in training it draws as the loss does."""
        self.slots.bind(params)
        if self.model.training:
            self._bind_keys(arrays)
        return self.logits(arrays)

    def logits(self, arrays: dict[str, mx.array]) -> mx.array:
        """All logits, (B, T, V), of the model as it stands."""
        return self.model(arrays["input_ids"], cache=self._cache(arrays))

    def _sums(self, params: dict[str, mx.array], arrays: dict[str, mx.array]) -> TokenSums:
        targets = arrays["targets"]
        if self.native is not None:
            return native_sums(self.native, self.logits(arrays), arrays, self.plan)
        if self._split is None or self._blocks is None:
            return token_sums(_scored_rows(self.logits(arrays), arrays), targets, self.plan)
        backbone, head = self._split
        hidden = _scored_rows(backbone(self.model, arrays["input_ids"], self._cache(arrays)), arrays)
        rows = self._blocks.rows(targets.shape[0])
        if rows == targets.shape[0] and not self._blocks.fuses:
            return token_sums(head(self.model, hidden), targets, self.plan)
        weights = [params[name] for name in self._blocks.names]
        return linear_token_sums(
            self._blocks.project_raw,
            hidden,
            weights,
            targets,
            self.plan,
            rows=rows,
            gradient=self.model.training,
            finish=self._blocks.finish,
        )

    def _cache(self, arrays: dict[str, mx.array]) -> list | None:
        if "keys" in arrays:
            check_packs(
                self.model_type,
                "a batch that pads on the left, has holes in its attention_mask or scores its padding,",
                "tokenizer.padding_side = 'right', and labels of -100 wherever attention_mask is 0",
            )
            return masked_cache(self.model, arrays["keys"])
        if "shown_keys" in arrays and can_pack(self.model_type):
            return masked_cache(self.model, arrays["shown_keys"])
        if "segments" not in arrays:
            return row_cache(self.model, arrays["input_ids"].shape[1], self._written)
        check_packs(self.model_type, "a batch whose rows hold several documents", "one document a row: no seq_lengths")
        return packed_cache(self.model, arrays["segments"], self._written)


class HeadBlocks:
    """The head as a pure function of hidden states and of what trains in it.

    Attributes:
        names: Trained arrays of the head.
        finish: What single logits go through after the projection.
        fuses: A block's loss and gradient are faster than those of all logits even where it holds all of them.
    """

    def __init__(self, model: nn.Module, head: Head, slots: Slots) -> None:
        self._model, self._head, self._slots = model, head, slots
        self.names = [name for name in slots.names if name.startswith(f"{head.path}.")]
        module = head.module(model)
        self._vocabulary = module.get("base_layer", module).weight.shape[0]
        # One dropout mask covers all tokens, so a head with dropout is computed at once.
        self._whole = any(isinstance(part, KeyedDropout) for part in module.modules())
        self.finish = head.finish
        self.fuses = not (self._whole or on_cpu())

    def rows(self, tokens: int) -> int:
        """Tokens of a block; ``tokens`` where the logits are computed at once."""
        return tokens if self._whole else block_rows(tokens, self._vocabulary)

    def project(self, hidden: mx.array, weights: Sequence[mx.array]) -> mx.array:
        """Logits (N, V) of hidden states (N, H)."""
        return self.finish(self.project_raw(hidden, weights))

    def project_raw(self, hidden: mx.array, weights: Sequence[mx.array]) -> mx.array:
        """The same before :meth:`finish`."""
        self._slots.bind(dict(zip(self.names, weights, strict=True)))
        return self._head.project(self._model, hidden)


def _named(sums: TokenSums) -> tuple[mx.array, Arrays]:
    return sums.loss, dict(zip(TOKEN_METRICS, (sums.entropy, sums.correct), strict=True))


def _scored_rows(x: mx.array, arrays: dict[str, mx.array]) -> mx.array:
    flat = x.reshape(-1, x.shape[-1])
    return flat[arrays["positions"]] if "positions" in arrays else flat
