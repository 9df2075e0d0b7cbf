"""The model to train, as it was handed to the constructor: a name, or a torch object. Each knows its own way in."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import mlx.core as mx

from ..data.tables import Tables
from ..errors import SettingError
from ..models.alterations import check_alterations
from ..models.bridge import TorchModel, is_torch_model, load_torch_model, model_dtype
from ..models.load import LoadedModel, open_model
from ..models.padding_row import torch_padding_row
from ..models.read_ahead import read_ahead
from ..models.source import resolve_folder
from ..models.tokenizer import load_tokenizer, mirror_tokens
from ..recipes.recipe import Recipe
from ..session import Session
from ..settings.ledger import Ledger
from ..settings.plan import TrainPlan
from ..settings.resolve import resolve_plan
from .base_settings import drop_init_kwargs, read_peft_config, read_tables
from .facade import MLXCausalLM
from .handover import Handover
from .loans import take_over_loans
from .scored import make_facade
from .signature import forward_columns, named_forward
from .ties import Tied
from .upstream import upstream_trainer


class Base(Protocol):
    """What the trainer asks of a model, in this order.

    Attributes:
        name: Hub id, folder or class, for people.
        is_copied: Whether a copy is trained, and :meth:`write_back` has something to do.
    """

    name: str
    is_copied: bool

    def resolve(self, args: Any, peft_config: Any, **options: Any) -> tuple[TrainPlan, Ledger]:
        """:func:`~hf_mlx.settings.resolve.resolve_plan`, with what the model itself decides."""
        ...

    def find(self, *, tokenizer: bool) -> None:
        """Find the files: for a hub id the one time that a run asks the hub.

        Args:
            tokenizer: Whether :meth:`read_tokenizer` will be called.

        Raises:
            ModelError: They cannot be found.
        """
        ...

    def reading_ahead(self) -> AbstractContextManager[None]:
        """A block beside which weights are read."""
        ...

    def read_tokenizer(self) -> Any:
        """The model's own tokenizer."""
        ...

    def open(self) -> Tables:
        """Check what can be checked without reading weights.

        Returns:
            What the model can embed, where its config says so.

        Raises:
            ModelError: It would not load right.
        """
        ...

    def columns(self) -> tuple[str, ...]:
        """Columns of a row that the model's forward takes."""
        ...

    def enter(self, args: Any, peft_config: Any, tokenizer: Any, recipe: Recipe) -> tuple[Session, Any]:
        """The session that trains it, and what ``trainer.model`` is."""
        ...

    def write_back(self) -> None:
        """Bring what was trained since the last call into the user's object."""
        ...

    def take_over(self, event: str) -> None:
        """Train on from what was written into the weights that were handed out.

        Args:
            event: The callbacks' event that has just been; empty between two.

        Raises:
            TrainingError: Something was written that the run cannot go on from.
        """
        ...

    def parameters(self, paths: Iterable[str]) -> list[Any]:
        """The trained parameters at these MLX paths, as the model shows them."""
        ...

    def lend_gradients(self, grads: dict[str, mx.array]) -> None:
        """Let ``p.grad`` of the model's parameters be these, by MLX name."""
        ...

    def take_gradients(self) -> dict[str, mx.array]:
        """End the loan; by MLX name, what was written into the gradients."""
        ...

    def tie(self, parameters: list[Any]) -> Tied:
        """Ties between parameters of a torch optimizer and what is trained; and those that are not the model's."""
        ...

    def decayed_names(self, session: Session) -> list[str]:
        """Names, as ``trainer.model.named_parameters()`` has them, of what weight decay applies to."""
        ...

    def complete(self, folder: Path) -> None:
        """Add to what ``model.save_pretrained(folder)`` wrote what it leaves out."""
        ...


def open_base(model: Any) -> Base:
    """The base of what the user gave as ``model``.

    Raises:
        SettingError: Not a hub id, a folder, a transformers model or a PeftModel.
    """
    if is_torch_model(model):
        return TorchBase(model)
    if isinstance(model, (str, Path)):
        return NamedBase(model)
    raise SettingError(
        f"model of type {type(model).__name__}",
        "a hub id, the path of a model folder, a transformers model or a PeftModel",
        'MLXSFTTrainer(model="HuggingFaceTB/SmolLM2-135M-Instruct", ...)',
    )


class NamedBase:
    """A hub id or a folder."""

    is_copied = False
    _plan: TrainPlan
    _folder: Path
    _loaded: LoadedModel
    _session: Session
    _model: MLXCausalLM

    def __init__(self, name: str | Path) -> None:
        self.name = str(name)

    def resolve(self, args: Any, peft_config: Any, **options: Any) -> tuple[TrainPlan, Ledger]:
        self._plan, ledger = resolve_plan(args, peft_config, **options)
        return self._plan, ledger

    def find(self, *, tokenizer: bool) -> None:
        self._folder = resolve_folder(self.name, self._plan.model)

    def reading_ahead(self) -> AbstractContextManager[None]:
        # A thread does not live through the forks of dataset_num_proc, and those keep the cores busy by themselves.
        return nullcontext() if self._plan.data.dataset_num_proc else read_ahead(self._folder)

    def read_tokenizer(self) -> Any:
        return load_tokenizer(self._folder, self._plan.model)

    def open(self) -> Tables:
        self._loaded = open_model(self._folder, self._plan.model)
        return read_tables(self._loaded.config)

    def columns(self) -> tuple[str, ...]:
        return forward_columns(named_forward(self._loaded.config))

    def enter(self, args: Any, peft_config: Any, tokenizer: Any, recipe: Recipe) -> tuple[Session, Any]:
        self._session = session = Session(self._plan, self._loaded, recipe)
        self._model = make_facade(self._loaded, session.adapter, peft_config, tokenizer, name=self.name)
        self._model.settle = lambda: self.take_over("")
        return session, self._model

    def write_back(self) -> None:
        self.take_over("")

    def take_over(self, event: str) -> None:
        self._model.check_modules(event)
        take_over_loans(self._session, self._model.lent, event)

    def parameters(self, paths: Iterable[str]) -> list[Any]:
        return self._model.parameters_at(paths)

    def lend_gradients(self, grads: dict[str, mx.array]) -> None:
        self._model.gradients.lend(grads)

    def take_gradients(self) -> dict[str, mx.array]:
        return self._model.gradients.take()

    def tie(self, parameters: list[Any]) -> Tied:
        return self._model.tie(parameters)

    def decayed_names(self, session: Session) -> list[str]:
        return [name for name, path in self._model.parameter_paths().items() if path in session.decayed]

    def complete(self, folder: Path) -> None:
        pass


class TorchBase:
    """A transformers model or a PeftModel: trained as it is, and written back into."""

    is_copied = True
    _plan: TrainPlan
    _folder: Path
    _handover: Handover | None = None

    def __init__(self, model: Any) -> None:
        self._source = TorchModel(model)
        self.name = self._source.name

    def resolve(self, args: Any, peft_config: Any, **options: Any) -> tuple[TrainPlan, Ledger]:
        source = self._source
        options["overrides"] = drop_init_kwargs(args, options["overrides"])
        options["quantization_config"] = options["quantization_config"] or source.quantization
        adapter = read_peft_config(source, peft_config, options["finetune_last_n_layers"])
        plan, ledger = resolve_plan(args, adapter, **options)
        # The object's own dtype is trl's rule.
        precision = replace(plan.model.precision, dtype=cast(Any, model_dtype(source)))
        self._plan = replace(plan, model=replace(plan.model, precision=precision))
        return self._plan, ledger

    def find(self, *, tokenizer: bool) -> None:
        if tokenizer:
            self._folder = resolve_folder(self.name, self._plan.model, weights=False)

    def reading_ahead(self) -> AbstractContextManager[None]:
        return nullcontext()

    def read_tokenizer(self) -> Any:
        return load_tokenizer(self._folder, self._plan.model)

    def open(self) -> Tables:
        check_alterations(self._source.model, self._source.base, self._source.adapter)
        found = read_tables(self._source.base.config.to_dict())
        # The table itself, where the script has replaced it behind the config's back.
        embedding = getattr(self._source.base.get_input_embeddings(), "weight", None)
        return found if embedding is None else replace(found, ids=embedding.shape[0])

    def columns(self) -> tuple[str, ...]:
        return forward_columns(self._source.base.forward)

    def enter(self, args: Any, peft_config: Any, tokenizer: Any, recipe: Recipe) -> tuple[Session, Any]:
        source, plan = self._source, self._plan
        if peft_config is not None:
            source.attach(peft_config, plan.batch.seed)
        if recipe.rows.reads_tokenizer:
            mirror_tokens(source.base, tokenizer, eos=plan.data.eos_token is not None)
        loaded = load_torch_model(source, plan.model)
        loaded.decomposed = True
        loaded.padding_row = torch_padding_row(source.base)
        session = Session(plan, loaded, recipe)
        session.adapter_name = source.adapter or session.adapter_name
        # Where transformers' trainer puts a model.
        source.place(args.device)
        self._handover = Handover(source, session)
        return session, source.model

    def write_back(self) -> None:
        if self._handover is not None:
            self._handover.write_back()

    def take_over(self, event: str) -> None:
        if self._handover is not None:
            self._handover.take_over(event)

    def parameters(self, paths: Iterable[str]) -> list[Any]:
        return [] if self._handover is None else self._handover.parameters(paths)

    def lend_gradients(self, grads: dict[str, mx.array]) -> None:
        if self._handover is not None:
            self._handover.lend_gradients(grads)

    def take_gradients(self) -> dict[str, mx.array]:
        return {} if self._handover is None else self._handover.take_gradients()

    def tie(self, parameters: list[Any]) -> Tied:
        assert self._handover is not None, "the model was entered"
        return self._handover.tie(parameters)

    def decayed_names(self, session: Session) -> list[str]:
        # The method looks at the model alone.
        return upstream_trainer().get_decay_parameter_names(cast(Any, None), self._source.model)

    def complete(self, folder: Path) -> None:
        if self._handover is not None:
            self._handover.complete_adapter(folder)
