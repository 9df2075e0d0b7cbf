"""trl's ``DPOTrainer``: pairs of answers, a policy and its reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..data.pairs import REFERENCE_COLUMNS, PairBatch, collate_pairs, convert_pairs, pair_arrays
from ..data.preference import ID_COLUMNS, prepare_preference
from ..data.prepare import prepare_tokenizer
from ..errors import SettingError
from ..models.load import LoadedModel
from ..settings.config_tables import DPO_TABLE
from ..settings.plan import DataPlan, PairLossPlan, TrainPlan
from ..training.inputs import HostInputs, make_host_inputs
from ..training.pairs import PairObjective
from ..training.router import Routers
from ..training.weighting import ByMicroBatch
from .never_called import NEVER_CALLED
from .recipe import Recipe, Row

_LOSS = "the loss is compiled here: choose it in DPOConfig (loss_type, loss_weights, beta, f_divergence_type, …)"
_REFERENCE = "DPOConfig(precompute_ref_log_probs=True), or MLXDPOTrainer(ref_model=…)"
_ROWS = "prepare the rows before: train_dataset=…, data_collator=…"
_OWN = {
    # trl 1.16 ``DPOTrainer``, and what older releases had.
    **dict.fromkeys(
        ("_compute_loss", "dpo_loss", "concatenated_forward", "get_batch_logps", "get_batch_loss_metrics"), _LOSS
    ),
    **dict.fromkeys(("compute_ref_log_probs", "_precompute_ref_logps", "compute_reference_log_probs"), _REFERENCE),
    **dict.fromkeys(("tokenize_row", "process_row", "concatenated_inputs"), _ROWS),
}


class PairRows:
    """Rows of ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, prepared and collated as trl 1.16 does."""

    signature_columns: tuple[str, ...] | None = (*ID_COLUMNS, *REFERENCE_COLUMNS)
    reads_tokenizer = True
    shaped = False
    odd_labels = True

    def prepare_tokenizer(self, tokenizer: Any, plan: DataPlan) -> Any:
        return prepare_tokenizer(tokenizer, plan)

    def prepare(self, dataset: Any, tokenizer: Any, plan: DataPlan, *, name: str, packing: bool, **options: Any) -> Any:
        return prepare_preference(dataset, tokenizer, plan, name=name)

    def prepare_eval(self, dataset: Any, tokenizer: Any, plan: DataPlan, *, like: Any, **options: Any) -> Any:
        if isinstance(dataset, Mapping):
            return {name: prepare_preference(rows, tokenizer, plan, name=name) for name, rows in dataset.items()}
        return prepare_preference(dataset, tokenizer, plan, name="eval")

    def view(self, dataset: Any, columns: Sequence[str]) -> Any:
        return dataset

    def lengths(self, dataset: Any, column: str, tokenizer: Any, *, keep_columns: bool) -> list[int]:
        raise SettingError(
            "train_sampling_strategy='group_by_length'",
            "another order: pairs have no length of their own",
            "DPOConfig(train_sampling_strategy='random')",
        )

    def collate(self, rows: Sequence[Row], tokenizer: Any, plan: DataPlan, *, padding_free: bool) -> PairBatch:
        return collate_pairs(
            rows,
            pad_token_id=tokenizer.pad_token_id,
            max_length=plan.max_length,
            truncation_mode=plan.truncation_mode,
            pad_to_multiple_of=plan.pad_to_multiple_of,
        )

    def convert(self, collated: Mapping[str, Any], pad_token_id: int) -> PairBatch:
        return convert_pairs(collated)

    def lay_out(self, batch: PairBatch, pad_token_id: int, shapes: Any, *, limit: int | None) -> HostInputs:
        laid = make_host_inputs(batch, pad_token_id, None, limit=limit)
        return replace(laid, arrays=laid.arrays | pair_arrays(batch, laid.arrays["input_ids"].shape[1]))


def default_args(model: str) -> Any:
    """TRL's default configuration for a model of this name."""
    from trl import DPOConfig

    return DPOConfig(f"{str(model).rstrip('/').split('/')[-1]}-DPO")


def pair_objective(
    loaded: LoadedModel, names: Iterable[str], plan: TrainPlan, routers: Routers | None
) -> PairObjective:
    """The policy's losses; the trainer adds the reference."""
    assert isinstance(plan.loss, PairLossPlan)
    return PairObjective(loaded, names, plan.loss, routers)


def by_micro_batch(loaded: LoadedModel) -> ByMicroBatch:
    """Each micro-batch of a window weighs the same."""
    return ByMicroBatch()


def log_pair_metrics(means: Mapping[str, float], num_tokens: float) -> dict[str, float]:
    """In trl 1.16's order: the counter of tokens follows the entropy."""
    entry: dict[str, float] = {}
    for name, value in means.items():
        entry[name] = value
        if name == "entropy":
            entry["num_tokens"] = num_tokens
    return entry


DPO = Recipe(
    name="MLXDPOTrainer",
    config=DPO_TABLE,
    make_args=default_args,
    rows=PairRows(),
    make_objective=pair_objective,
    make_weighting=by_micro_batch,
    make_routers=Routers.attach,
    log_metrics=log_pair_metrics,
    never_called={**NEVER_CALLED, **_OWN},
    tags=("generated_from_trainer", "trl", "dpo", "hf-mlx"),
    method="DPO",
)
