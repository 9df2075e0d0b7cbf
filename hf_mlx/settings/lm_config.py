"""``transformers.TrainingArguments`` by itself: how rows and loss of ``transformers.Trainer`` are resolved from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .plan import DataPlan, LossPlan
from .run_plan import resolve_loss
from .sft_config import MODEL_INIT_KWARGS
from .verdicts import Rule, honour, ignore, refuse

# Not fields of TrainingArguments: what a model that is named by a string is loaded with. transformers 5.23 loads in
# the checkpoint's own dtype.
LM_CONFIG: tuple[Rule, ...] = (
    replace(MODEL_INIT_KWARGS, default={"dtype": "auto"}),
    honour("trust_remote_code", False, "not a field of TrainingArguments"),
    # Fields of Seq2SeqTrainingArguments, whose trainer scripts use for causal language models too.
    refuse("predict_with_generate", False, "generates in evaluation", write="predict_with_generate=False"),
    *(
        ignore(field, default, "is read with predict_with_generate alone")
        for field, default in (
            ("sortish_sampler", False),
            ("generation_max_length", None),
            ("generation_num_beams", None),
            ("generation_config", None),
        )
    ),
)


def resolve_rows(values: Mapping[str, Any]) -> DataPlan:
    """Rows are taken as they are."""
    return DataPlan(max_length=None, skip_prepare_dataset=True, seed=int(values["seed"]))


def resolve_language_loss(values: Mapping[str, Any]) -> LossPlan:
    """The model's own loss, or ``LabelSmoother``'s."""
    loss = resolve_loss({**values, "loss_type": "nll", "router_aux_loss_coef": None})
    return replace(loss, divides_by_none=True)
