"""What torch and PEFT put around a layer: PEFT's is looked through, and what it was told afterwards is refused."""

from __future__ import annotations

import math
from typing import Any

from ..errors import AdapterError, SettingError


def unwrap(module: Any) -> Any:
    """The layer inside PEFT's wrapper; the module itself where there is none."""
    while type(module).__module__.startswith("peft."):
        inner = getattr(module, "original_module", None)
        inner = getattr(module, "base_layer", None) if inner is None else inner
        if inner is None:
            break
        module = inner
    return module


def layer_kind(module: Any) -> str:
    """Class name, with its module where that is not torch's or transformers'."""
    cls = type(module)
    return (
        cls.__name__ if cls.__module__.startswith(("torch.", "transformers.")) else f"{cls.__module__}.{cls.__name__}"
    )


def check_parametrizations(model: Any) -> None:
    """Refuse torch's parametrizations, weight and spectral norms and pruning masks.

    Raises:
        SettingError: Names the module and torch's own call that makes it permanent.
    """
    for path, module in model.named_modules():
        if type(module).__module__ == "torch.nn.utils.parametrize":
            name = next(iter(module.parametrizations), "weight")
            _refuse(path, name, "torch.nn.utils.parametrize", "parametrize.remove_parametrizations(module, {!r})", name)
        for hook in module._forward_pre_hooks.values():
            home = type(hook).__module__
            if not home.startswith("torch.nn.utils.") and "_tensor_name" not in vars(hook):
                continue
            name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", "weight")
            kind = home.rsplit(".", 1)[-1] if home.startswith("torch.nn.utils.") else "prune"
            undo = "prune.remove(module, {!r})" if kind == "prune" else f"remove_{kind}(module, {{!r}})"
            _refuse(path, name, f"torch.nn.utils.{kind}", undo, name)


def _refuse(path: str, name: str, by: str, undo: str, tensor: str) -> None:
    raise SettingError(
        f"{path}.{name}, computed at each forward pass by {by}",
        "weights that are stored as they are used",
        f"torch.nn.utils.{undo.format(tensor)} before training makes it permanent, as a plain weight",
    )


def check_adapters(model: Any, adapter: str) -> None:
    """Refuse an adapter that is merged, disabled, rescaled or mixed with others.

    Args:
        model: A PeftModel.
        adapter: Name of the active adapter.

    Raises:
        AdapterError: Names the layer and PEFT's own call that undoes it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    if model.peft_config[adapter].is_prompt_learning:
        return
    for path, layer in model.named_modules():
        if isinstance(layer, (BaseTunerLayer, ModulesToSaveWrapper)):
            _check_layer(path, layer, adapter)
        if isinstance(layer, BaseTunerLayer):
            _check_scale(path, layer, adapter)
            _check_parts(path, layer, adapter, model.peft_config[adapter])


def _check_layer(path: str, layer: Any, adapter: str) -> None:
    if getattr(layer, "merged_adapters", None):
        raise AdapterError(
            f"{path} with the adapter merged into it (merge_adapter()) and still attached",
            "an adapter beside its base: merged, its effect would count twice",
            "model.unmerge_adapter(), or model = model.merge_and_unload() and a new peft_config",
        )
    if layer.disable_adapters:
        raise AdapterError(
            f"{path} with its adapter disabled",
            "an adapter that takes part",
            "model.base_model.enable_adapter_layers()",
        )
    active = list(layer.active_adapters)
    if adapter in active and active != [adapter]:
        raise AdapterError(
            f"{path} with the active adapters {active}", "one active adapter", f"model.set_adapter({adapter!r})"
        )


def _check_scale(path: str, layer: Any, adapter: str) -> None:
    if adapter not in getattr(layer, "scaling", {}):
        return
    r, alpha = layer.r[adapter], layer.lora_alpha[adapter]
    wanted = alpha / (math.sqrt(r) if getattr(layer, "use_rslora", {}).get(adapter) else r)
    found = layer.scaling[adapter]
    if not math.isclose(found, wanted, rel_tol=1e-9):
        raise AdapterError(
            f"{path} with its adapter scaled to {found:g} (scale_layer or set_scale)",
            f"the scale that its LoraConfig gives, {wanted:g}, which is also what is saved",
            f"layer.unscale_layer() on each layer, or LoraConfig(lora_alpha={alpha * found / wanted:g})",
        )


def _check_parts(path: str, layer: Any, adapter: str, config: Any) -> None:
    dropout = getattr(layer, "lora_dropout", {})
    if adapter in dropout:
        found = getattr(dropout[adapter], "p", 0.0)
        known = layer_kind(dropout[adapter]) in ("Dropout", "Identity")
        if not known or found != config.lora_dropout:
            raise AdapterError(
                f"{path} with the dropout {dropout[adapter]}",
                f"lora_dropout={config.lora_dropout}, as its LoraConfig says",
                f"LoraConfig(lora_dropout={found if known else config.lora_dropout})",
            )
    for name in ("lora_A", "lora_B"):
        part = getattr(layer, name, {})
        if adapter in part and layer_kind(part[adapter]) != "Linear":
            raise AdapterError(
                f"{path}.{name}.{adapter}: {layer_kind(part[adapter])} in the place of Linear",
                "PEFT's own LoRA layers",
                "get_peft_model(model, LoraConfig(...)) on the model as it was loaded",
            )
