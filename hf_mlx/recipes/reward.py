"""trl's ``RewardTrainer``: pairs of whole texts, and a model that scores each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..data.buckets import pad_batch
from ..data.order import count_tokens
from ..data.prompts import pair_width
from ..data.scored_pairs import ID_COLUMNS, MARGIN, ScoredBatch, collate_scored, convert_scored
from ..data.scored_rows import prepare_scored
from ..models.load import LoadedModel
from ..settings.config_tables import REWARD_TABLE
from ..settings.plan import DataPlan, ScoreLossPlan, TrainPlan
from ..training.inputs import HostInputs
from ..training.router import Routers
from ..training.scores import ScoreObjective
from ..training.weighting import ByScore
from .dpo import TwoAnswers
from .never_called import NEVER_CALLED
from .recipe import Recipe, Row

_LOSS = "the loss is compiled here: RewardConfig(center_rewards_coefficient=…), and a column margin of the rows"


class ScoredRows(TwoAnswers):
    """Rows of ``chosen_ids`` and ``rejected_ids``, prepared and collated as trl 1.16 does."""

    signature_columns: tuple[str, ...] | None = (*ID_COLUMNS, MARGIN)
    prepare_rows = staticmethod(prepare_scored)

    def lengths(self, dataset: Any, column: str, tokenizer: Any, *, keep_columns: bool) -> list[int]:
        raise NotImplementedError("the settings refuse what asks for lengths")

    def extent(self, dataset: Any, examples: int, plan: DataPlan) -> tuple[int, int]:
        longest = plan.max_length or 1024
        if hasattr(dataset, "__len__"):
            longest = max(max(count_tokens(dataset, column)) for column in ID_COLUMNS)
        return 2 * examples, pair_width(longest, 2 * examples)

    def collate(self, rows: Sequence[Row], tokenizer: Any, plan: DataPlan, *, padding_free: bool) -> ScoredBatch:
        return collate_scored(rows, pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=plan.pad_to_multiple_of)

    def convert(self, collated: Mapping[str, Any], pad_token_id: int) -> ScoredBatch:
        return convert_scored(collated, pad_token_id)

    def lay_out(self, batch: ScoredBatch, pad_token_id: int, shapes: Any, *, limit: int | None) -> HostInputs:
        rows, longest = len(batch.lengths), max(int(batch.lengths.max()), 1)
        ids = pad_batch(batch, pair_width(longest, rows, limit), pad_token_id).input_ids
        arrays = {"input_ids": ids, "last": batch.last, "lengths": batch.lengths}
        if batch.margins is not None:
            arrays["margins"] = batch.margins
        padding = ids.size - int(batch.lengths.sum())
        return HostInputs(arrays, rows, batch.num_tokens, padding, rows, pairs=batch.examples)


def default_args(model: str) -> Any:
    """TRL's default configuration for a model of this name."""
    from trl import RewardConfig

    return RewardConfig(f"{str(model).rstrip('/').split('/')[-1]}-Reward")


def score_objective(
    loaded: LoadedModel, names: Iterable[str], plan: TrainPlan, routers: Routers | None
) -> ScoreObjective:
    """What the chosen row scores above the rejected one."""
    assert isinstance(plan.loss, ScoreLossPlan)
    return ScoreObjective(loaded, names, plan.loss)


def by_score(loaded: LoadedModel) -> ByScore:
    """Each micro-batch of a window weighs the same."""
    return ByScore()


def no_routers(loaded: LoadedModel, plan: Any) -> None:
    """A reward model balances no experts."""
    return None


def log_rewards(means: Mapping[str, float], num_tokens: float) -> dict[str, float]:
    """In trl 1.16's order: the counter of tokens comes first."""
    return {"num_tokens": num_tokens, **means}


REWARD = Recipe(
    name="MLXRewardTrainer",
    config=REWARD_TABLE,
    make_args=default_args,
    rows=ScoredRows(),
    make_objective=score_objective,
    make_weighting=by_score,
    make_routers=no_routers,
    log_metrics=log_rewards,
    never_called={**NEVER_CALLED, "compute_loss": _LOSS},
    tags=("generated_from_trainer", "trl", "reward-trainer", "hf-mlx"),
    method="Reward",
    writes_router_settings=False,
    trains_together=True,
)
