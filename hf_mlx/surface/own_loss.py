"""A script's ``compute_loss`` between two compiled functions: the objects it is called with, and what it may touch."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from ..data.batch import Batch
from ..errors import SettingError, TrainingError
from ..models.torch_arrays import to_mlx, to_torch
from ..training.host_loss import Forward, HostMicro
from .loss_model import LossModel

logger = logging.getLogger(__name__)


class OwnLoss:
    """Calls ``trainer.compute_loss`` as transformers 5.23 ``Trainer.training_step`` and ``prediction_step`` do.

    Args:
        trainer: Its ``compute_loss`` is looked up at each call.
        counts_in_evaluation: ``num_items_in_batch`` is passed in evaluation too (by transformers; not by trl).
    """

    def __init__(self, trainer: Any, *, counts_in_evaluation: bool) -> None:
        self._trainer = trainer
        self._counts_in_evaluation = counts_in_evaluation

    def train(self, forward: Forward, micro: HostMicro) -> tuple[float, list[mx.array | None]]:
        """The loss of a micro-batch as it counts in the window, and its gradient by each pass's logits."""
        trainer, device = self._trainer, _device(self._trainer.model)
        inputs = read_inputs(micro.batch, device)
        model = self._model(forward, inputs, device, training=True, draws=micro.draws)
        items = self._items(micro, micro.items, device)
        with _mode(trainer.model, training=True), trainer.accelerator.ending(micro.remainder):
            loss = self._call(model, inputs, items)
            if not self._is_scaled(items):
                loss = loss / micro.window
            check_graph(loss, model.leaves, trainer.model)
            loss.backward()
        return float(loss.detach()), [None if leaf.grad is None else to_mlx(leaf.grad) for leaf in model.leaves]

    def evaluate(self, forward: Forward, micro: HostMicro, *, wants_logits: bool) -> tuple[float, np.ndarray | None]:
        """The loss of an evaluation batch, and its logits where they are wanted."""
        import torch

        trainer, device = self._trainer, _device(self._trainer.model)
        inputs = read_inputs(micro.batch, device)
        model = self._model(forward, inputs, device, training=False)
        items = None
        if self._counts_in_evaluation:
            items = self._items(micro, self._count_all(micro), device)
        ending = trainer.accelerator.ending(trainer._evaluate_loader.remainder)
        with _mode(trainer.model, training=False), torch.no_grad(), ending:
            made = self._call(model, inputs, items, return_outputs=wants_logits or self._counts_in_evaluation)
        loss, outputs = made if isinstance(made, tuple) else (made, None)
        logits = getattr(outputs, "logits", None)
        if wants_logits and logits is None:
            raise TrainingError(
                "compute_loss(..., return_outputs=True) that gives no outputs with logits",
                "the outputs of model(**inputs), whose logits compute_metrics is called with",
                "return (loss, outputs) if return_outputs else loss",
            )
        found = logits.float().cpu().numpy() if logits is not None and wants_logits else None
        return float(loss.detach().mean()), found

    def _model(self, forward: Forward, inputs: dict[str, Any], device: Any, **options: Any) -> LossModel:
        widened = bool(self._trainer.plan.model.precision.autocast)
        return LossModel(self._trainer.model, forward, inputs, device, widened=widened, **options)

    def _call(self, model: LossModel, inputs: dict[str, Any], items: Any, **options: Any) -> Any:
        compute = self._trainer.compute_loss
        if takes_items(compute):
            options["num_items_in_batch"] = items
        return compute(model, inputs, **options)

    def _count_all(self, micro: HostMicro) -> int:
        """Tokens of an evaluation batch, of all processes where a batch is divided by those."""
        trainer = self._trainer
        if not trainer.plan.batch.average_tokens:
            return micro.items
        return int(trainer.world.gather("tokens of an evaluation", np.array([micro.items])).sum())

    def _items(self, micro: HostMicro, count: int, device: Any) -> Any:
        import torch

        trainer = self._trainer
        if not micro.batch.has_labels or not (
            trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        ):
            return None
        return torch.tensor(count, device=device)

    def _is_scaled(self, items: Any) -> bool:
        """Whether the loss is one of the whole window already (``Trainer.loss_is_scaled_for_ga``)."""
        trainer = self._trainer
        if trainer.loss_is_scaled_for_ga is not None:
            return trainer.loss_is_scaled_for_ga
        if not takes_items(trainer.compute_loss):
            return False
        return items is not None


def takes_items(compute: Callable) -> bool:
    """Whether ``compute`` takes ``num_items_in_batch``, as those written for transformers before 4.46 do not."""
    try:
        parameters = inspect.signature(compute).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(p.name == "num_items_in_batch" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def read_inputs(batch: Batch, device: Any) -> dict[str, Any]:
    """The batch as upstream's loop hands it to ``compute_loss``: torch tensors, a user's own columns included."""
    import torch

    if batch.collated is not None:
        return {name: _to(value, device) for name, value in batch.collated.items()}
    arrays = {"input_ids": batch.input_ids, "labels": batch.labels}
    if batch.has_mask:
        real = np.arange(batch.shape[1])[None, :] < batch.lengths[:, None]
        arrays["attention_mask"] = real if batch.keys is None else batch.keys
    else:
        arrays["position_ids"] = _positions(batch)
    return {name: torch.tensor(array.astype(np.int64), device=device) for name, array in arrays.items()}


def _to(value: Any, device: Any) -> Any:
    import torch

    if isinstance(value, mx.array):
        value = to_torch(value)
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, torch.Tensor):
        return value
    # Embedding tables and losses take int64 alone, which is what collators return.
    value = value.long() if value.dtype in (torch.int32, torch.int16) else value
    return value.to(device)


def _positions(batch: Batch) -> np.ndarray:
    columns = np.arange(batch.shape[1])[None, :].repeat(batch.shape[0], 0)
    if batch.segments is None:
        return columns
    starts = np.diff(batch.segments, axis=1, prepend=-1) != 0
    return columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1)


def _device(model: Any) -> Any:
    import torch

    return torch.device(str(getattr(model, "device", "cpu")))


@contextmanager
def _mode(model: Any, *, training: bool) -> Iterator[None]:
    """The mode that upstream's loop has put the model in, for the loss to see."""
    if model.training != training:
        model.train(training)
    yield


def check_graph(loss: Any, leaves: list[Any], model: Any) -> None:
    """Refuse a loss with a gradient by anything of the model but the logits it was given.

    Raises:
        TrainingError: Names the parameter, or says that there is no gradient at all.
    """
    import torch

    if not isinstance(loss, torch.Tensor):
        raise TrainingError(
            f"compute_loss that returns a {type(loss).__name__}", "a torch tensor", "return the loss as torch made it"
        )
    found = {id(leaf): leaf for leaf in _find_leaves(loss)}
    if not any(id(leaf) in found for leaf in leaves):
        raise TrainingError(
            "a loss that does not depend on the logits of this step",
            "one that is computed from outputs.logits (or outputs.loss) of model(**inputs), where model is what "
            "compute_loss is called with: MLX trains by the loss's gradient by those logits",
            "outputs = model(**inputs); loss = my_loss(outputs.logits, inputs['labels'])",
        )
    names = _parameter_names(model)
    within = [names[number] for number in found if number in names]
    if within:
        raise TrainingError(
            f"a loss that depends on {within[0]} itself",
            "a loss of outputs.logits: its gradient by anything else does not reach the weights that MLX trains",
            "weight_decay=… in the arguments pulls weights towards 0; take the term out of compute_loss",
        )


def _find_leaves(loss: Any) -> Iterator[Any]:
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting.extend(parent for parent, _ in node.next_functions)


def _parameter_names(model: Any) -> Mapping[int, str]:
    if hasattr(model, "lent"):
        out = ((loan.held(), loan.name) for loan in model.lent.out)
        return {id(copy): name for copy, name in out if copy is not None}
    return {id(parameter): name for name, parameter in model.named_parameters()}


def check_supported(session: Any) -> None:
    """Refuse what a loss of the logits alone would leave out.

    Raises:
        SettingError: The load of experts is balanced, whose loss is no function of the logits.
    """
    if not hasattr(session.step.objective, "forward"):
        raise SettingError(
            "a loss of the script's own in a trainer of pairs",
            "one of the losses of the trainer's configuration, whose pairs are laid out their own way",
            'DPOConfig(loss_type="sigmoid", …): trainers of texts take compute_loss',
        )
    if session.routers is not None and session.routers.coefficient:
        raise SettingError(
            f"a loss of the script's own on a model whose experts are balanced (router_aux_loss_coef="
            f"{session.routers.coefficient:g})",
            "a loss of the logits: the routers' loss is not one",
            "SFTConfig(router_aux_loss_coef=0.0)",
        )
