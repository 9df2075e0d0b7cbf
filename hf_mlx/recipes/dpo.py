"""trl's ``DPOTrainer``: pairs of answers, a policy and its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..data.batch import IGNORE
from ..data.buckets import pad_batch
from ..data.documents import counted_lengths
from ..data.layout import shift_labels
from ..data.order import count_tokens
from ..data.pairs import REFERENCE_COLUMNS, PairBatch, collate_pairs, convert_pairs, pair_arrays
from ..data.preference import ID_COLUMNS, prepare_preference
from ..data.prepare import prepare_tokenizer
from ..data.prompts import SharedPrompts, pair_width, scored_shape, share_prompts
from ..errors import SettingError
from ..models.load import LoadedModel
from ..settings.config_tables import DPO_TABLE
from ..settings.plan import DataPlan, PairLossPlan, TrainPlan
from ..training.inputs import HostInputs, gather_scored
from ..training.pairs import PairObjective
from ..training.router import Routers
from ..training.weighting import ByMicroBatch
from .never_called import NEVER_CALLED
from .recipe import Paper, Recipe, Row

_LOSS = "the loss is compiled here: choose it in DPOConfig(loss_type=…, loss_weights=…, beta=…, f_divergence_type=…)"
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


class TwoAnswers:
    """What rows of a chosen and a rejected answer have in common, whatever is made of them.

    Attributes:
        prepare_rows: Prepares a set of rows, called with the rows, the tokenizer, the plan and ``name``.
    """

    reads_tokenizer = True
    shaped = False
    odd_labels = True
    prepare_rows: Callable[..., Any]

    def prepare_tokenizer(self, tokenizer: Any, plan: DataPlan) -> Any:
        return prepare_tokenizer(tokenizer, plan)

    def prepare(self, dataset: Any, tokenizer: Any, plan: DataPlan, *, name: str, packing: bool, **options: Any) -> Any:
        return self.prepare_rows(dataset, tokenizer, plan, name=name)

    def prepare_eval(self, dataset: Any, tokenizer: Any, plan: DataPlan, *, like: Any, **options: Any) -> Any:
        if isinstance(dataset, Mapping):
            return {name: self.prepare_rows(rows, tokenizer, plan, name=name) for name, rows in dataset.items()}
        return self.prepare_rows(dataset, tokenizer, plan, name="eval")

    def view(self, dataset: Any, columns: Sequence[str]) -> Any:
        return dataset


class PairRows(TwoAnswers):
    """Rows of ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, prepared and collated as trl 1.16 does."""

    signature_columns: tuple[str, ...] | None = (*ID_COLUMNS, *REFERENCE_COLUMNS)
    prepare_rows = staticmethod(prepare_preference)

    def lengths(self, dataset: Any, column: str, tokenizer: Any, *, keep_columns: bool) -> list[int]:
        raise SettingError(
            "train_sampling_strategy='group_by_length'",
            "another order: pairs have no length of their own",
            "DPOConfig(train_sampling_strategy='random')",
        )

    def extent(self, dataset: Any, examples: int, plan: DataPlan) -> tuple[int, int]:
        longest = plan.max_length or 1024
        if hasattr(dataset, "__len__"):
            prompts, *answers = (count_tokens(dataset, column) for column in ID_COLUMNS)
            found = max(prompt + max(pair) for prompt, *pair in zip(prompts, *answers, strict=True))
            longest = found if plan.max_length is None else min(found, plan.max_length)
        return 2 * examples, pair_width(longest, 2 * examples)

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
        shared = share_prompts(batch, pad_token_id, limit) if shapes is not None and shapes.share else None
        return _lay_whole(batch, pad_token_id, limit) if shared is None else _lay_shared(batch, shared)


def _lay_whole(batch: PairBatch, pad_token_id: int, limit: int | None) -> HostInputs:
    rows, longest = len(batch.lengths), int(batch.lengths.max())
    # Where the model has a table of positions, rows beyond it stay as they are, and are refused elsewhere.
    padded = pad_batch(batch, pair_width(longest, rows, limit), pad_token_id)
    targets = shift_labels(padded.labels)
    arrays = {"input_ids": padded.input_ids, "lengths": counted_lengths(batch)}
    arrays |= {"width": np.array(batch.input_ids.shape[1], np.float32)}
    arrays |= gather_scored(targets, scored_shape(targets)) | pair_arrays(batch, targets)
    return _host_inputs(batch, arrays, int(batch.lengths.sum()))


def _lay_shared(batch: PairBatch, shared: SharedPrompts) -> HostInputs:
    arrays = {name: getattr(shared, name) for name in ("input_ids", "offsets", "slots", "splits", "rejected")}
    arrays |= gather_scored(shared.targets, scored_shape(shared.targets)) | pair_arrays(
        batch, shared.targets, shared.splits
    )
    return _host_inputs(batch, arrays, shared.tokens)


def _host_inputs(batch: PairBatch, arrays: dict[str, np.ndarray], held: int) -> HostInputs:
    valid, labelled = int((batch.labels[:, 1:] != IGNORE).sum()), int((batch.labels != IGNORE).sum())
    chosen, padding = int((batch.labels[::2, 1:] != IGNORE).sum()), arrays["input_ids"].size - held
    return HostInputs(arrays, valid, batch.num_tokens, padding, labelled, chosen=chosen, pairs=batch.examples)


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


_TITLE = "Direct Preference Optimization: Your Language Model is Secretly a Reward Model"
_PAPER = Paper(
    title=_TITLE,
    number="2305.18290",
    citation=f"""@inproceedings{{rafailov2023direct,
    title     = {{{{{_TITLE}}}}},
    author    = {{Rafael Rafailov and Archit Sharma and Eric Mitchell and Christopher D. Manning and Stefano Ermon
                 and Chelsea Finn}},
    year      = 2023,
    booktitle = {{Advances in Neural Information Processing Systems 36}},
    url       = {{https://huggingface.co/papers/2305.18290}},
}}""",
)

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
    paper=_PAPER,
    trains_together=True,
)
