"""Datasets of a run: prepared rows, and the micro-batches that the step is fed with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from .data.collate import Batch
from .data.fitting import SAMPLE, fit_shapes
from .data.generator import TorchGenerator
from .data.guard import Guard
from .data.loader import RowLoader, StreamLoader, make_loader, read_ahead
from .data.masked import check_labelled
from .data.order import Share, Steps, count_batched_steps, count_steps, epoch_order, group_by_length
from .data.own_loader import OwnLoader
from .data.prepare import Prepared
from .data.process_generator import ProcessGenerator
from .data.shapes import Shapes
from .data.tables import Tables
from .errors import DataError, SettingError
from .processes.world import the_world
from .recipes.collation import Collation
from .recipes.recipe import Recipe
from .settings.plan import TrainPlan
from .settings.run_plan import check_split
from .training.inputs import HostInputs, Inputs

logger = logging.getLogger(__name__)

Loader = RowLoader | StreamLoader | OwnLoader


class Feed:
    """Prepared datasets and the loaders over them.

    Args:
        plan: The whole plan.
        tokenizer: Already prepared (eos, pad and chat template resolved).
        recipe: How its rows are prepared, collated and laid out.
        collator: The user's ``data_collator``, or None.
        formatting_func: Row to text, or None.
        keep_columns: Hand every column to the user's collator (``remove_unused_columns=False``).
        signature_columns: Those of the model's forward, for a recipe that goes by them.
        tables: Ids and positions that the model can embed; ids may be more than the tokenizer knows.

    Attributes:
        share: The part of every set that this process reads; None for one process, which reads all.
        collation: Rows to batches, by the user's collator where there is one.
        share_rows: Documents may share a row of the computation; True once the model is known to keep them apart.
        columns: Those of a row that a collator gets when ``remove_unused_columns`` is on.
    """

    def __init__(
        self,
        plan: TrainPlan,
        tokenizer: Any,
        recipe: Recipe,
        *,
        collator: Callable | None = None,
        formatting_func: Callable | None = None,
        keep_columns: bool = False,
        signature_columns: Sequence[str] = (),
        tables: Tables | None = None,
    ) -> None:
        self.plan = plan
        self.tokenizer = tokenizer
        self._rows, self._name = recipe.rows, recipe.name
        self._guard = Guard(tables, tokenizer, plan.data, collated=collator is not None)
        self._limit = tables.positions if tables is not None else None
        self._options: dict[str, Any] = {"formatting_func": formatting_func, "tables": self._guard.rows}
        self._options["keep_columns"] = keep_columns and collator is not None
        self._keep_columns = keep_columns
        self.columns: tuple[str, ...] = recipe.rows.signature_columns or tuple(signature_columns)
        self.rng = ProcessGenerator(plan.batch.seed)
        world, batch = the_world().sharing, plan.batch
        self.share = None if world.is_alone else Share(world.rank, world.size, batch.split_batches)
        self.share_rows = self._has_own_loader = False
        own: dict[str, Any] = {"collator": collator, "columns": self.columns, "keep_columns": keep_columns}
        self.collation = Collation(self._rows, self._guard, tokenizer, plan.data, **own)

    def prepare_train(self, dataset: Any) -> Any:
        """``dataset`` as the upstream trainer's ``train_dataset``."""
        self._train = self._rows.prepare(
            dataset, self.tokenizer, self.plan.data, name="train", packing=self.plan.data.packing, **self._options
        )
        logger.info(self._train.report.describe())
        self._check(self._train, "train", self.plan.batch.train_batch_size)
        return self._train.dataset

    def prepare_eval(self, dataset: Any) -> Any:
        """The same for an evaluation dataset, or a dict of them."""
        if dataset is None:
            return None
        prepared = self._rows.prepare_eval(dataset, self.tokenizer, self.plan.data, like=self._train, **self._options)
        named = prepared if isinstance(prepared, dict) else {"eval": prepared}
        for name, part in named.items():
            self._check(part, name, self.plan.batch.eval_batch_size)
        if isinstance(prepared, dict):
            return {name: part.dataset for name, part in prepared.items()}
        return prepared.dataset

    def refuse_blind_targets(self) -> None:
        """From now on refuse labels that are predicted from a position that sees no key."""
        self._guard.refuses_blind = True

    @property
    def collator(self) -> Callable | None:
        """The user's ``data_collator``, or None."""
        return self.collation.collator

    @property
    def is_padding_free(self) -> bool:
        """Whether batches are collated into one row of documents."""
        return self._train.padding_free

    @property
    def is_completion_only(self) -> bool:
        """Whether prompts are left out of the loss."""
        return bool(self._train.completion_only)

    def adopt_plan(self, plan: TrainPlan) -> None:
        """Go on under ``plan``, whose data settings are the same; the run's generator stays where it is."""
        self.plan = plan
        self._forget_shapes()

    def adopt_collator(self, collator: Callable) -> None:
        """Make batches with ``collator`` from now on.

        Raises:
            SettingError: It would get the rows' own columns, which preparation has taken away.
        """
        if self._keep_columns and self.collator is None and not self.plan.data.skip_prepare_dataset:
            raise SettingError(
                "trainer.data_collator set on a trainer with remove_unused_columns=False and no collator before",
                "the rows' own columns, which are kept for a collator that the constructor knows",
                f"{self._name}(..., data_collator=my_collator)",
            )
        self.collation.collator = collator
        self._guard.adopt_collator()
        self._forget_shapes()

    def adopt_loader(self, loader: Any, method: str, *, training: bool = True) -> OwnLoader:
        """Read batches from a loader that the script made.

        Args:
            loader: A torch ``DataLoader``, or another iterable of dicts of tensors.
            method: The trainer's, that it comes from.
            training: Its batches are trained on, so the run's shapes are not known before.
        """
        if training and not self._has_own_loader:
            self._has_own_loader = True
            self._forget_shapes()
        return OwnLoader(loader, self.collation.convert, self.rng, method)

    def adopt_train(self, dataset: Any) -> Any:
        """Take ``dataset`` for the train dataset as it is, as trl does with one that is assigned.

        Raises:
            DataError: Its rows are not tokens.
        """
        prepared = self._take(dataset, "train", self.plan.batch.train_batch_size)
        self._train = replace(prepared, completion_only=self._train.completion_only)
        self._forget_shapes()
        return prepared.dataset

    def adopt_eval(self, dataset: Any) -> Any:
        """The same for an evaluation dataset, a dict of them, or None."""
        if dataset is None:
            return None
        rows = self.plan.batch.eval_batch_size
        if isinstance(dataset, Mapping):
            return {name: self._take(part, name, rows).dataset for name, part in dataset.items()}
        return self._take(dataset, "eval", rows).dataset

    def _take(self, dataset: Any, name: str, batch_size: int) -> Prepared:
        data = replace(self.plan.data, skip_prepare_dataset=True)
        prepared = self._rows.prepare(dataset, self.tokenizer, data, name=name, packing=False)
        columns = getattr(prepared.dataset, "column_names", None)
        first = self.columns[0]
        if columns is not None and first not in columns and not (self.collator and self._keep_columns):
            which = "train_dataset" if name == "train" else "eval_dataset"
            raise DataError(
                f"trainer.{which} = rows with the columns {sorted(columns)}",
                f"rows with {first}: a dataset that is assigned is not prepared (by trl neither)",
                f"pass it to the constructor: {self._name}(..., {which}=rows)",
            )
        self._guard.dataset(
            prepared.dataset,
            name,
            batch_size,
            padding_free=self._train.padding_free,
            as_is="input_ids" in (columns or ()),
        )
        return prepared

    def _forget_shapes(self) -> None:
        self.__dict__.pop("shapes", None)

    def _check(self, prepared: Prepared, name: str, batch_size: int) -> None:
        self._guard.dataset(prepared.dataset, name, batch_size, padding_free=self._train.padding_free)

    def train_loader(self, dataset: Any, rng: TorchGenerator | None = None) -> RowLoader | StreamLoader:
        """Micro-batches of a prepared set, in transformers' order; ``rng`` None is the run's."""
        plan, dataset = self.plan.batch, self._view(dataset)
        lengths = self._row_lengths(dataset) if plan.sampling == "group_by_length" else None
        rng = rng or self.rng
        # What torch was last seeded with when the loader is made: args.seed, unless the script has seeded it since.
        seed = rng.get_state()["initial_seed"] if plan.data_seed is None else plan.data_seed

        def order(epoch: int) -> Any:
            return epoch_order(len(dataset), plan, epoch, seed=seed, lengths=lengths, global_rng=rng)

        return self._load(dataset, plan.train_batch_size, order)

    def _load(self, dataset: Any, batch_size: int, order: Callable[[int], Any] | None) -> RowLoader | StreamLoader:
        """This process's micro-batches of a set."""
        drop_last = self.plan.batch.drop_last
        return make_loader(dataset, batch_size, self.collate, order=order, drop_last=drop_last, share=self.share)

    def eval_loader(self, dataset: Any) -> RowLoader | StreamLoader:
        """Micro-batches from first to last; grouped by length when training is (as upstream)."""
        plan, dataset = self.plan.batch, self._view(dataset)
        check_split(plan, "eval", plan.eval_batch_size)
        self.rng.seed_int64()  # opening a torch dataloader draws once, and later orders may depend on it
        if plan.sampling != "group_by_length" or not hasattr(dataset, "__len__"):
            return self._load(dataset, plan.eval_batch_size, None)
        lengths = self._row_lengths(dataset)
        seed = plan.seed if plan.data_seed is None else plan.data_seed

        def order(_: int) -> Any:
            return group_by_length(lengths, plan.eval_batch_size, TorchGenerator(seed))

        return self._load(dataset, plan.eval_batch_size, order)

    def inputs(self, batch: Batch, *, keep_rows: bool = False) -> Inputs:
        """``batch`` as device arrays, in one of the run's shapes.

        Args:
            batch: Of one of the loaders.
            keep_rows: Leave the rows as the collator made them, for logits that someone will look at.
        """
        shapes = None if keep_rows or self.collation.keeps_batches else self.shapes
        return self._rows.lay_out(batch, self._guard.fill_id, shapes, limit=self._limit).to_device()

    def train_batches(self, loader: Loader, epoch: int, skip: int) -> Iterator[tuple[Batch, HostInputs]]:
        """The micro-batches of an epoch without the first ``skip``, laid into rows.

        They are made on another thread while the device computes, a window ahead: where nobody would notice, so not
        those of a stream, nor of a user's collator, which may draw random numbers.
        """
        fill_id, limit, keeps = self._guard.fill_id, self._limit, self.collation.keeps_batches
        batches = loader.batches(epoch, skip=skip)
        batches = batches if keeps else map(check_labelled, batches)
        shapes = None if keeps else self.shapes
        laid = ((batch, self._rows.lay_out(batch, fill_id, shapes, limit=limit)) for batch in batches)
        if keeps:
            return ((batch, replace(inputs, batch=batch)) for batch, inputs in laid)
        if self.collator is not None or not isinstance(loader, RowLoader):
            return laid
        return read_ahead(laid, self.plan.batch.gradient_accumulation_steps)

    def _row_lengths(self, dataset: Any) -> list[int]:
        column = self.plan.batch.length_column_name
        return self._rows.lengths(dataset, column, self.tokenizer, keep_columns=self._keep_columns)

    @cached_property
    def shapes(self) -> Shapes:
        """The shapes of the run; the same for the same dataset and batch size, so for a resumed run too."""
        dataset = self._train.dataset
        # A user's collator or loader may draw random numbers, and a stream cannot be looked ahead into.
        own = self.collator is not None or self._has_own_loader
        if own or not self._rows.shaped or not hasattr(dataset, "__len__"):
            return Shapes(share=self.share_rows, limit=self._limit)
        # A generator of its own leaves the run's order alone.
        loader = self.train_loader(dataset, TorchGenerator(self.plan.batch.seed))
        assert isinstance(loader, RowLoader)
        # Every process sees the same sample, and so chooses the same shapes.
        loader.share, loader.batch_size = None, self.plan.batch.own_batch_size
        return fit_shapes(loader.sample(SAMPLE), share=self.share_rows, limit=self._limit)

    def count_steps(self, dataset: Any) -> Steps:
        """Batches, updates and steps of a run over ``dataset``."""
        return count_steps(len(dataset) if hasattr(dataset, "__len__") else None, self.plan.batch)

    def count_loader_steps(self, loader: OwnLoader) -> Steps:
        """The same for a loader that the script made; one without a length counts as a stream."""
        batches = loader.batches_per_epoch
        return count_steps(None, self.plan.batch) if batches is None else count_batched_steps(batches, self.plan.batch)

    def _view(self, dataset: Any) -> Any:
        return dataset if self._keep_columns else self._rows.view(dataset, self.columns)

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """Prepared rows as a micro-batch, by the user's collator where there is one."""
        return self.collation(rows, padding_free=self._train.padding_free)
