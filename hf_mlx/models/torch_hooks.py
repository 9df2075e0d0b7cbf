"""Python that a script attached to a torch model: hooks, and methods replaced on an instance or a class."""

from __future__ import annotations

from typing import Any

from ..errors import SettingError

# Libraries whose own hooks and wrappers change no number here: gradient checkpointing's on the embeddings,
# accelerate's placing of inputs, PEFT's.
_STOCK = ("transformers.", "accelerate.", "peft.", "trl.", "transformers_modules.", "kernels.")
_HOOKS = {
    "_forward_hooks": "forward hook", "_forward_pre_hooks": "forward pre-hook", "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}  # fmt: skip
_TENSOR_HOOKS = {
    "_backward_hooks": "tensor hook",
    "_post_accumulate_grad_hooks": "hook after its gradient is accumulated",
}
# What training never calls, or what is called on the object itself.
_METHODS = """
    generate prepare_inputs_for_generation save_pretrained push_to_hub to cuda cpu half float bfloat16 extra_repr
    train eval state_dict load_state_dict print_trainable_parameters
"""
_OUTSIDE = frozenset(_METHODS.split())
_NOT_RUN = "a model without Python of the script's own in it: MLX's forward pass would not run it"


def check_hooks(model: Any) -> None:
    """Refuse hooks of a script's own on any module or trained parameter.

    Raises:
        SettingError: Names the module and the function.
    """
    import torch

    every = torch.nn.modules.module
    for name, what in _HOOKS.items():
        for hook in getattr(every, f"_global{name}", {}).values():
            _check_hook("every module of torch", what, hook, "remove it")
    for path, module in model.named_modules():
        where = path or "the model"
        for name, what in _HOOKS.items():
            for hook in getattr(module, name).values():
                _check_hook(where, what, hook, "handle = register_...(...); handle.remove() before training")
        placed = getattr(module, "_hf_hook", None)
        for hook in getattr(placed, "hooks", [placed]) if placed is not None else ():
            if not type(hook).__module__.startswith(_STOCK):
                _refuse(
                    f"a {type(hook).__name__} of accelerate's kind", where, "accelerate.hooks.remove_hook_from_module"
                )
    for path, value in model.named_parameters():
        check_tensor_hooks(path, value)


def check_tensor_hooks(path: str, parameter: Any) -> None:
    """Refuse hooks of a script's own on a trained parameter.

    Raises:
        SettingError: Names the parameter and the function.
    """
    for name, what in _TENSOR_HOOKS.items() if getattr(parameter, "requires_grad", False) else ():
        for hook in (getattr(parameter, name, None) or {}).values():
            _check_hook(path, what, hook, "handle.remove(); read or write p.grad in a callback's on_pre_optimizer_step")


def check_methods(model: Any) -> None:
    """Refuse methods that a script replaced on a module or on its class.

    Raises:
        SettingError: Names the module and the method.
    """
    if "_loss_function" in vars(_inner(model)):
        _refuse("loss_function, set by the script,", "the model", 'SFTConfig(loss_type="nll" or "dft", ...)')
    seen: set[type] = set()
    for path, module in model.named_modules():
        where = path or "the model"
        for name, value in vars(module).items():
            method = getattr(type(module), name, None)
            if callable(value) and not hasattr(value, "named_parameters") and callable(method) and name not in _OUTSIDE:
                _check_method(where, name, value, f"del model.{path}.{name}".replace("..", "."), module)
        if type(module) not in seen and type(module).__module__.startswith(("transformers.models.", "torch.nn.")):
            seen.add(type(module))
            if not _is_stock(type(module).forward, (*_STOCK, "torch.")):
                _refuse(f"{type(module).__name__}.forward, replaced on the class", where, "restart without the patch")


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _check_method(where: str, name: str, value: Any, remedy: str, module: Any) -> None:
    bound = getattr(value, "__self__", None)
    own = bound is module and getattr(value, "__func__", None) is getattr(type(module), name)
    if not own and not _is_stock(value, (*_STOCK, "torch.")):
        _refuse(f"{name} = {_describe(value)}, assigned on the instance", where, remedy)
    # accelerate keeps what it found there.
    before = vars(module).get("_old_forward") if name == "forward" else None
    if before is not None and not _is_stock(before, (*_STOCK, "torch.")):
        _refuse(f"forward = {_describe(before)}, assigned on the instance", where, remedy)


def _check_hook(where: str, what: str, hook: Any, remedy: str) -> None:
    if not _is_stock(hook, _STOCK):
        _refuse(f"a {what} ({_describe(hook)})", where, remedy)


def _refuse(what: str, where: str, remedy: str) -> None:
    raise SettingError(f"{what} on {where}", _NOT_RUN, remedy)


def _plain(function: Any) -> Any:
    """The function itself, without ``partial`` and binding; decorators' copied names are not looked at."""
    while hasattr(function, "func") or hasattr(function, "__func__"):
        function = getattr(function, "__func__", None) or function.func
    return function


def _is_stock(function: Any, homes: tuple[str, ...]) -> bool:
    function = _plain(function)
    found = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
    return f"{found}.".startswith(homes)


def _describe(function: Any) -> str:
    function = _plain(function)
    code = getattr(function, "__code__", None)
    # The code's own name: functools.wraps gives a function that of what it wraps.
    return getattr(code, "co_qualname", None) or getattr(function, "__name__", type(function).__name__)
