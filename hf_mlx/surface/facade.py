"""What ``trainer.model`` is for a model named by a string: the MLX model under the names of a transformers one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn
import numpy as np

from ..adapters.adapter import Adapter
from ..errors import SettingError
from ..models.load import LoadedModel
from .facade_files import Files
from .forward import CausalLMOutput, run_forward
from .generation import Generation, like, read_ids, read_rows
from .model_config import read_config, read_generation_config
from .parameters import ADAPTER_NAME, Parameters


class Device(str):
    """A device name that answers like ``torch.device``: ``inputs.to(model.device)`` works with and without torch."""

    index = None  # pyright: ignore[reportAssignmentType]

    @property
    def type(self) -> str:
        """``"cpu"``: ids and logits cross into MLX from there."""
        return str(self)


class MLXCausalLM(Files):
    """The model being trained, with the attributes and methods that scripts and callbacks use.

    Its parameters are those of :class:`~hf_mlx.surface.facade_weights.Weights`, its modules those of
    :class:`~hf_mlx.surface.facade_modules.Modules`: transformers' and PEFT's own, to be read.

    Args:
        loaded: The MLX model and its names.
        adapter: The attached adapter, or None.
        peft_config: The user's LoraConfig, shown as ``peft_config["default"]``.
        tokenizer: Its pad id becomes the config's.
        name: What the user called it; None is its folder.

    Attributes:
        config: transformers ``PreTrainedConfig``.
        generation_config: transformers ``GenerationConfig``.
        training: As ``torch.nn.Module.training``.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        adapter: Adapter | None = None,
        peft_config: Any = None,
        tokenizer: Any = None,
        *,
        name: str | None = None,
    ) -> None:
        self.loaded = loaded
        self.adapter = adapter
        self._parameters = Parameters(loaded, adapter)
        self.name_or_path = name or str(loaded.path)
        self.model_tags: list[str] | None = None
        self.training = False
        self.settle: Callable[[], None] = lambda: None
        if peft_config is not None:
            self.peft_config = {ADAPTER_NAME: peft_config}
            # PEFT writes it into the object that it is given.
            peft_config.base_model_name_or_path = self.name_or_path
        self.config = read_config(loaded, self.name_or_path)
        self.generation_config = read_generation_config(loaded, self.config)
        pad = getattr(tokenizer, "pad_token_id", None)
        if pad is not None:
            self.config.get_text_config().pad_token_id = self.generation_config.pad_token_id = pad

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Add tags of a model card, as ``PreTrainedModel.add_model_tags`` does."""
        given = [tags] if isinstance(tags, str) else tags
        self.model_tags = list(dict.fromkeys([*(self.model_tags or ()), *given]))

    @property
    def mlx(self) -> nn.Module:
        """The MLX module itself."""
        return self.loaded.model

    @property
    def device(self) -> Device:
        """Where inputs are expected: ``"cpu"``. Memory is unified, so nothing needs to be moved."""
        return Device("cpu")

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
        split = None if self.adapter is None else self.adapter.split
        ways = 1 if split is None else split.world.size
        prompts, width = read_rows(ids, mask), read_ids(ids).shape[1]
        with self._evaluating():
            rows = generation.run(self.mlx, prompts, width=width, streamer=streamer, ways=ways)
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

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.settle()
        mode = self.mlx.training
        self.mlx.eval()
        try:
            yield
        finally:
            self.mlx.train(mode)
