"""What ``trainer.model`` is for a model named by a string: the MLX model under the names of a transformers one."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.export import write_adapter
from ..adapters.merge import merge_and_unload
from ..errors import AdapterError, SettingError
from ..models.load import LoadedModel
from ..models.save import write_model
from .forward import CausalLMOutput, run_forward
from .generation import Generation, like, read_ids, read_rows
from .hub import upload
from .loans import Loans
from .model_config import read_config, read_generation_config
from .parameters import ADAPTER_NAME, GradientCopies, Parameters
from .requests import check_keywords, unknown_keyword
from .ties import Tied, tie_copies
from .writes import differs


class Device(str):
    """A device name that answers like ``torch.device``: ``inputs.to(model.device)`` works with and without torch."""

    index = None  # pyright: ignore[reportAssignmentType]

    @property
    def type(self) -> str:
        """``"cpu"``: ids and logits cross into MLX from there."""
        return str(self)


class MLXCausalLM:
    """The model being trained, with the attributes and methods that scripts and callbacks use.

    Parameters come out as copies under HF's names (PEFT's where an adapter is attached), one at a time: torch
    tensors where torch is installed, else MLX arrays. What is written into a copy of a trained parameter is taken over
    before the next step, evaluation or save; a frozen one cannot be written.

    Args:
        loaded: The MLX model and its names.
        adapter: The attached adapter, or None.
        peft_config: The user's LoraConfig, shown as ``peft_config["default"]``.
        tokenizer: Its pad id becomes the config's.

    Attributes:
        config: transformers ``PreTrainedConfig``.
        generation_config: transformers ``GenerationConfig``.
        training: As ``torch.nn.Module.training``.
    """

    def __init__(
        self, loaded: LoadedModel, adapter: Adapter | None = None, peft_config: Any = None, tokenizer: Any = None
    ) -> None:
        self.loaded = loaded
        self.adapter = adapter
        self._parameters = Parameters(loaded, adapter)
        self.name_or_path = str(loaded.path)
        self.training = False
        self.settle: Callable[[], None] = lambda: None
        if peft_config is not None:
            self.peft_config = {ADAPTER_NAME: peft_config}
        self.config = read_config(loaded)
        self.generation_config = read_generation_config(loaded, self.config)
        pad = getattr(tokenizer, "pad_token_id", None)
        if pad is not None:
            self.config.get_text_config().pad_token_id = self.generation_config.pad_token_id = pad

    @property
    def gradients(self) -> GradientCopies:
        """What ``grad`` of the copies is while a step's are lent."""
        return self._parameters.gradients

    @property
    def lent(self) -> Loans:
        """The copies of parameters that are out."""
        return self._parameters.lent

    def tie(self, parameters: list[Any]) -> Tied:
        """Ties between copies in an optimizer and what is trained."""
        return tie_copies(self._parameters, parameters)

    def parameter_paths(self) -> dict[str, str]:
        """HF's name to MLX path."""
        return self._parameters.paths

    @property
    def mlx(self) -> nn.Module:
        """The MLX module itself."""
        return self.loaded.model

    @property
    def device(self) -> Device:
        """Where inputs are expected: ``"cpu"``. Memory is unified, so nothing needs to be moved."""
        return Device("cpu")

    @property
    def dtype(self) -> Any:
        """Of the first floating parameter: a torch dtype where torch is loaded, else an MLX one."""
        found, torch = self._parameters.dtype(), sys.modules.get("torch")
        return found if torch is None else getattr(torch, str(found).rsplit(".", 1)[-1])

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """(name, copy) of every parameter, in HF's order; ``requires_grad`` is set on torch's."""
        for name in self._parameters.paths:
            yield name, self._parameters.copy(name)

    def parameters(self) -> Iterator[Any]:
        """The copies of :meth:`named_parameters`."""
        return (value for _, value in self.named_parameters())

    def parameters_at(self, paths: Iterable[str]) -> list[Any]:
        """Copies of those at these MLX paths."""
        return self._parameters.copies_at(paths)

    def get_parameter(self, target: str) -> Any:
        """A copy of one parameter.

        Raises:
            AttributeError: There is none of that name.
        """
        if target not in self._parameters.paths:
            raise AttributeError(f"{type(self).__name__} has no parameter {target!r}; named_parameters() lists them")
        return self._parameters.copy(target)

    def state_dict(self) -> dict[str, Any]:
        """All parameters by name; copies."""
        return dict(self.named_parameters())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Write trained parameters by name.

        Raises:
            RuntimeError: With ``strict``, names are missing or unknown (as torch's).
        """
        known = self._parameters.paths
        missing, unexpected = sorted(known.keys() - state_dict.keys()), sorted(state_dict.keys() - known.keys())
        if strict and (missing or unexpected):
            raise RuntimeError(f"load_state_dict: missing {missing[:3]}, unexpected {unexpected[:3]}")
        for name in known.keys() & state_dict.keys():
            copy = self._parameters.copy(name)
            getattr(copy, "data", copy)[...] = state_dict[name]
        self.settle()

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the parameters hold (a quantised weight counts as what it stands for)."""
        return self._parameters.count(only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all), as PEFT counts them."""
        return self.num_parameters(only_trainable=True), self.num_parameters()

    def print_trainable_parameters(self) -> None:
        """PEFT's line (peft 0.21 ``PeftModel.print_trainable_parameters``)."""
        trained, held = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {held:,d} || trainable%: {100 * trained / held:.4f}")

    def generate(self, inputs: Any = None, generation_config: Any = None, **options: Any) -> Any:
        """Greedy decoding or sampling, with ``transformers.GenerationMixin.generate``'s keywords.

        Args:
            inputs: Ids (B, T) or (T,): a torch tensor, a numpy array or lists; also ``input_ids=``.
            generation_config: A ``GenerationConfig``; None is the model's own.
            **options: ``attention_mask``, ``streamer`` and fields of GenerationConfig, which win.

        Returns:
            Prompt and new ids (B, T + new), padded at the end; torch if torch came in, else numpy int64.

        Raises:
            SettingError: An option that is not honoured here.
        """
        ids = options.pop("input_ids", inputs)
        if ids is None:
            raise SettingError("generate() without input_ids", "the prompt's ids", "model.generate(**inputs)")
        mask, streamer = options.pop("attention_mask", None), options.pop("streamer", None)
        generation = Generation.resolve(generation_config or self.generation_config, options)
        with self._evaluating():
            rows = generation.run(self.mlx, read_rows(ids, mask), width=read_ids(ids).shape[1], streamer=streamer)
        return like(ids, np.concatenate([np.repeat(read_ids(ids), generation.copies, 0), rows], axis=1))

    def __call__(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> CausalLMOutput:
        """A forward pass without gradients.

        Args:
            input_ids: (B, T) or (T,).
            attention_mask: (B, T), 1 for real tokens; padding on one side of each row.
            labels: (B, T), -100 where nothing is scored.

        Raises:
            SettingError: Padding on the left of a model with absolute positions.
        """
        with self._evaluating():
            return run_forward(self.loaded, input_ids, attention_mask, labels)

    forward = __call__

    def train(self, mode: bool = True) -> MLXCausalLM:
        """Set ``training``. Forward passes and generation here never drop anything; training does by itself."""
        self.training = mode
        return self

    def eval(self) -> MLXCausalLM:
        """Set ``training`` to False."""
        return self.train(False)

    def to(self, *args: Any, **kwargs: Any) -> MLXCausalLM:
        """The model as it is: memory is unified. A change of dtype is refused."""
        dtypes = [v for v in (*args, *kwargs.values()) if "float" in str(v)]
        if dtypes and str(dtypes[0]).rsplit(".", 1)[-1] != str(self.dtype).rsplit(".", 1)[-1]:
            raise SettingError(
                f"model.to({dtypes[0]})", f"the dtype it was loaded in, {self.dtype}", "SFTConfig(model_init_kwargs="
                f'{{"dtype": "{str(dtypes[0]).rsplit(".", 1)[-1]}"}})'
            )  # fmt: skip
        return self

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the adapter for PEFT, or the whole model for transformers.

        Args:
            save_directory: Where to.
            is_main_process: False writes nothing.
            state_dict: The weights to write: those of this model.
            push_to_hub: Upload them as ``repo_id``.
            **kwargs: Other keywords of transformers and PEFT, as far as they ask for what is done anyway.

        Raises:
            SettingError: A keyword that is not honoured here.
        """
        repo, token = kwargs.pop("repo_id", None), kwargs.pop("token", None)
        check_keywords(kwargs)
        self.settle()
        if state_dict is not None:
            self._check_own(state_dict)
        if not is_main_process:
            return
        if self.adapter is not None:
            write_adapter(self.adapter, self.loaded, save_directory)
        else:
            write_model(self.loaded, save_directory)
        if push_to_hub:
            upload(Path(save_directory), repo or Path(save_directory).name, token=token)

    def _check_own(self, state_dict: Mapping[str, Any]) -> None:
        for name, value in state_dict.items():
            if name not in self._parameters.paths or differs(value, self._parameters.read(name)):
                raise SettingError(
                    f"save_pretrained(state_dict=…) with a {name} that is not this model's",
                    "the model's own weights",
                    "model.load_state_dict(state_dict) before, or leave state_dict= out",
                )

    def push_to_hub(
        self, repo_id: str, *, commit_message: str | None = None, private: bool | None = None, token: Any = None,
        revision: str | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Upload what :meth:`save_pretrained` writes; gives the hub's commit."""
        if kwargs:
            raise unknown_keyword("push_to_hub", kwargs)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder, "model"))
            message = commit_message or "Upload model"
            return upload(
                Path(folder, "model"), repo_id, message=message, private=private, token=token, revision=revision
            )

    def merge_and_unload(self) -> MLXCausalLM:
        """Fold the adapter into the base, in place, and return the plain model. The trainer is done afterwards.

        Raises:
            AdapterError: There is no adapter.
        """
        if self.adapter is None:
            raise AdapterError("merge_and_unload() without an adapter", "an adapter", "model.save_pretrained(dir)")
        merge_and_unload(self.adapter)
        self.adapter = None
        self._parameters = Parameters(self.loaded, None)
        vars(self).pop("peft_config", None)
        return self

    def unload(self) -> MLXCausalLM:
        """PEFT's ``unload`` gives the base back; here the base is a load away."""
        raise AdapterError("unload()", "the base model", f"MLXSFTTrainer(model={self.name_or_path!r}, ...)")

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.settle()
        mode = self.mlx.training
        self.mlx.eval()
        try:
            yield
        finally:
            self.mlx.train(mode)
