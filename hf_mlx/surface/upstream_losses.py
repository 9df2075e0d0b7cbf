"""The losses of upstream's trainers in torch, for a ``compute_loss`` that builds on ``super().compute_loss(...)``."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

_DETACHED = (
    "super().compute_loss(..., return_outputs=True) of trl's SFTTrainer gives logits without a gradient, so a term "
    "made of them changes the logged loss and trains nothing, here as under trl. To train by it, make it of "
    "outputs = model(**inputs)."
)


def hf_loss(trainer: Any, model: Any, inputs: dict[str, Any], items: Any) -> tuple[Any, Any]:
    """Loss and outputs of transformers 5.23 ``Trainer.compute_loss``."""
    smoother = _smoother(trainer)
    labels = None
    if (smoother is not None or trainer.compute_loss_func is not None) and "labels" in inputs:
        labels = inputs.pop("labels")
    if trainer.model_accepts_loss_kwargs and items is not None:
        inputs = {**inputs, "num_items_in_batch": items}
    outputs = model(**inputs)
    if trainer.compute_loss_func is not None:
        loss = trainer.compute_loss_func(outputs, labels, num_items_in_batch=items)
    elif smoother is not None and labels is not None:
        loss = smoother(outputs, labels, shift_labels=True, num_items_in_batch=items)
    elif outputs.loss is None:
        raise ValueError(f"The model did not return a loss from the inputs {', '.join(inputs)}: there are no labels.")
    else:
        loss = outputs.loss
    return _of_all(trainer, loss, items), outputs


def trl_loss(trainer: Any, model: Any, inputs: dict[str, Any], items: Any, *, return_outputs: bool) -> Any:
    """trl 1.16 ``SFTTrainer.compute_loss`` with its metrics, which go to ``trainer._metrics``."""
    import torch

    inputs["use_cache"] = False
    labels = inputs.get("labels")
    outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
    logits = outputs.logits
    if trainer.compute_loss_func is not None:
        loss = trainer.compute_loss_func(outputs, labels, num_items_in_batch=items)
    elif (smoother := _smoother(trainer)) is not None and trainer.plan.loss.kind == "nll":
        loss = smoother(outputs, labels, shift_labels=True, num_items_in_batch=items)
    else:
        scored, kept = _token_log_probs(logits, labels)
        losses = -scored * scored.exp().detach() if trainer.plan.loss.kind == "dft" else -scored
        count = kept.sum() if items is None else items
        loss = losses.sum() / torch.as_tensor(count).clamp(min=1)
    loss = _of_all(trainer, loss, items)
    with torch.no_grad():
        _measure(trainer, "train" if trainer.model.training else "eval", logits.detach(), labels)
    if not return_outputs:
        return loss
    if logits.requires_grad and torch.is_grad_enabled():
        trainer.say_once(_DETACHED)
    return loss, type(outputs)(logits=logits.detach())


def _of_all(trainer: Any, loss: Any, items: Any) -> Any:
    """``items`` are those of all processes, and the mean over processes is minimised."""
    divided = items is not None and trainer.plan.batch.average_tokens and not trainer.world.is_alone
    return loss * trainer.world.size if divided else loss


def _smoother(trainer: Any) -> Any:
    from transformers.trainer_pt_utils import LabelSmoother

    epsilon = trainer.plan.loss.label_smoothing_factor
    return LabelSmoother(epsilon=epsilon) if epsilon else None


def _token_log_probs(logits: Any, labels: Any) -> tuple[Any, Any]:
    """Of each scored position; and which of the positions are."""
    shifted, targets = logits[:, :-1].float(), labels[:, 1:]
    kept = targets != -100
    logs = shifted[kept].log_softmax(-1)
    return logs.gather(-1, targets[kept].unsqueeze(-1)).squeeze(-1), kept


def _measure(trainer: Any, mode: str, logits: Any, labels: Any) -> None:
    targets = labels[:, 1:]
    import torch

    kept = targets != -100
    rows = logits[:, :-1][kept].float()
    logs = rows.log_softmax(-1)
    own = torch.stack([kept.sum(), -(logs.exp() * logs).sum(), (rows.argmax(-1) == targets[kept]).sum()])
    count, entropy, correct = trainer.accelerator.gather_for_metrics(own[None]).sum(0).tolist()
    metrics = trainer._metrics[mode]
    metrics["entropy"].append(entropy / count if count else 0.0)
    metrics["mean_token_accuracy"].append(correct / count if count else 0.0)
    metrics["num_tokens"] = [float(trainer.session.progress.num_tokens)]
