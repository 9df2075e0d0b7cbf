"""Modules of ``trainer.model`` for a model named by a string: transformers' and PEFT's, around copies."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from ..errors import HFMLXError, SettingError
from .facade_weights import Weights
from .model_config import is_known
from .module_tree import ModuleTree, refuse_changed_module
from .parameters import ADAPTER_NAME

# Of transformers' and PEFT's models: what only reads.
_READ = """
    get_base_model get_input_embeddings get_output_embeddings get_decoder get_encoder get_memory_footprint
    active_adapter active_adapters active_peft_config peft_type base_model_prefix main_input_name framework
    get_model_status get_layer_status modules_to_save prefix can_generate is_gradient_checkpointing
    is_loaded_in_8bit is_loaded_in_4bit is_quantized is_parallelizable supports_gradient_checkpointing
    get_adapter_state_dict extra_repr
"""
_READABLE = frozenset(_READ.split())
# Asked for by libraries to learn that they are not there.
_ABSENT = frozenset(("peft_config", "hf_device_map", "hf_quantizer", "quantization_method", "module"))


class UnknownAttribute(SettingError, AttributeError):
    """Something of torch's model that is not here; ``hasattr`` says so."""


class Modules(Weights):
    """The tree of modules, which is made when somebody asks for it."""

    config: Any
    training: bool

    @cached_property
    def tree(self) -> ModuleTree:
        """The modules around the copies."""
        peft_config = getattr(self, "peft_config", {}).get(ADAPTER_NAME)
        return ModuleTree(self.loaded, self.config, self.adapter, peft_config, self._parameters)

    def check_modules(self, event: str) -> None:
        """Refuse what was set on a module that was handed out.

        Raises:
            TrainingError: Names it.
        """
        change = self.tree.find_change() if "tree" in vars(self) else None
        if change is not None:
            refuse_changed_module(change, event)

    def named_modules(
        self, memo: set[Any] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """(name, module) of every module, in torch's order; the first is the model itself, under the prefix's name."""
        for name, module in self.tree.root.named_modules(memo, prefix, remove_duplicate):
            yield name, self if module is self.tree.root else module

    def modules(self) -> Iterator[Any]:
        """The modules of :meth:`named_modules`."""
        return (module for _, module in self.named_modules())

    def named_children(self) -> Iterator[tuple[str, Any]]:
        """(name, module) of the modules directly below."""
        return self.tree.root.named_children()

    def children(self) -> Iterator[Any]:
        """The modules of :meth:`named_children`."""
        return self.tree.root.children()

    def get_submodule(self, target: str) -> Any:
        """A module by its name.

        Raises:
            AttributeError: There is none of that name (as torch's).
        """
        return self.tree.root.get_submodule(target) if target else self

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """(name, tensor) of what a model computes with and does not train."""
        return self.tree.root.named_buffers(prefix, recurse, remove_duplicate)

    def buffers(self, recurse: bool = True) -> Iterator[Any]:
        """The tensors of :meth:`named_buffers`."""
        return self.tree.root.buffers(recurse)

    def _held(self) -> dict[str, Any]:
        if find_spec("torch") is None or not is_known(self.loaded):
            return super()._held()
        return super()._held() if self.tree.missing else self.tree.root.state_dict(keep_vars=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A torch model of its own, PEFT's where an adapter is attached, with the weights as they are now."""
        self.settle()
        return self.tree.copy().train(self.training)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in _ABSENT or "loaded" not in vars(self) or find_spec("torch") is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        import torch

        try:
            root = self.tree.root
        except HFMLXError as error:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from error
        if not hasattr(root, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in _READABLE or isinstance(value := getattr(root, name), torch.nn.Module):
            return getattr(root, name)
        raise UnknownAttribute(
            f"model.{name} of a model that was named and is trained by MLX",
            "what reads a model: its parameters, modules, config, forward pass and generate()",
            f"{_describe(name, value)} on a torch object before it is handed over: "
            "MLXSFTTrainer(model=AutoModelForCausalLM.from_pretrained(…), …)",
        )


def _describe(name: str, value: Any) -> str:
    return f"model.{name}(…)" if callable(value) else f"model.{name}"
