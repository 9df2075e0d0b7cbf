"""A tensor that a script puts on "cuda" lands on the device that torch has here: a Mac's "mps", or the CPU."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from .talk import Talk


def land_devices(torch: Any, talk: Talk, target: Any = None) -> Any:
    """Map "cuda" to ``target`` in every function of torch's, in this thread and in those that it starts.

    ``torch.device("cuda")`` itself stays what the script wrote, so its comparisons hold.

    Args:
        torch: The module.
        talk: Told that it happened.
        target: A ``torch.device``; None for what torch has here.

    Returns:
        The mode, entered.
    """
    target = torch.device("mps" if torch.backends.mps.is_available() else "cpu") if target is None else target

    def land(device: Any) -> Any:
        """``device`` as it is here; anything that is not CUDA's as it came."""
        if isinstance(device, (str, torch.device)):
            foreign = str(device).partition(":")[0] == "cuda"
        else:
            # torch reads a number as an index of the accelerator.
            foreign = isinstance(device, int) and not isinstance(device, bool) and device >= 0
        if foreign:
            talk.answered('device "cuda" is', target.type)
        return target if foreign else device

    class Landing(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.Tensor.cuda:
                return args[0].to(land("cuda"))
            if func is torch.Tensor.pin_memory and target.type == "cpu":
                return args[0]
            if func is torch.Tensor.type and len(args) > 1 and isinstance(args[1], str):
                args = (args[0], args[1].replace("torch.cuda.", "torch."), *args[2:])
            if func is torch.Tensor.to and len(args) > 1:
                args = (args[0], land(args[1]), *args[2:])
            if kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": land(kwargs["device"])}
            return func(*args, **kwargs)

    mode = Landing()
    mode.__enter__()
    _enter_in_threads(Landing)
    torch.load = _landing(torch.load, "map_location", 1, land)
    torch.set_default_device = _landing(torch.set_default_device, "device", 0, land)
    torch.Generator = _landing_generator(torch.Generator, land)
    _land_tensor_types(torch, talk)
    _land_autocast(torch, land)
    return mode


def _landing(original: Callable, keyword: str, place: int, land: Callable) -> Callable:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) > place:
            args = (*args[:place], land(args[place]), *args[place + 1 :])
        elif keyword in kwargs:
            kwargs[keyword] = land(kwargs[keyword])
        return original(*args, **kwargs)

    return call


def _landing_generator(original: type, land: Callable) -> type:
    """``torch.Generator("cuda")`` on the device that is here; every generator goes on being an instance."""

    class Meta(type):
        def __call__(cls, device: Any = "cpu") -> Any:
            return original(land(device))

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, original)

    return Meta("Generator", (), {"__module__": "torch", "__doc__": original.__doc__})


def _land_tensor_types(torch: Any, talk: Talk) -> None:
    """``torch.cuda.FloatTensor`` and the like are the types of host memory."""
    names = [name for name in vars(torch.cuda) if name.endswith("Tensor") and hasattr(torch, name)]
    for name in names:
        setattr(torch.cuda, name, getattr(torch, name))
    original = torch.set_default_tensor_type

    @functools.wraps(original)
    def set_default_tensor_type(kind: Any) -> None:
        original(kind.replace("torch.cuda.", "torch.") if isinstance(kind, str) else kind)

    torch.set_default_tensor_type = set_default_tensor_type


def _enter_in_threads(mode: Callable[[], Any]) -> None:
    """torch keeps modes for each thread apart."""
    original = threading.Thread.start

    @functools.wraps(original)
    def start(self: threading.Thread) -> None:
        run = self.run

        def inside() -> None:
            with mode():
                run()

        self.run = inside
        original(self)

    threading.Thread.start = start


def _land_autocast(torch: Any, land: Callable) -> None:
    autocast = torch.amp.autocast_mode.autocast
    original = autocast.__init__

    @functools.wraps(original)
    def __init__(
        self: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: bool | None = None
    ) -> None:
        if device_type == "cuda":
            device_type = land(device_type).type
            # float16 is CUDA's default; its range needs the scaler that is not here.
            dtype = torch.bfloat16 if dtype in (None, torch.float16) else dtype
        original(self, device_type, dtype, enabled, cache_enabled)

    autocast.__init__ = __init__
