"""``transformers.Trainer`` for causal language models: rows as they are, the model's own loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..data.batch import Batch
from ..data.masked import convert_masked
from ..data.order import longest_row
from ..data.plain import row_lengths, take_rows, view_columns
from ..data.prepare import Prepared
from ..data.shapes import Shapes
from ..models.load import LoadedModel
from ..settings.config_tables import LM_TABLE
from ..settings.plan import DataPlan, LossPlan, TrainPlan
from ..training.inputs import HostInputs, make_host_inputs
from ..training.language import ByTrainer, LanguageObjective
from ..training.router import Routers
from .never_called import NEVER_CALLED
from .recipe import Recipe, Row


class PlainRows:
    """Rows that a collator makes batches of, whatever they are."""

    # Those of the model's forward.
    signature_columns: tuple[str, ...] | None = None
    reads_tokenizer = False
    shaped = True
    odd_labels = False

    def prepare_tokenizer(self, tokenizer: Any, plan: DataPlan) -> Any:
        return tokenizer

    def prepare(self, dataset: Any, tokenizer: Any, plan: DataPlan, *, name: str, packing: bool, **options: Any) -> Any:
        return take_rows(dataset, name)

    def prepare_eval(self, dataset: Any, tokenizer: Any, plan: DataPlan, *, like: Prepared, **options: Any) -> Any:
        if isinstance(dataset, Mapping):
            return {name: take_rows(part, name) for name, part in dataset.items()}
        return take_rows(dataset, "eval")

    def view(self, dataset: Any, columns: Sequence[str]) -> Any:
        return view_columns(dataset, columns)

    def lengths(self, dataset: Any, column: str, tokenizer: Any, *, keep_columns: bool) -> list[int]:
        names = getattr(tokenizer, "model_input_names", None) or ["input_ids"]
        return row_lengths(dataset, column, names[0])

    def extent(self, dataset: Any, examples: int, plan: DataPlan) -> tuple[int, int]:
        return examples, longest_row(dataset, plan.max_length or 1024)

    def collate(self, rows: Sequence[Row], tokenizer: Any, plan: DataPlan, *, padding_free: bool) -> Batch:
        return convert_masked(default_collator(tokenizer)(rows))

    def convert(self, collated: Mapping[str, Any], pad_token_id: int) -> Batch:
        return convert_masked(collated)

    def lay_out(self, batch: Batch, pad_token_id: int, shapes: Shapes | None, *, limit: int | None) -> HostInputs:
        return make_host_inputs(batch, pad_token_id, shapes, limit=limit)


def default_collator(tokenizer: Any) -> Any:
    """What ``transformers.Trainer`` collates with where no collator is given (5.23 ``Trainer.__init__``)."""
    from transformers import DataCollatorWithPadding, default_data_collator
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    padded = isinstance(tokenizer, PreTrainedTokenizerBase)
    return DataCollatorWithPadding(tokenizer) if padded else default_data_collator


def default_args(model: str) -> Any:
    """transformers' default configuration."""
    from transformers import TrainingArguments

    return TrainingArguments(output_dir="tmp_trainer")


def language_objective(
    loaded: LoadedModel, names: Iterable[str], plan: TrainPlan, routers: Routers | None
) -> LanguageObjective:
    """Next-token prediction, as the model itself defines it."""
    assert isinstance(plan.loss, LossPlan)
    return LanguageObjective(loaded, names, plan.loss, routers)


def by_trainer(loaded: LoadedModel) -> ByTrainer:
    """As ``transformers.Trainer`` divides."""
    return ByTrainer(accepts_loss_kwargs=loaded.accepts_loss_kwargs, counts_every_label=loaded.counts_every_label)


def model_routers(loaded: LoadedModel, plan: LossPlan) -> Routers | None:
    """The routers whose loss the model adds to its own: where its config says ``output_router_logits``."""
    config = loaded.config.get("text_config") or loaded.config
    if not config.get("output_router_logits") or plan.label_smoothing_factor:
        return None
    return Routers.attach(loaded, replace(plan, router_aux_loss_coef=None))


def log_nothing(means: Mapping[str, float], num_tokens: float) -> dict[str, float]:
    """``transformers.Trainer`` logs the loss alone."""
    return {}


LM = Recipe(
    name="MLXTrainer",
    config=LM_TABLE,
    make_args=default_args,
    rows=PlainRows(),
    make_objective=language_objective,
    make_weighting=by_trainer,
    make_routers=model_routers,
    log_metrics=log_nothing,
    never_called=NEVER_CALLED,
    tags=("generated_from_trainer", "hf-mlx"),
    method="transformers' Trainer",
    writes_router_settings=False,
    trains_together=True,
    splits_model=True,
)
