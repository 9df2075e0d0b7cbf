"""What ``compute_loss`` is called with for ``model``: calling it gives MLX's logits as a torch tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import TrainingError
from ..models.torch_arrays import to_torch
from ..training.host_loss import Forward

# Of no effect on the logits.
_MOOT = {"use_cache", "return_dict", "num_items_in_batch", "return_loss", "past_key_values", "cache_position"}
_FALSE = {"output_hidden_states", "output_attentions", "output_router_logits", "logits_to_keep", "skip_logits"}
# Attributes that are the real model's and take part in no gradient.
_READABLE = """
    config generation_config dtype name_or_path peft_config active_adapter active_adapters main_input_name
    num_parameters base_model_prefix _get_name print_trainable_parameters get_nb_trainable_parameters warnings_issued
    _is_quantized is_gradient_checkpointing vocab_size
"""
# A torch model's, whether or not the model here has them.
_PARTS = """
    parameters named_parameters modules named_modules children state_dict get_input_embeddings get_output_embeddings
    lm_head model base_model get_base_model generate
"""


class LossModel:
    """The model of one call of ``compute_loss``.

    Args:
        model: The trainer's.
        forward: Makes MLX's logits.
        inputs: The batch.
        device: Where the logits go.
        training: Whether they require a gradient.
        draws: Whether another pass has other logits.
        widened: Logits in float32, as accelerate returns them under autocast.

    Attributes:
        leaves: The logits of each pass that was asked for, tensors that require a gradient in training.
        training, device: As of the model.
    """

    def __init__(
        self,
        model: Any,
        forward: Forward,
        inputs: Mapping[str, Any],
        device: Any,
        *,
        training: bool,
        draws: bool = False,
        widened: bool = False,
    ) -> None:
        self.leaves: list[Any] = []
        self.training = training
        self.device = device
        self._model, self._run, self._inputs = model, forward, dict(inputs)
        self._draws, self._widened = draws, widened

    def __call__(self, input_ids: Any = None, attention_mask: Any = None, **options: Any) -> Any:
        """``transformers``' ``CausalLMOutputWithPast``: logits, and the loss where there are labels.

        Raises:
            TrainingError: Asked for other outputs, or for another batch than that of this call.
        """
        from transformers.modeling_outputs import CausalLMOutputWithPast

        labels = options.pop("labels", None)
        items = options.get("num_items_in_batch")
        self._check("input_ids", input_ids, required=True)
        if attention_mask is not None:
            self._check("attention_mask", attention_mask)
        for name, value in options.items():
            if name in _FALSE and (value is None or not value):
                continue
            if name not in _MOOT:
                self._check(name, value)
        logits = self._logits()
        loss = None if labels is None else self._loss(logits, labels, items)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    forward = __call__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in _PARTS.split():
            value = getattr(self._model, name)
            if name in _READABLE.split():
                return value
        raise TrainingError(
            f"model.{name} in compute_loss",
            "outputs.logits or outputs.loss of model(**inputs): MLX trains by the loss's gradient by the logits, and "
            "by nothing else of the model",
            f"compute the loss from the logits; trainer.model.{name} can be read outside of compute_loss",
        )

    def train(self, mode: bool = True) -> LossModel:
        """Of no effect: training drops, evaluation does not."""
        return self

    def eval(self) -> LossModel:
        """Of no effect, like :meth:`train`."""
        return self

    def _logits(self) -> Any:
        if self.leaves and not self._draws:
            return self.leaves[-1]
        logits = to_torch(self._run(len(self.leaves))).to(self.device)
        if self._widened:
            logits = logits.float()
        self.leaves.append(logits.requires_grad_(self.training))
        return logits

    def _loss(self, logits: Any, labels: Any, items: Any) -> Any:
        from transformers.loss.loss_utils import ForCausalLMLoss

        return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=items)

    def _check(self, name: str, value: Any, *, required: bool = False) -> None:
        import torch

        given = self._inputs.get(name)
        if value is given and not (required and value is None):
            return
        if isinstance(value, torch.Tensor) and isinstance(given, torch.Tensor) and _is_equal(value, given):
            return
        what = f"model({name}=…) with other values than inputs[{name!r}]" if given is not None else f"model({name}=…)"
        if value is None:
            what = f"model(…) without {name}"
        raise TrainingError(
            f"{what} in compute_loss",
            "a forward pass over the batch that compute_loss is called with, for its logits",
            "outputs = model(**inputs); make other batches in the data_collator, leave other outputs out",
        )


def _is_equal(value: Any, given: Any) -> bool:
    import torch

    return value.shape == given.shape and torch.equal(value.to(given.device), given)
