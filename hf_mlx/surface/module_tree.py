"""The modules of a transformers model or PeftModel around parameters that MLX trains."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

from ..adapters.adapter import Adapter
from ..checkpoints.parameters import build_live_model
from ..errors import MissingDependency, SettingError, TrainingError
from ..models.alterations import SILENT, fill_buffers
from ..models.load import LoadedModel
from .parameters import Parameters

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MOVING = SILENT | {"_parameters", "_buffers", "_modules", *_HOOKS}
_PLAIN = (bool, int, float, str, tuple, type(None))


class ModuleTree:
    """torch's modules of a model whose weights MLX holds; made without memory for weights.

    The parameters of the modules are copies, made when somebody looks at one.

    Args:
        loaded: The MLX model.
        config: Its transformers config.
        adapter: The attached adapter, or None.
        peft_config: The user's LoraConfig, or None.
        parameters: Those that can be copied, by HF names.

    Attributes:
        root: The ``transformers`` model, or the ``PeftModel`` around it.
        aliases: Names of tied parameters, which are another one's: name → the other's.
        missing: Names of parameters that MLX holds otherwise (stacked experts), or no longer (``original_module``).

    Raises:
        MissingDependency: torch is not installed, or peft where there is an adapter.
        CheckpointError: transformers has no such model.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: Any,
        adapter: Adapter | None,
        peft_config: Any,
        parameters: Parameters,
    ) -> None:
        self.root = _make(loaded, config, adapter, peft_config)
        self.aliases: dict[str, str] = {}
        self.missing: list[str] = []
        first: dict[int, str] = {}
        for path, module in self.root.named_modules():
            held = {}
            for leaf, value in module._parameters.items():
                name = f"{path}.{leaf}".lstrip(".")
                if value is not None:
                    owner = first.setdefault(id(value), name)
                    if owner != name:
                        self.aliases[name] = owner
                    elif name not in parameters.paths:
                        self.missing.append(name)
                    name = owner
                held[leaf] = None if value is None else name
            module._parameters = _Copies(path, held, parameters)
        self._made = self._describe()

    def find_change(self) -> str | None:
        """What a script has changed in a module, other than its parameters; None for nothing."""
        now = self._describe()
        for path, values in now.items():
            before = self._made.get(path)
            if before is None:
                return f"{path}, a module that was added"
            for name in sorted(values.keys() | before.keys()):
                if values.get(name) != before.get(name):
                    what = f"a {name[1:-1].replace('_', ' ')}" if name in _HOOKS else name
                    return f"{what} set on {path or 'the model'}"
        return next((f"{path}, a module that was taken away" for path in self._made if path not in now), None)

    def copy(self) -> Any:
        """A torch model of its own, with the weights as they are now.

        Raises:
            SettingError: A parameter is not held as it is in torch.
        """
        if self.missing:
            raise SettingError(
                f"copy.deepcopy(model) of a model with {self.missing[0]}, which is not held as it is in torch",
                "parameters that are one array each in MLX too",
                "{name: value.clone() for name, value in model.state_dict().items()}, or trainer.save_model(dir)",
            )
        return copy.deepcopy(self.root)

    def _describe(self) -> dict[str, dict[str, Any]]:
        return {path: dict(_values(module)) for path, module in self.root.named_modules(remove_duplicate=False)}


def refuse_changed_module(change: str, event: str | None) -> None:
    """Refuse what a script did to a module of :class:`ModuleTree`.

    Raises:
        TrainingError: Always.
    """
    raise TrainingError(
        f"{change}{f' in {event}' if event else ''}",
        "modules that are read: the forward pass is MLX's, and nothing set on one of them would take part in it",
        "train the torch object itself, changed before: MLXSFTTrainer(model=AutoModelForCausalLM.from_pretrained(…)); "
        "a hook: handle.remove() before the event is over",
    )


class _Copies(dict):
    """The parameters of a module, each copied when somebody asks for it."""

    def __init__(self, path: str, held: dict[str, str | None], parameters: Parameters) -> None:
        super().__init__(held)
        self._path, self._parameters = path, parameters

    def __getitem__(self, leaf: str) -> Any:
        name = super().__getitem__(leaf)
        if name is None:
            return None
        if name not in self._parameters.paths:
            raise SettingError(
                f"{name}, which is not held as it is in torch",
                "a parameter that is one array in MLX too",
                "model.named_parameters() lists those there are",
            )
        return self._parameters.copy(name)

    def get(self, leaf: str, default: Any = None) -> Any:
        return self[leaf] if leaf in self else default  # noqa: SIM401 - get() is what this is

    def values(self) -> Any:
        return [self[leaf] for leaf in self]

    def items(self) -> Any:
        return [(leaf, self[leaf]) for leaf in self]

    def __setitem__(self, leaf: str, value: Any) -> None:
        name = f"{self._path}.{leaf}".lstrip(".")
        raise TrainingError(
            f"{name} = another parameter",
            "the parameter that is trained: a new one is none that the step knows",
            f"with torch.no_grad(): model.get_parameter({name!r}).copy_(value)",
        )

    def __deepcopy__(self, memo: dict[Any, Any]) -> dict[str, Any]:
        import torch

        made: dict[str, Any] = {}
        for leaf, name in super().items():
            if name is not None and ("parameter", name) not in memo:
                held = self[leaf]
                memo["parameter", name] = torch.nn.Parameter(held.detach().clone(), requires_grad=held.requires_grad)
            made[leaf] = None if name is None else memo["parameter", name]
        return made


def _make(loaded: LoadedModel, config: Any, adapter: Adapter | None, peft_config: Any) -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingDependency(
            "the modules of a model", "torch, whose modules they are", "pip install torch"
        ) from error
    with torch.random.fork_rng(devices=[]):
        model = build_live_model({**loaded.config, **config.to_dict()})
        for module in model.modules():
            fill_buffers(model, module)
        # The very objects that the script sees.
        model.config = config
        return model if adapter is None else _wrap(model, adapter, peft_config)


def _wrap(model: Any, adapter: Adapter, peft_config: Any) -> Any:
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise MissingDependency(
            "the modules of an adapter", "peft, whose modules they are", "pip install peft"
        ) from error
    wanted = copy.copy(peft_config)
    # Weights are those that are trained, wherever the config began; layers those that were chosen.
    wanted.init_lora_weights = True
    wanted.target_modules = {target.hf_path for target in adapter.targets}
    wanted.layers_to_transform = wanted.layers_pattern = wanted.exclude_modules = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = get_peft_model(model, wanted, low_cpu_mem_usage=True)
    made.base_model.peft_config["default"] = peft_config
    return made


def _values(module: Any) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name not in _MOVING:
            yield name, _plain(value)
    for name in _HOOKS:
        yield name, tuple(getattr(module, name))
    yield "_modules", tuple((name, id(value)) for name, value in module._modules.items())


def _plain(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict) and all(isinstance(held, _PLAIN) for held in value.values()):
        return tuple(value.items())
    return id(value)
