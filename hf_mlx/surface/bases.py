"""The model to train, as it was handed to the constructor: a name, or a torch object. Each knows its own way in."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

from ..data.tables import Tables
from ..errors import SettingError
from ..models.alterations import check_alterations
from ..models.bridge import TorchModel, is_torch_model, load_torch_model, model_dtype
from ..models.load import LoadedModel, open_model
from ..models.positions import learned_positions
from ..models.read_ahead import read_ahead
from ..models.source import resolve_folder
from ..models.tokenizer import load_tokenizer
from ..recipes.recipe import Recipe
from ..session import Session
from ..settings.ledger import Ledger
from ..settings.plan import TrainPlan
from ..settings.resolve import resolve_plan
from .facade import MLXCausalLM
from .handover import Handover
from .loans import take_over_loans
from .signature import forward_columns, named_forward

logger = logging.getLogger(__name__)


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
        return _read_tables(self._loaded.config)

    def columns(self) -> tuple[str, ...]:
        return forward_columns(named_forward(self._loaded.config))

    def enter(self, args: Any, peft_config: Any, tokenizer: Any, recipe: Recipe) -> tuple[Session, Any]:
        session = Session(self._plan, self._loaded, recipe)
        self._session = session
        self._model = MLXCausalLM(self._loaded, session.adapter, peft_config, tokenizer)
        self._model.settle = lambda: self.take_over("")
        return session, self._model

    def write_back(self) -> None:
        self.take_over("")

    def take_over(self, event: str) -> None:
        take_over_loans(self._session, self._model.lent, event)

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
        options["overrides"] = _drop_init_kwargs(args, options["overrides"])
        options["quantization_config"] = options["quantization_config"] or source.quantization
        adapter = _read_peft_config(source, peft_config, options["finetune_last_n_layers"])
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
        found = _read_tables(self._source.base.config.to_dict())
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
            source.mirror_tokens(tokenizer, eos=plan.data.eos_token is not None)
        session = Session(plan, load_torch_model(source, plan.model), recipe)
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

    def complete(self, folder: Path) -> None:
        if self._handover is not None:
            self._handover.complete_adapter(folder)


def _read_tables(config: Mapping[str, Any]) -> Tables:
    ids = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return Tables(ids, learned_positions(config))


def _drop_init_kwargs(args: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Set ``model_init_kwargs`` aside: they load a model by name, and this one is loaded already (trl ignores them)."""
    given = overrides.get("model_init_kwargs") or getattr(args, "model_init_kwargs", None)
    if not given:
        return dict(overrides)
    logger.warning("model_init_kwargs=%r is not used: the model was loaded by the script itself", given)
    return {**overrides, "model_init_kwargs": None}


def _read_peft_config(source: TorchModel, peft_config: Any, last_n_layers: int | None) -> Any:
    """The LoraConfig to resolve: the trainer's own, or the one inside a PeftModel.

    Raises:
        SettingError: Both are given, or the layers are to be chosen after the fact.
    """
    if source.adapter is not None and peft_config is not None:
        raise SettingError(
            "a PeftModel together with peft_config",
            "one adapter (trl.SFTTrainer raises too)",
            "MLXSFTTrainer(model=peft_model, ...) without peft_config, or model=peft_model.merge_and_unload()",
        )
    if last_n_layers is not None and (source.adapter is not None or peft_config is not None):
        count = source.base.config.get_text_config().num_hidden_layers
        layers = list(range(count))[-last_n_layers:]
        raise SettingError(
            f"finetune_last_n_layers={last_n_layers} with a torch model",
            "layers that PEFT can put its own adapter on as well",
            f"LoraConfig(..., layers_to_transform={layers})",
        )
    if source.adapter is None:
        return peft_config
    config = copy.copy(source.peft_config)
    # The object's weights are the start; how they once came about says nothing any more.
    config.init_lora_weights = True
    return config
