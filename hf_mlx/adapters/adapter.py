"""A LoRA adapter on a loaded model: what it trains and what PEFT calls it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
from mlx.utils import tree_flatten

from ..settings.plan import LoraPlan
from .blueprint import Blueprint, is_spelled
from .defaults import SPLIT_TYPES
from .matching import idle_patterns
from .order import order_key
from .targets import Target

if TYPE_CHECKING:
    from ..models.load import LoadedModel
    from .tensor_parallel import Split

PREFIX = "base_model.model."

# MLX leaf → PEFT leaf, in the order in which PEFT registers them below the adapted module.
PEFT_LEAVES = {
    "base_layer.weight": "base_layer.weight",
    "base_layer.bias": "base_layer.bias",
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_B_bias": "lora_B.bias",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "trainable_tokens_delta": "token_adapter.trainable_tokens_delta",
}
_RANKS = {leaf: rank for rank, leaf in enumerate([*PEFT_LEAVES, "weight", "bias"])}


def split_parameter(path: str) -> tuple[str, str]:
    """An MLX parameter path as (module path, leaf); ``base_layer`` belongs to the leaf."""
    module, _, leaf = path.rpartition(".")
    if module.endswith(".base_layer"):
        return module.removesuffix(".base_layer"), f"base_layer.{leaf}"
    return module, leaf


@dataclass(frozen=True)
class Adapter:
    """LoRA layers attached to a model, which they changed in place.

    Attributes:
        plan: The LoraConfig as plain values.
        loaded: The model, its config and its names.
        idle: Tensors of layers that MLX does not compute, by PEFT key.
        blueprint: Which modules are adapted, trained in full or trained in their bias.
        conv1d: The HF layers are transformers' Conv1D (``fan_in_fan_out``).
        folder: Where it was read from; None for one that was made here.
        split: How its arrays lie on several processes that hold the model together; None for one.
    """

    plan: LoraPlan
    loaded: LoadedModel
    blueprint: Blueprint
    idle: dict[str, mx.array] = field(default_factory=dict)
    conv1d: bool = False
    folder: Path | None = None
    split: Split | None = None

    @property
    def targets(self) -> tuple[Target, ...]:
        """The adapted modules, in HF order."""
        return self.blueprint.targets

    def trainable(self) -> dict[str, mx.array]:
        """Trainable arrays by flat MLX path, in the order of PEFT's ``named_parameters()``."""
        flat = dict(tree_flatten(self.loaded.model.trainable_parameters()))
        paths = {name: self._hf_path(split_parameter(name)[0]) for name in flat}
        key = order_key(self.loaded.model_type, (site.hf_path for site in self.blueprint.sites))

        def position(name: str) -> tuple:
            return key(paths[name]), _RANKS.get(split_parameter(name)[1], len(_RANKS))

        return {name: flat[name] for name in sorted(flat, key=position)}

    @property
    def torch_class(self) -> str:
        """The transformers class whose module paths the keys have."""
        if self.loaded.scores:
            return "AutoModelForSequenceClassification"
        classes = self.loaded.config.get("architectures") or ()
        return classes[0] if classes and self.loaded.model_type in SPLIT_TYPES else "AutoModelForCausalLM"

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said once about this adapter."""
        idle = idle_patterns(self.plan, (target.parameter for target in self.targets))
        lines = [f"{entry} matches no adapted module and has no effect, as in PEFT" for entry in idle]
        if is_spelled(self.plan.modules_to_save or ()):
            lines.append(
                "modules_to_save is a string, which PEFT reads letter by letter: trained in full are "
                + (", ".join(site.hf_path for site in self.blueprint.saved) or "no modules")
            )
        if self.loaded.scores and not any(name.startswith("score.") for name in self.trainable()):
            lines.append(
                "the score is neither trained nor saved, and is drawn anew wherever the adapter is loaded (as in TRL): "
                'LoraConfig(..., task_type="SEQ_CLS") trains it'
            )
        if self.torch_class.startswith("AutoModel"):
            return tuple(lines)
        return (
            *lines,
            f"the adapter's keys are those of {self.torch_class}, as trl's are: load it on that class "
            "(AutoModelForCausalLM builds a text-only model, which PEFT would leave as it is)",
        )

    def hf_name(self, mlx_param: str) -> str:
        """The PEFT key of one trainable parameter."""
        module, leaf = split_parameter(mlx_param)
        target = next((t for t in self.targets if t.mlx_path == module), None)
        path = target.key if target and leaf.startswith("lora_") else self._hf_path(module)
        if leaf.startswith("base_layer.") and any(rows.site.mlx_path == module for rows in self.blueprint.rows):
            path = f"{path}.token_adapter"
        return f"{PREFIX}{path}.{PEFT_LEAVES.get(leaf, leaf)}"

    def _hf_path(self, mlx_path: str) -> str:
        target = next((target for target in self.targets if target.mlx_path == mlx_path), None)
        return target.hf_path if target else self.loaded.names.to_hf_modules(mlx_path)[0]
