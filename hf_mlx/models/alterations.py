"""What a script did to a torch model that no array shows: it is compared with one freshly made from its config.

transformers' and PEFT's own wrappers, hooks and flags pass; a script's are refused by name, because the MLX copy is
built from config and weights and would leave them out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from ..errors import SettingError
from .torch_hooks import check_hooks, check_methods
from .torch_wrappers import check_adapters, check_parametrizations, layer_kind, unwrap

# Flags that say nothing about numbers, or that stay behind a config by transformers' own doing.
_FLAGS = """
    training gradient_checkpointing padding_idx vocab_size layer_idx name_or_path dtype device max_seq_len_cached
    num_labels main_input_name
"""
SILENT = frozenset(_FLAGS.split())
_AGAIN = "AutoModelForCausalLM.from_pretrained(...) again, without that change; then hand the model over"
_PLAIN = (bool, int, float, str, tuple, type(None))


def check_alterations(model: Any, base: Any, adapter: str | None) -> None:
    """Refuse what a script changed in a model and what its MLX copy would not have.

    Args:
        model: What was handed over: a transformers model, or a PeftModel.
        base: The transformers model inside.
        adapter: Name of the active adapter, or None.

    Raises:
        SettingError: Names the place, the change and the remedy.
    """
    if adapter is None and getattr(base, "_hf_peft_config_loaded", False):
        raise SettingError(
            "a model with an adapter that model.add_adapter(…) or load_adapter(…) put in",
            "a PeftModel, or a model without an adapter",
            "model = get_peft_model(model, config) in place of model.add_adapter(config)",
        )
    check_parametrizations(model)
    check_hooks(model)
    check_methods(model)
    if adapter is not None:
        check_adapters(model, adapter)
    stock = _transformers_class(base)
    fresh = _make_fresh(stock, base.config)
    pairs = []
    for path, mine, theirs in _pair("", base, fresh, adapter):
        _check_class(path, mine, theirs, stock if mine is base else None)
        _check_values(path, mine, theirs)
        pairs.append((path, mine, theirs))
    _check_sharing(pairs)
    _check_buffers(pairs, fresh)


def _transformers_class(base: Any) -> type:
    for cls in type(base).__mro__:
        if cls.__module__.startswith(("transformers.models.", "transformers_modules.")):
            return cls
    raise SettingError(
        f"a model of class {type(base).__name__}, which is none of transformers' own",
        "a transformers model class, whose layers MLX has too",
        "AutoModelForCausalLM.from_pretrained(...); a compiled model: model._orig_mod",
    )


def _make_fresh(cls: Any, config: Any) -> Any:
    """An untouched model of the same config without memory for its weights; torch's random state is left alone."""
    import torch

    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return cls(config)


def _pair(path: str, mine: Any, theirs: Any, adapter: str | None) -> Iterator[tuple[str, Any, Any]]:
    wrapper = mine
    mine = unwrap(mine)
    yield path, mine, theirs
    copied = getattr(wrapper, "modules_to_save", {}) if mine is not wrapper else {}
    if adapter is not None and adapter in copied:
        yield from _pair(f"{path}.modules_to_save.{adapter}", copied[adapter], theirs, None)
    held, wanted = dict(mine.named_children()), dict(theirs.named_children())
    for name in [*wanted, *(name for name in held if name not in wanted)]:
        at = f"{path}.{name}".lstrip(".")
        if name not in held or name not in wanted:
            raise SettingError(
                f"{at}, a submodule that {'is missing' if name in wanted else 'was added to the model'}",
                f"the submodules that {type(theirs).__name__} of this config has",
                "change the config instead (num_hidden_layers, ...) and load the model from it, or leave the submodule "
                "as it was",
            )
        yield from _pair(at, held[name], wanted[name], adapter)


def _check_class(path: str, mine: Any, theirs: Any, stock: type | None) -> None:
    wanted = stock or type(theirs)
    if type(mine) is wanted:
        return
    where = path or "the model"
    if isinstance(mine, wanted):
        changed = next(_overrides(type(mine), wanted), None)
        if changed is None:
            return
        raise SettingError(
            f"{where}: {type(mine).__name__} overrides {wanted.__name__}.{changed}()",
            f"{wanted.__name__}'s own: the forward pass here is MLX's, and a method in Python would not run in it",
            f"train the {wanted.__name__} itself: {wanted.__name__}.from_pretrained(...)"
            if stock
            else f"leave {where} as {wanted.__name__}",
        )
    raise SettingError(
        f"{where}: {layer_kind(mine)} in the place of {layer_kind(theirs)}",
        f"{layer_kind(theirs)}, which the config calls for, or PEFT's LoRA layer around it",
        "peft_config=LoraConfig(target_modules=[...]) for an adapter; change the config and load the model from it for "
        f"another layer; else {_AGAIN}",
    )


_NO_FORWARD = """
    __module__ __doc__ __qualname__ __init__ __annotations__ __firstlineno__ __static_attributes__ __repr__
    __init_subclass__ extra_repr generate prepare_inputs_for_generation save_pretrained push_to_hub from_pretrained
    _init_weights config_class base_model_prefix
"""
_HARMLESS = frozenset(_NO_FORWARD.split())


def _overrides(cls: type, stock: type) -> Iterator[str]:
    for owner in cls.__mro__[: cls.__mro__.index(stock)]:
        for name, value in vars(owner).items():
            if name in _HARMLESS or not hasattr(stock, name):
                continue
            if callable(value) or isinstance(value, (property, classmethod, staticmethod)):
                yield name


def _check_values(path: str, mine: Any, theirs: Any) -> None:
    held = vars(mine)
    for name, wanted in vars(theirs).items():
        if name.startswith("_") or name in SILENT or name not in held or not isinstance(wanted, _PLAIN):
            continue
        if isinstance(held[name], (*_PLAIN, list)) and held[name] != wanted:
            where = f"{path}.{name}".lstrip(".")
            raise SettingError(
                f"{where} is {held[name]!r}, where a model made from its config has {wanted!r}",
                "a module and a config that say the same",
                f"set the config before the model is made, or set {where} back to {wanted!r}",
            )
    kept, wanted = set(mine._parameters), set(theirs._parameters)
    for name in sorted(kept ^ wanted):
        where = f"{path}.{name}".lstrip(".")
        raise SettingError(
            f"{where}, a parameter that {'was added to the model' if name in kept else 'is missing'}",
            f"the parameters that {type(theirs).__name__} has",
            f"leave it as it was: {_AGAIN}",
        )
    for name in sorted(kept):
        if (mine._parameters[name] is None) != (theirs._parameters[name] is None):
            where = f"{path}.{name}".lstrip(".")
            raise SettingError(
                f"{where} is {'missing' if mine._parameters[name] is None else 'set'}",
                f"a {name} where the config calls for one",
                f"leave it as it was: {_AGAIN}",
            )


def _check_sharing(pairs: list[tuple[str, Any, Any]]) -> None:
    """Parameters that are one tensor in a model of this config, and only those, are one here."""
    first_mine: dict[int, str] = {}
    first_theirs: dict[int, str] = {}
    for path, mine, theirs in pairs:
        for name, value in mine._parameters.items():
            if value is None or ".modules_to_save." in path:
                continue
            at = f"{path}.{name}".lstrip(".")
            held = first_mine.setdefault(id(value), at)
            wanted = first_theirs.setdefault(id(theirs._parameters[name]), at)
            if held != wanted:
                tied = held != at
                raise SettingError(
                    f"{at} {f'tied to {held}' if tied else f'not tied to {wanted}'}, against the model's config",
                    f"config.tie_word_embeddings={tied} for such a model: config and weights have to say the same",
                    f"model.config.tie_word_embeddings = {tied}, or "
                    + (f"give {at} a tensor of its own" if tied else "model.tie_weights()"),
                )


def _check_buffers(pairs: list[tuple[str, Any, Any]], fresh: Any) -> None:
    import torch

    with torch.random.fork_rng(devices=[]):
        for path, mine, theirs in pairs:
            names = fill_buffers(fresh, theirs)
            if names and _recomputed_as_it_runs(theirs):
                continue
            for name in names:
                _compare_buffer(f"{path}.{name}".lstrip("."), mine._buffers.get(name), theirs._buffers[name])


def fill_buffers(model: Any, module: Any) -> list[str]:
    """Give the buffers of ``module``, a part of a ``model`` on torch's meta device, the values that they begin with.

    Returns:
        Names of those that were filled.
    """
    import torch

    names = [name for name, value in module._buffers.items() if value is not None and value.is_meta]
    # transformers' own way of filling what no checkpoint holds (core_model_loading, buffers on meta).
    for name in names:
        module._buffers[name] = torch.full_like(module._buffers[name], 0, device="cpu")
    if names:
        with torch.no_grad():
            model._init_weights(module)
    return names


def _recomputed_as_it_runs(module: Any) -> bool:
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(kind in ("dynamic", "longrope") for kind in kinds)


def _compare_buffer(path: str, mine: Any, wanted: Any) -> None:
    import torch

    if mine is not None and mine.shape == wanted.shape:
        # model.to(bfloat16) takes the buffers along.
        rounded = wanted.to(mine.dtype).double()
        if torch.allclose(mine.detach().cpu().double(), rounded, rtol=1e-5, atol=1e-8, equal_nan=True):
            return
    raise SettingError(
        f"{path}, a buffer that was changed by hand",
        "what a model made from its config holds there",
        "say it in the config (rope_parameters, ...) before the model is made",
    )
