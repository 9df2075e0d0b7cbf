"""trl's ``SFTTrainer``: rows in trl's formats, next-token loss over the tokens of a window."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..data.batch import Batch
from ..data.collate import collate, convert_batch
from ..data.order import count_tokens, longest_row
from ..data.prepare import Prepared, prepare, prepare_eval, prepare_tokenizer
from ..data.shapes import Shapes
from ..models.load import LoadedModel
from ..settings.config_tables import SFT_TABLE
from ..settings.plan import DataPlan, LossPlan, TrainPlan
from ..training.inputs import HostInputs, make_host_inputs
from ..training.objective import TokenObjective
from ..training.router import Routers
from ..training.weighting import ByTokens
from .never_called import NEVER_CALLED
from .recipe import Recipe, Row


class SFTRows:
    """Rows of ``input_ids`` and ``labels``, prepared and collated as trl 1.16 does."""

    # What trl keeps of a prepared row when remove_unused_columns is on.
    signature_columns: tuple[str, ...] | None = ("input_ids", "labels", "seq_lengths")
    reads_tokenizer = True
    shaped = True
    odd_labels = True

    def prepare_tokenizer(self, tokenizer: Any, plan: DataPlan) -> Any:
        return prepare_tokenizer(tokenizer, plan)

    def prepare(self, dataset: Any, tokenizer: Any, plan: DataPlan, *, name: str, packing: bool, **options: Any) -> Any:
        return prepare(dataset, tokenizer, plan, name=name, packing=packing, **options)

    def prepare_eval(self, dataset: Any, tokenizer: Any, plan: DataPlan, *, like: Prepared, **options: Any) -> Any:
        return prepare_eval(dataset, tokenizer, plan, like=like, **options)

    def view(self, dataset: Any, columns: Sequence[str]) -> Any:
        return dataset

    def lengths(self, dataset: Any, column: str, tokenizer: Any, *, keep_columns: bool) -> list[int]:
        # transformers looks for the column once it has removed those that the model does not take.
        if keep_columns and column in dataset.column_names:
            return list(dataset[column])
        return count_tokens(dataset)

    def extent(self, dataset: Any, examples: int, plan: DataPlan) -> tuple[int, int]:
        return examples, longest_row(dataset, plan.max_length or 1024)

    def collate(self, rows: Sequence[Row], tokenizer: Any, plan: DataPlan, *, padding_free: bool) -> Batch:
        if not padding_free:
            # Upstream's collator reads where documents begin for padding-free batches alone.
            rows = [{key: value for key, value in row.items() if key != "seq_lengths"} for row in rows]
        return collate(
            rows,
            pad_token_id=tokenizer.pad_token_id,
            padding_free=padding_free,
            pad_to_multiple_of=plan.pad_to_multiple_of,
        )

    def convert(self, collated: Mapping[str, Any], pad_token_id: int) -> Batch:
        return convert_batch(collated)

    def lay_out(self, batch: Batch, pad_token_id: int, shapes: Shapes | None, *, limit: int | None) -> HostInputs:
        return make_host_inputs(batch, pad_token_id, shapes, limit=limit)


def default_args(model: str) -> Any:
    """TRL's default configuration for a model of this name; without trl, transformers'."""
    name = f"{str(model).rstrip('/').split('/')[-1]}-SFT"
    try:
        from trl import SFTConfig as Arguments
    except ImportError:
        from transformers import TrainingArguments as Arguments
    return Arguments(name)


def token_objective(
    loaded: LoadedModel, names: Iterable[str], plan: TrainPlan, routers: Routers | None
) -> TokenObjective:
    """Next-token prediction."""
    assert isinstance(plan.loss, LossPlan)
    return TokenObjective(loaded, names, plan.loss, routers)


def by_tokens(loaded: LoadedModel) -> ByTokens:
    """Each token of a window weighs the same, where the HF class is told how many there are."""
    return ByTokens(accepts_loss_kwargs=loaded.accepts_loss_kwargs, counts_every_label=loaded.counts_every_label)


def log_token_metrics(means: Mapping[str, float], num_tokens: float) -> dict[str, float]:
    """In trl 1.16's order: the routers' loss comes last."""
    routers = {name: value for name, value in means.items() if name == "aux_loss"}
    return {name: value for name, value in means.items() if name not in routers} | {"num_tokens": num_tokens} | routers


SFT = Recipe(
    name="MLXSFTTrainer",
    config=SFT_TABLE,
    make_args=default_args,
    rows=SFTRows(),
    make_objective=token_objective,
    make_weighting=by_tokens,
    make_routers=Routers.attach,
    log_metrics=log_token_metrics,
    never_called=NEVER_CALLED,
    tags=("generated_from_trainer", "sft", "trl", "hf-mlx"),
    method="SFT",
    trains_together=True,
    splits_model=True,
)
