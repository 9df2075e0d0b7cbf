"""Packages that a script imports and that are not here: trackers, CUDA's kernels, a notebook's surroundings.

Only the script is offered them, and only where they are not installed; libraries go on finding that they are not.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from ..errors import SettingError
from .callers import script_imports
from .imports import Imports
from .talk import Talk

# Experiment trackers -> what installs them.
_TRACKERS: Mapping[str, str] = {
    "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio", "comet_ml": "comet-ml", "clearml": "clearml",
    "neptune": "neptune", "tensorboardX": "tensorboardX", "swanlab": "swanlab",
}  # fmt: skip
# Packages that need CUDA -> what does the same here.
_CUDA: Mapping[str, str] = {
    "flash_attn": "MLX has its own fused attention",
    "xformers": "MLX has its own fused attention",
    "deepspeed": "memory is unified here, and nothing is sharded",
    "apex": "bf16=True is MLX's half precision",
    "liger_kernel": "MLX has its own fused kernels",
    "transformer_engine": "bf16=True is MLX's half precision",
}
# Packages whose every use is a change to torch that only CUDA has -> the line that works.
_REFUSED: Mapping[str, str] = {
    "unsloth": "write model = AutoModelForCausalLM.from_pretrained(name); SFTTrainer(model, processing_class="
    "AutoTokenizer.from_pretrained(name), peft_config=LoraConfig(r=16, lora_alpha=16, target_modules='all-linear'), …)",
    "triton": "remove import triton: the step is compiled by MLX",
}


class AbsentPackage(SettingError, ImportError):
    """A package that cannot be here."""


def offer_absent(imports: Imports, talk: Talk) -> None:
    """Let the script import them, once each is looked for."""
    for name, package in _TRACKERS.items():
        imports.provide(name, script_imports, functools.partial(_track_nothing, talk=talk, package=package))
    for name, instead in _CUDA.items():
        imports.provide(name, script_imports, functools.partial(_stand_empty, talk=talk, instead=instead))
    for name, remedy in _REFUSED.items():
        imports.provide(name, script_imports, functools.partial(_refuse, remedy=remedy))
    imports.provide("google.colab", script_imports, functools.partial(_colab, talk=talk))
    imports.provide("google", script_imports)
    imports.provide("kaggle_secrets", script_imports, functools.partial(_kaggle, talk=talk))
    imports.provide("IPython", script_imports, _ipython)
    imports.provide("pynvml", script_imports, functools.partial(_nvidia_library, talk=talk))


def missing_trackers(report_to: Any) -> tuple[Any, list[str]]:
    """What of ``report_to`` is installed.

    Returns:
        ``report_to`` without trackers that are not, and a line for each of those.
    """
    if not isinstance(report_to, (str, list, tuple)) or report_to in ("none", "all"):
        return report_to, []
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    asked = [report_to] if isinstance(report_to, str) else list(report_to)
    installed = get_available_reporting_integrations()
    missing = [name for name in asked if name in INTEGRATION_TO_CALLBACK and name not in installed]
    if not missing:
        return report_to, []
    left = [name for name in asked if name not in missing]
    notes = [
        f"report_to={name!r}: it is not installed, so nothing is reported to it; pip install "
        f"{_TRACKERS.get(name, name)}"
        for name in missing
    ]
    return left or "none", notes


class _Nothing:
    """Takes whatever a script says to a tracker."""

    def __call__(self, *args: Any, **kwargs: Any) -> _Nothing:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        # What scripts put into other settings.
        return "" if name in ("name", "id", "url", "project", "entity", "dir") else self

    def __getitem__(self, key: Any) -> _Nothing:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nobody reads it."""

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *error: Any) -> bool:
        return False

    def __iter__(self) -> Iterator:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return ""


class _Config(dict):
    """A tracker's ``config``: what the script puts in, by attribute too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def _answer(module: Any, answer: Callable[[str], Any]) -> None:
    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        return answer(name)

    module.__getattr__ = __getattr__


def _track_nothing(module: Any, talk: Talk, package: str) -> None:
    talk.once(
        f"{module.__name__.partition('.')[0]} is not installed: what the script sends to it goes nowhere; "
        f"pip install {package}"
    )
    config = _Config()

    def init(*args: Any, **kwargs: Any) -> _Nothing:
        given = kwargs.get("config")
        config.update(given if isinstance(given, Mapping) else vars(given) if hasattr(given, "__dict__") else {})
        run = _Nothing()
        vars(run)["config"] = config
        return run

    module.config, module.init = config, init
    _answer(module, lambda name: _Nothing())


def _stand_empty(module: Any, talk: Talk, instead: str) -> None:
    root = module.__name__.partition(".")[0]
    talk.once(f"{root} needs CUDA and is not here: {instead}")

    def answer(name: str) -> Any:
        full = f"{module.__name__}.{name}"
        if root == "liger_kernel":
            if name == "AutoLigerKernelForCausalLM":
                from transformers import AutoModelForCausalLM

                return AutoModelForCausalLM
            if name.startswith(("apply_", "_apply_")):
                return lambda *args, **kwargs: None
        return _Refusing(name, (), {"__module__": module.__name__, "full": full, "instead": instead})

    module.__version__ = "0.0"
    _answer(module, answer)


class _Refusing(type):
    """A name of such a package: it may be imported, compared and derived from, and refuses to be called."""

    full: str
    instead: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise SettingError(f"{cls.full}(…)", f"CUDA; {cls.instead}", f"remove {cls.full}")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Refusing(name, (), {"full": f"{cls.full}.{name}", "instead": cls.instead})


def _refuse(module: Any, remedy: str) -> None:
    raise AbsentPackage(f"import {module.__name__}", "what MLX runs: its kernels are CUDA's", remedy)


def _secret(talk: Talk, name: str) -> str:
    talk.once(f"secrets of a notebook's host: {name} is read from the environment")
    return os.environ.get(name, "")


def _colab(module: Any, talk: Talk) -> None:
    def mount(path: str = "/content/drive", *args: Any, **kwargs: Any) -> None:
        talk.once(f"google.colab.drive.mount({path!r}): nothing is mounted")

    def upload(*args: Any, **kwargs: Any) -> dict:
        talk.once("google.colab.files.upload(): nothing is uploaded")
        return {}

    def download(path: Any, *args: Any, **kwargs: Any) -> None:
        talk.once(f"google.colab.files.download({str(path)!r}): it is where it is")

    parts = {
        "userdata": SimpleNamespace(
            get=lambda key, *default: _secret(talk, key) or (default[0] if default else ""),
            SecretNotFoundError=KeyError, NotebookAccessError=PermissionError,
        ),
        "drive": SimpleNamespace(mount=mount, flush_and_unmount=lambda *args, **kwargs: None),
        "files": SimpleNamespace(upload=upload, download=download),
    }  # fmt: skip
    part = module.__name__.rpartition(".")[2]
    if part in parts:
        vars(module).update(vars(parts[part]))
    else:
        vars(module).update(parts)
        _answer(module, lambda name: _Nothing())


def _kaggle(module: Any, talk: Talk) -> None:
    class UserSecretsClient:
        """Kaggle's secrets, from the environment."""

        def get_secret(self, label: str) -> str:
            return _secret(talk, label)

        def get_gcloud_credential(self) -> str:
            return ""

    module.UserSecretsClient = UserSecretsClient


def _ipython(module: Any) -> None:
    def display(*shown: Any, **kwargs: Any) -> None:
        print(*shown, sep="\n")

    class Shown:
        """What a notebook would render, as its text."""

        def __init__(self, data: Any = "", *args: Any, **kwargs: Any) -> None:
            self.data = data

        def __repr__(self) -> str:
            return str(self.data)

    module.display = display if module.__name__ == "IPython.display" else SimpleNamespace(display=display)
    module.get_ipython = lambda: None
    module.clear_output = lambda *args, **kwargs: None
    for name in ("HTML", "Markdown", "Image", "JSON", "Javascript", "Audio", "Code", "Latex", "SVG"):
        setattr(module, name, type(name, (Shown,), {}))


def _nvidia_library(module: Any, talk: Talk) -> None:
    from . import cuda

    def memory(handle: Any) -> SimpleNamespace:
        total, used = cuda.total_memory(), cuda.reserved()
        talk.answered("nvmlDeviceGetMemoryInfo()", f"{used} of {total} bytes")
        return SimpleNamespace(total=total, used=used, free=total - used)

    vars(module).update(
        nvmlInit=lambda *args: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: cuda.device_name(),
        nvmlDeviceGetMemoryInfo=memory,
        NVMLError=RuntimeError,
    )
