"""The objective of preference training: policy and reference over the same pairs, and what trl logs beside the loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from ..adapters.draws import row_keys
from ..adapters.dropout import KeyedDropout
from ..data.batch import Batch
from ..errors import AdapterError, SettingError
from ..models.heads import Head, split_head
from ..models.load import LoadedModel
from ..models.masks import row_cache
from ..models.sums import blocked_sum
from ..settings.plan import PairLossPlan
from .blocked_attention import written_windows
from .inputs import Inputs
from .linear_logps import TokenLogps, linear_logp, linear_token_logps, token_logps
from .objective import HeadBlocks, Slots
from .optimizers.contract import Arrays
from .pair_losses import Pairs, pair_loss
from .pair_rows import answers_of_tokens, by_pair, rows_together, scored, sum_answers, sum_by_answer, wpo_weights
from .router import Routers
from .shared_rows import prompt_cache, shares_prompts
from .token_rows import multiply_together

PAIR_METRICS = (
    "entropy",
    "logits/chosen",
    "logits/rejected",
    "mean_token_accuracy",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


class Reference(Protocol):
    """The frozen policy that the trained one is held to."""

    @property
    def held_bytes(self) -> int:
        """Of arrays that the policy does not hold."""
        ...

    def __call__(self, params: Arrays, arrays: Arrays) -> mx.array:
        """Log-probabilities of the scored tokens, (N,) float32; the caller stops their gradient.

        Args:
            params: The policy's arrays, outside the gradient; what the reference binds in the model, the caller
                binds anew.
            arrays: Of the micro-batch.
        """
        ...


class Scorer:
    """A model's log-probabilities of the scored tokens of a micro-batch, never all logits at once.

    Args:
        loaded: The model, with adapters already attached.
        slots: What trains in it.

    Attributes:
        shares_prompts: Whether two answers may share a row.
    """

    def __init__(self, loaded: LoadedModel, slots: Slots) -> None:
        self.model = loaded.model
        self._written = written_windows(loaded)
        self.shares_prompts = shares_prompts(loaded)
        if self.shares_prompts:
            multiply_together(loaded.model)
        self._split = split_head(loaded)
        self.head: Head | None = self._split[1] if self._split is not None else None
        self._blocks = HeadBlocks(loaded.model, self.head, slots) if self.head is not None else None

    def __call__(self, params: Arrays, arrays: Arrays, *, gradient: bool, squares: bool = False) -> TokenLogps:
        """Of each scored token, (N,); ``params`` are bound already."""
        found, targets = self._read(arrays), arrays["targets"]
        blocks, rows = self._in_blocks(targets)
        if blocks is None:
            return token_logps(self._finish(found), targets, squares=squares)
        weights = [params[name] for name in blocks.names]
        options: dict[str, Any] = {"rows": rows, "gradient": gradient, "squares": squares}
        return linear_token_logps(blocks.project, found, weights, targets, **options)

    def logp(self, params: Arrays, arrays: Arrays) -> mx.array:
        """The log-probability alone of each scored token, (N,) float32, without gradients."""
        found, targets = self._read(arrays), arrays["targets"]
        blocks, rows = self._in_blocks(targets)
        if blocks is None:
            return token_logps(self._finish(found), targets).logp
        return linear_logp(blocks.project, found, [params[name] for name in blocks.names], targets, rows=rows)

    def _read(self, arrays: Arrays) -> mx.array:
        """Hidden states (N, H) of the scored tokens; their logits where the model's code does not divide there."""
        ids: mx.array = arrays["input_ids"]
        cache: Any
        if "splits" in arrays:
            # Two answers share a row: each token is a row of its own, with its position.
            ids = ids.reshape(-1, 1)
            cache = prompt_cache(self.model, *(arrays[name] for name in ("offsets", "slots", "rejected")))
        else:
            cache = row_cache(self.model, ids.shape[1], self._written)
        found = self.model(ids, cache=cache) if self._split is None else self._split[0](self.model, ids, cache)
        return scored(found, arrays)

    def _finish(self, found: mx.array) -> mx.array:
        return found if self._split is None else self._split[1](self.model, found)

    def _in_blocks(self, targets: mx.array) -> tuple[HeadBlocks | None, int]:
        """The head and how many tokens it takes at a time; None where it takes all at once."""
        tokens = targets.shape[0]
        rows = tokens if self._blocks is None else self._blocks.rows(tokens)
        return None if rows == tokens else self._blocks, rows


class Answers(NamedTuple):
    """A policy's view of the answers.

    Attributes:
        logps: (2P,) summed log-probabilities, LD-DPO's weights included.
        tokens: What is known of each scored token.
    """

    logps: mx.array
    tokens: TokenLogps


class PairObjective:
    """The loss of preference training, already divided by the pairs and tokens of the micro-batch.

    Args:
        loaded: The model, with adapters already attached.
        names: Flat MLX names of what is trained.
        plan: Which losses.
        routers: The routers whose load is balanced, if any.
        reference: None where every batch brings the reference's log-probabilities.

    Raises:
        AdapterError: The head is adapted, which upstream refuses.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        names: Iterable[str],
        plan: PairLossPlan,
        routers: Routers | None = None,
        reference: Reference | None = None,
    ) -> None:
        self.model = loaded.model
        self.plan = plan
        self.routers = routers
        self.reference = reference
        self.aux_coefficient = routers.coefficient if routers is not None else 0.0
        self.metrics: tuple[str, ...] = PAIR_METRICS if routers is None else ("aux_loss", *PAIR_METRICS)
        self.whole = routers is not None or plan.sorts
        self.slots = Slots(loaded.model, names)
        self.score = Scorer(loaded, self.slots)
        self.head = self.score.head
        self._dropouts = [module for module in loaded.model.modules() if isinstance(module, KeyedDropout)]
        _check_head(self)

    def __call__(self, params: Arrays, arrays: Arrays) -> tuple[mx.array, Arrays]:
        """The loss and the metrics, each what a piece of the micro-batch adds to the whole.

        Args:
            params: Flat {MLX name: array}.
            arrays: :attr:`hf_mlx.training.inputs.Inputs.arrays` with those of
                :func:`hf_mlx.data.pairs.pair_arrays`; in training also ``key``, what dropout draws from.
        """
        # Before the policy's arrays are bound: the reference may bind others.
        reference = mx.stop_gradient(self._reference(params, arrays))
        self.slots.bind(params)
        if self.model.training:
            self._bind_keys(arrays)
        if self.routers is None:
            return self._measure(self._answers(params, arrays), reference, arrays)
        with self.routers.log.recording() as logits:
            answers = self._answers(params, arrays)
        loss, metrics = self._measure(answers, reference, arrays)
        counted = mx.arange(arrays["input_ids"].shape[1]) < arrays["lengths"][:, None]
        return loss, {**metrics, "aux_loss": self.routers.balance(logits, counted)}

    def logits(self, arrays: Arrays) -> mx.array:
        """All logits, (R, W, V), of the model as it stands."""
        return self.model(arrays["input_ids"])

    def reference_logps(self, params: Arrays, arrays: Arrays) -> mx.array:
        """The reference's summed log-probability of each pair's answers, (P, 2) float32."""
        return by_pair(self._reference(params, arrays))

    def divisor(self, inputs: Inputs) -> int:
        """1: what :meth:`__call__` returns is divided already."""
        return 1

    def predictions(self, logits: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Logits and token ids of a batch in upstream's order: all chosen rows, then all rejected ones."""
        order = np.arange(len(logits)).reshape(-1, 2).T.reshape(-1)
        return logits[order], batch.input_ids[order]

    def rows_together(self, arrays: Arrays) -> int:
        """Rows of a pair: one for each answer, or one for both where their prompt is computed once."""
        return rows_together(arrays)

    @property
    def reference_bytes(self) -> int | None:
        """What the reference holds beside the policy's arrays; None where no reference is computed."""
        return None if self.reference is None or self.plan.precompute else self.reference.held_bytes

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt may be computed once for both of its answers: nothing is drawn or balanced by row."""
        drawn = any(dropout.p for dropout in self._dropouts)
        models = (self.score, getattr(self.reference, "score", self.score))
        return not drawn and self.routers is None and all(score.shares_prompts for score in models)

    @property
    def captured(self) -> Arrays | None:
        """Arrays of the reference that move, so that a trace must not take them for constants."""
        return getattr(self.reference, "arrays", None) if self.plan.sync_steps is not None else None

    def _reference(self, params: Arrays, arrays: Arrays) -> mx.array:
        if "reference" in arrays:
            return arrays["reference"].reshape(-1)
        if self.reference is None:
            raise SettingError(
                "rows without ref_chosen_logps and ref_rejected_logps, with precompute_ref_log_probs=True",
                "the reference's log-probabilities: it is not kept while all weights train",
                "pass the rows to the constructor: MLXDPOTrainer(..., train_dataset=rows)",
            )
        if self.model.training:
            self._bind_keys(arrays)
        frozen = {name: mx.stop_gradient(value) for name, value in params.items()}
        if self.routers is None:
            return sum_answers(self.reference(frozen, arrays), arrays, self.plan.ld_alpha)
        with self.routers.log.recording():
            return sum_answers(self.reference(frozen, arrays), arrays, self.plan.ld_alpha)

    def _answers(self, params: Arrays, arrays: Arrays) -> Answers:
        tokens = self.score(params, arrays, gradient=self.model.training, squares=self.plan.use_weighting)
        return Answers(sum_answers(tokens.logp, arrays, self.plan.ld_alpha), tokens)

    def _bind_keys(self, arrays: Arrays) -> None:
        if not self._dropouts:
            return
        keys = mx.random.split(arrays["key"][:2], len(self._dropouts) + 1)
        rows = arrays["key"][2] + mx.arange(arrays["input_ids"].shape[0]).astype(mx.uint32)
        for index, dropout in enumerate(self._dropouts):
            dropout.bind(row_keys(keys[index + 1], rows))

    def _measure(self, answers: Answers, reference: mx.array, arrays: Arrays) -> tuple[mx.array, Arrays]:
        plan, tokens = self.plan, answers.tokens
        logps, reference = by_pair(answers.logps), by_pair(reference)
        chosen = answers_of_tokens(arrays) % 2 == 0
        # The mean over pairs of this is the mean over the micro-batch's chosen tokens.
        summed = by_pair(sum_by_answer(tokens.logp, arrays))[:, 0]
        sft = -summed * (arrays["pairs"] / arrays["chosen_tokens"])
        pairs = Pairs(logps, reference, by_pair(arrays["answers"]), sft, plan)
        loss = pair_loss(pairs)
        if plan.use_weighting:
            loss = loss * wpo_weights(tokens, arrays)
        fixed = mx.stop_gradient(logps)
        rewards = plan.beta * (fixed - reference)
        metrics = {
            "entropy": blocked_sum(tokens.entropy) / arrays["tokens"],
            "logits/chosen": blocked_sum(mx.where(chosen, tokens.mean_logit, 0.0)) / arrays["chosen_tokens"],
            "logits/rejected": blocked_sum(mx.where(chosen, 0.0, tokens.mean_logit)) / arrays["rejected_tokens"],
            "mean_token_accuracy": mx.where(chosen, tokens.correct, 0.0).sum() / arrays["chosen_tokens"],
            "rewards/chosen": rewards[:, 0].sum() / arrays["pairs"],
            "rewards/rejected": rewards[:, 1].sum() / arrays["pairs"],
            "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).astype(mx.float32).sum() / arrays["pairs"],
            "rewards/margins": (rewards[:, 0] - rewards[:, 1]).sum() / arrays["pairs"],
            "logps/chosen": fixed[:, 0].sum() / arrays["pairs"],
            "logps/rejected": fixed[:, 1].sum() / arrays["pairs"],
        }
        return loss.sum() / arrays["pairs"], {name: mx.stop_gradient(value) for name, value in metrics.items()}


def _check_head(objective: PairObjective) -> None:
    head = objective.head
    if head is None or head.tied or not hasattr(head.module(objective.model), "lora_A"):
        return
    raise AdapterError(
        "target_modules with 'lm_head'",
        "a head without adapter: TRL's log-probabilities are computed from lm_head.weight, so it refuses this too",
        'LoraConfig(target_modules="all-linear"), which leaves the head out',
    )
