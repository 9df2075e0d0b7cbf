"""The one object that a trainer hands to what all trainers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..models.load import LoadedModel
from ..settings.config_tables import ConfigTable
from ..settings.plan import TrainPlan
from ..training.objective import Objective
from ..training.router import Routers
from ..training.weighting import Weighting

Row = dict[str, Any]


class RowTable(Protocol):
    """How datasets become micro-batches. Batches are what :meth:`collate` returns; only these functions look inside.

    Attributes:
        signature_columns: Columns of a prepared row that a user's collator gets when ``remove_unused_columns`` is on;
            None for those that the model's forward takes.
        reads_tokenizer: Whether the model's own tokenizer is read where none is given.
        odd_labels: Whether labels below 0 other than -100 pass, as with trl.
        shaped: Whether :meth:`lay_out` reads the shapes of the run, which are chosen from a sample of its batches.
    """

    signature_columns: tuple[str, ...] | None
    reads_tokenizer: bool
    shaped: bool
    odd_labels: bool

    def prepare_tokenizer(self, tokenizer: Any, plan: Any) -> Any:
        """The tokenizer as rows are prepared with."""
        ...

    def prepare(self, dataset: Any, tokenizer: Any, plan: Any, *, name: str, packing: bool, **options: Any) -> Any:
        """A set as it is trained on: a :class:`~hf_mlx.data.prepare.Prepared`."""
        ...

    def prepare_eval(self, dataset: Any, tokenizer: Any, plan: Any, *, like: Any, **options: Any) -> Any:
        """The same for an evaluation set, or a dict of them."""
        ...

    def view(self, dataset: Any, columns: Sequence[str]) -> Any:
        """A prepared set without the columns that are not in ``columns``, as a loader reads it."""
        ...

    def lengths(self, dataset: Any, column: str, tokenizer: Any, *, keep_columns: bool) -> list[int]:
        """Tokens of every row of what :meth:`view` returned; ``column`` may hold them."""
        ...

    def extent(self, dataset: Any, examples: int, plan: Any) -> tuple[int, int]:
        """Rows and their width of the largest micro-batch of ``examples`` of a prepared set, as they are computed."""
        ...

    def collate(self, rows: Sequence[Row], tokenizer: Any, plan: Any, *, padding_free: bool) -> Any:
        """Prepared rows as a batch."""
        ...

    def convert(self, collated: Mapping[str, Any], pad_token_id: int) -> Any:
        """What a user's own collator returned, as a batch."""
        ...

    def lay_out(self, batch: Any, pad_token_id: int, shapes: Any, *, limit: int | None) -> Any:
        """A batch as :class:`~hf_mlx.training.inputs.HostInputs`; ``shapes`` None keeps the rows as they are."""
        ...


@dataclass(frozen=True)
class Paper:
    """Where a method was introduced.

    Attributes:
        title: Its title.
        number: On https://huggingface.co/papers.
        citation: BibTeX.
    """

    title: str
    number: str
    citation: str


@dataclass(frozen=True)
class Recipe:
    """What makes one trainer: its settings, its rows, what it minimises and what it is called.

    Attributes:
        name: The class's name, for remedies: ``MLXSFTTrainer``.
        config: Rules and defaults of its configuration class.
        make_args: Model name -> the configuration where none is given.
        rows: How datasets become micro-batches.
        make_objective: What is minimised, of the model with its adapters attached, the names of what is trained,
            the plan, and the routers whose load is balanced.
        make_weighting: What a micro-batch weighs in its window.
        make_routers: The routers whose load is balanced, of the model and its loss settings.
        log_metrics: What a log entry says beside the loss, in its order: of the means by name, and ``num_tokens``.
        never_called: Methods of the upstream trainer that no step would call, with what to write instead.
        tags: Of the model card.
        method: What the card says it was trained with.
        paper: Where the method was introduced, or None.
        writes_router_settings: Whether the trainer writes the routers' loss into the model's config.
        trains_together: Whether several processes train it with upstream's numbers.
        splits_model: Whether processes that hold one model together train it with one process's numbers.
    """

    name: str
    config: ConfigTable
    make_args: Callable[[str], Any]
    rows: RowTable
    make_objective: Callable[[LoadedModel, Iterable[str], TrainPlan, Routers | None], Objective]
    make_weighting: Callable[[LoadedModel], Weighting]
    make_routers: Callable[[LoadedModel, Any], Routers | None]
    log_metrics: Callable[[Mapping[str, float], float], dict[str, float]]
    never_called: Mapping[str, str]
    tags: tuple[str, ...]
    method: str
    paper: Paper | None = None
    writes_router_settings: bool = True
    trains_together: bool = False
    splits_model: bool = False
