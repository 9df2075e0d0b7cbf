"""``trainer.model`` of a model named by a string as files and on the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..adapters.export import write_adapter
from ..adapters.merge import merge_and_unload
from ..errors import AdapterError, SettingError
from ..models.save import write_model
from ..models.torch_arrays import to_mlx
from .facade_modules import Modules
from .hub import upload
from .parameters import Parameters
from .requests import check_keywords, unknown_keyword
from .writes import differs


def check_state(model: Any, state_dict: Mapping[str, Any]) -> None:
    """Refuse weights to be saved that are not the model's own.

    Raises:
        SettingError: Names the first of them.
    """
    held = model.state_dict()
    for name, value in state_dict.items():
        mine = held.get(name)
        if mine is None or differs(value, mine if isinstance(mine, mx.array) else to_mlx(mine)):
            raise SettingError(
                f"saving a state_dict with a {name} that is not this model's",
                "the model's own weights",
                "model.load_state_dict(state_dict) before, or leave state_dict= out",
            )


class Files(Modules):
    """``save_pretrained``, ``push_to_hub`` and what makes a plain model of an adapted one."""

    name_or_path: str

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
        model = self.loaded.model
        written = model.parameters() if self.adapter is None else model.trainable_parameters()
        arrays: dict[str, mx.array] = dict(tree_flatten(written))
        check_keywords(kwargs, sum(value.nbytes for value in arrays.values()))
        self.settle()
        if state_dict is not None:
            check_state(self, state_dict)
        if not is_main_process:
            return
        if self.adapter is not None:
            write_adapter(self.adapter, self.loaded, save_directory)
        else:
            write_model(self.loaded, save_directory)
        if push_to_hub:
            upload(Path(save_directory), repo or Path(save_directory).name, token=token)

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

    def merge_and_unload(self) -> Files:
        """Fold the adapter into the base, in place, and return the plain model. The trainer is done afterwards.

        Raises:
            AdapterError: There is no adapter.
        """
        if self.adapter is None:
            raise AdapterError("merge_and_unload() without an adapter", "an adapter", "model.save_pretrained(dir)")
        merge_and_unload(self.adapter)
        self.adapter = None
        self._parameters = Parameters(self.loaded, None)
        for name in ("peft_config", "tree"):
            vars(self).pop(name, None)
        return self

    def unload(self) -> Files:
        """PEFT's ``unload`` gives the base back; here the base is a load away."""
        raise AdapterError("unload()", "the base model", f"MLXSFTTrainer(model={self.name_or_path!r}, ...)")
