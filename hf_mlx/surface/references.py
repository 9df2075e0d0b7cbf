"""Which reference a preference run is held to, from what the constructor was handed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..data.generator import TorchGenerator
from ..data.loader import make_loader
from ..data.order import epoch_order
from ..data.pairs import REFERENCE_COLUMNS
from ..errors import DataError, HFMLXError, SettingError
from ..feed import Feed
from ..models.bridge import TorchModel, is_torch_model, load_torch_model
from ..models.load import LoadedModel, load_model
from ..models.precision import apply_autocast, store_frozen_weights
from ..session import Session
from ..settings.plan import ModelPlan, PairLossPlan, TrainPlan
from ..training.pairs import PairObjective, Reference
from ..training.reference import AdapterOff, OtherModel, StartCopy, same_weights

logger = logging.getLogger(__name__)

_COPY = "MLXDPOTrainer(model=model, ref_model=copy.deepcopy(model), ...)"


def check_reference(model: Any, ref_model: Any) -> None:
    """Refuse a reference that could be none.

    Raises:
        SettingError: It is the model itself, a PeftModel, or nothing that can be loaded.
    """
    if ref_model is None:
        return
    if ref_model is model and not isinstance(model, (str, Path)):
        raise SettingError(
            "ref_model that is the model itself",
            "an object of its own, since the model changes while it trains (TRL raises too)",
            "MLXDPOTrainer(model=model, ...) without ref_model keeps a copy of the start",
        )
    if hasattr(ref_model, "peft_config") and hasattr(ref_model, "get_base_model"):
        raise SettingError(
            "ref_model with a PEFT adapter",
            "a plain model",
            "ref_model=ref_model.merge_and_unload()",
        )
    if not is_torch_model(ref_model) and not isinstance(ref_model, (str, Path)):
        raise SettingError(
            f"ref_model of type {type(ref_model).__name__}",
            "a transformers model, a hub id or the path of a model folder",
            "leave ref_model out: the start of the model is the reference then",
        )


def check_rows(train_dataset: Any) -> None:
    """Refuse what TRL's trainer raises over: no rows, or a dict of them.

    Raises:
        DataError: Of that.
    """
    if train_dataset is None:
        raise DataError(
            "no train_dataset: `train_dataset` is required", "rows with chosen and rejected", "train_dataset=my_rows"
        )
    if isinstance(train_dataset, Mapping):
        raise DataError(
            f"train_dataset of type {type(train_dataset).__name__}",
            "`train_dataset` must be a `Dataset` or `IterableDataset`, or a list of dicts",
            'train_dataset=my_datasets["train"]',
        )


def check_moving(plan: TrainPlan) -> None:
    """Refuse a reference that follows an adapter.

    Raises:
        SettingError: The reference is the base then, and does not move.
    """
    assert isinstance(plan.loss, PairLossPlan)
    if plan.loss.sync_steps is not None and plan.lora is not None:
        raise SettingError(
            "sync_ref_model=True with an adapter",
            "all weights trained: an adapter's reference is the base without it, which does not move (TRL raises too)",
            "DPOConfig(sync_ref_model=False)",
        )


def choose_reference(session: Session, base: Any, ref_model: Any, *, new_adapter: bool) -> Reference:
    """The reference of trl 1.16 ``DPOTrainer``.

    Args:
        session: Its trained arrays are at their start.
        base: What the policy was made from.
        ref_model: The constructor's.
        new_adapter: The adapter came from ``peft_config``, so the base model is the reference.
    """
    objective: Any = session.step.objective
    loss = session.plan.loss
    assert isinstance(loss, PairLossPlan)
    moved = objective.slots.names if loss.sync_steps is not None else ()
    if ref_model is not None:
        return OtherModel(_load(ref_model, session.plan), moved)
    if session.adapter is not None and new_adapter:
        return AdapterOff(session.adapter, objective.score, objective.slots)
    if session.adapter is None and base.is_copied and not loss.precompute:
        again = _read_again(session, base.name)
        if again is not None:
            return OtherModel(again, moved)
    return StartCopy(objective.score, objective.slots)


def keep_adapter(model: Any) -> None:
    """Put a copy of the adapter as it starts beside it, under the name "ref", as trl 1.16 does: saved with it.

    Args:
        model: The script's PeftModel. Where its adapter is not called "default", upstream raises; no copy is kept.
    """
    config = model.peft_config.get("default")
    if config is None or "ref" in model.peft_config:
        return
    model.add_adapter("ref", config)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


def _read_again(session: Session, name: str) -> LoadedModel | None:
    """The model that a torch object was loaded from, where that differs from the object.

    Upstream's reference of a fully trained object is read anew from ``config._name_or_path``.
    """
    dtype = session.plan.model.precision.dtype
    try:
        again = load_model(name, ModelPlan(precision=type(session.plan.model.precision)(dtype=dtype)))
    except HFMLXError as error:
        raise SettingError(
            f"no ref_model, and a model object whose origin {name!r} cannot be read again ({error.args[0]})",
            "a reference: TRL reads it again from config._name_or_path",
            _COPY,
        ) from error
    if same_weights(session.loaded, again):
        return None
    logger.warning(
        f"the model object differs from {name}, which the reference is read from, as TRL does; to be held to the "
        f"object as it is: {_COPY}"
    )
    _as_computed(again, session.plan)
    return again


def _load(ref_model: Any, plan: TrainPlan) -> LoadedModel:
    if is_torch_model(ref_model):
        loaded = load_torch_model(TorchModel(ref_model), ModelPlan(precision=type(plan.model.precision)(dtype="auto")))
    else:
        loaded = load_model(ref_model, plan.model)
    _as_computed(loaded, plan)
    return loaded


def _as_computed(loaded: LoadedModel, plan: TrainPlan) -> None:
    autocast = plan.model.precision.autocast
    if autocast:
        loaded.model.freeze()
        apply_autocast(loaded.model, getattr(mx, autocast))
        store_frozen_weights(loaded.model, getattr(mx, autocast))


def precompute(dataset: Any, session: Session, data: Feed, name: str, batch_size: int) -> Any:
    """``dataset`` with the reference's log-probabilities as columns of float32.

    Rows are batched as the first epoch will batch them, so that step 1 finds the very numbers it computes itself. Of
    several processes each computes its share of the batches.

    Raises:
        SettingError: A stream, which cannot be read twice.
    """
    if not hasattr(dataset, "__len__"):
        raise SettingError(
            f"precompute_ref_log_probs=True is not supported with IterableDataset (the {name} dataset)",
            "rows that are there as a whole (TRL raises too)",
            "DPOConfig(precompute_ref_log_probs=False)",
        )
    if REFERENCE_COLUMNS[0] in dataset.column_names:
        return dataset
    objective = session.step.objective
    assert isinstance(objective, PairObjective)
    compute: Callable = mx.compile(objective.reference_logps)
    order = np.arange(len(dataset))
    if name == "train":
        order = np.asarray(
            epoch_order(len(dataset), data.plan.batch, 0, global_rng=TorchGenerator(data.plan.batch.seed))
        )
    found = np.zeros((len(dataset), 2), np.float32)
    training = objective.model.training
    objective.model.eval()
    world = session.world
    try:
        for start, batch in _batches(dataset, order, data, batch_size):
            if (start // batch_size) % world.size != world.rank:
                continue
            rows = order[start : start + batch_size]
            arrays = data.inputs(batch).arrays
            found[rows] = np.array(compute(session.step.params, arrays))
    finally:
        objective.slots.bind(session.step.params)
        objective.model.train(training)
    if not world.is_alone:
        found = np.array(world.sum({"": mx.array(found)}, f"the reference of the {name} dataset")[""])
    for column, values in zip(REFERENCE_COLUMNS, found.T, strict=True):
        dataset = dataset.add_column(column, np.ascontiguousarray(values))
    return dataset


def _batches(dataset: Any, order: np.ndarray, data: Feed, size: int) -> Iterator[tuple[int, Any]]:
    loader = make_loader(dataset, size, data.collate, order=lambda _: order)
    return ((number * size, batch) for number, batch in enumerate(loader))
