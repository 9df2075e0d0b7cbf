"""The map between MLX parameter paths and the names a Hugging Face checkpoint and PEFT use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import ModelError
from .layouts import Rename, Step
from .weights import Checkpoint, Tensor

# Where a language model's head is stored; one of these that no parameter holds is tied to the embedding.
_HEADS = ("lm_head.weight", "embed_out.weight")
_PROBE = ".weight"  # modules are mapped through the name of a parameter they would own


class NameMap:
    """Names and layouts of one loaded model, both ways.

    Args:
        steps: HF → MLX steps in the order of loading.
        modules: Renames from the checkpoint's names to the module paths of the live HF model, where
            transformers names them differently (Gemma 3 with vision). PEFT keys use the latter.
        shapes: Shape of every MLX parameter (E comes from here for stacked experts).
        checkpoint: The files it was loaded from.
    """

    def __init__(
        self,
        steps: Iterable[Step],
        modules: Iterable[Rename],
        shapes: Mapping[str, tuple[int, ...]],
        checkpoint: Checkpoint,
    ) -> None:
        self._steps = tuple(steps)
        self._modules = tuple(modules)
        self._shapes = dict(shapes)
        self._checkpoint = checkpoint

    @property
    def stored(self) -> frozenset[str]:
        """Tensor names in the checkpoint's own files."""
        return frozenset(self._checkpoint.tensors)

    def is_stored(self, name: str) -> bool:
        """Whether the checkpoint's own files hold this tensor."""
        return name in self._checkpoint.tensors

    @property
    def converted(self) -> bool:
        """Whether mlx-lm wrote the files, which keeps the language model alone."""
        return self._checkpoint.layout == "mlx"

    @property
    def untouched(self) -> frozenset[str]:
        """Stored tensors that no MLX parameter holds (a vision tower, buffers): copy them when saving in full."""
        if self._checkpoint.layout == "mlx":
            return frozenset()
        return self.stored - {n for p in self._shapes for n in self.to_hf_names(p)}

    def with_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> NameMap:
        """The map of a model in which these parameters have these shapes, or are new.

        Args:
            shapes: MLX path → shape; the same in both layouts, as for embedding and head.
        """
        tensors = dict(self._checkpoint.tensors)
        if self._checkpoint.layout == "hf":
            for path, shape in shapes.items():
                name = self.to_hf_name(path)
                known = tensors.get(name)
                tensors[name] = Tensor(known.dtype if known else "F32", shape, known.file if known else "")
        checkpoint = replace(self._checkpoint, tensors=tensors)
        return NameMap(self._steps, self._modules, {**self._shapes, **shapes}, checkpoint)

    def load_untouched(self, folder: Path) -> dict[str, mx.array]:
        """The tensors of :attr:`untouched` from the files in ``folder``, by stored name.

        A head that is tied is the embedding and a rotary table is computed, so neither is among them.
        """
        names = {n for n in self.untouched if not n.endswith((*_HEADS, "rotary_emb.inv_freq"))}
        files = sorted({self._checkpoint.tensors[n].file for n in names})
        loaded: list[Any] = [mx.load(str(folder / file)) for file in files]
        return {n: v for arrays in loaded for n, v in arrays.items() if n in names}

    def to_hf_names(self, mlx_param: str) -> list[str]:
        """HF tensor names that make up one MLX parameter; as many as experts where those are stacked."""
        names = [mlx_param]
        for step in reversed(self._steps):
            names = [n for name in names for n in step.hf_names(name)]
        if any("{e}" in n for n in names):
            experts = self._experts(mlx_param)
            names = [n.replace("{e}", str(e)) for n in names for e in range(experts)]
        return names

    def to_hf_name(self, mlx_param: str) -> str:
        """The HF tensor that an MLX parameter is (or is a part of).

        Raises:
            ModelError: The parameter stacks several HF tensors; :meth:`to_hf_names` lists them.
        """
        names = self.to_hf_names(mlx_param)
        if len(names) != 1:
            raise ModelError(
                f"MLX parameter {mlx_param!r} stacks {len(names)} tensors",
                "a parameter with one Hugging Face name",
                f"names.to_hf_names({mlx_param!r})",
            )
        return names[0]

    def to_hf_modules(self, mlx_module: str) -> list[str]:
        """HF module paths for one MLX module path; one for each expert where those are stacked."""
        names = self.to_hf_names(mlx_module + _PROBE)
        for rename in self._modules:
            names = [rename.mlx_name(n) for n in names]
        return [n.removesuffix(_PROBE) for n in names]

    def to_hf_module(self, mlx_module: str) -> str:
        """The HF module path (as PEFT sees it) of an MLX module path.

        Raises:
            ModelError: The module stacks several HF modules; :meth:`to_hf_modules` lists them.
        """
        paths = self.to_hf_modules(mlx_module)
        if len(paths) != 1:
            raise ModelError(
                f"MLX module {mlx_module!r} stacks {len(paths)} modules",
                "a module with one Hugging Face path",
                f"names.to_hf_modules({mlx_module!r})",
            )
        return paths[0]

    def from_hf_module(self, hf_path: str) -> str:
        """The MLX module path of an HF module path; an expert's path gives the stacked module."""
        name = hf_path + _PROBE
        for rename in reversed(self._modules):
            name = rename.hf_names(name)[0]
        for step in self._steps:
            name = step.mlx_name(name)
        return name.removesuffix(_PROBE)

    def from_hf_name(self, hf_name: str) -> str:
        """The MLX parameter that an HF tensor goes into."""
        for step in self._steps:
            hf_name = step.mlx_name(hf_name)
        return hf_name

    def export_weights(self, params: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Gives MLX parameters back under HF's names and layouts.

        Args:
            params: MLX path to array; all parameters, or any subset that holds whole HF tensors.

        Returns:
            HF tensor name to array, dtypes unchanged.

        Raises:
            ModelError: A parameter is quantised, or a name or shape is not the checkpoint's own.
        """
        packed = next((n for n in params if n.endswith((".scales", ".biases"))), None)
        if packed is not None:
            raise ModelError(
                f"quantised parameter {packed!r}",
                "weights in floating point, as Hugging Face stores them",
                "dequantise first: hf-mlx merge --dequantize",
            )
        weights = dict(params)
        for step in reversed(self._steps):
            weights = step.save(weights)
        self._check(weights)
        return weights

    def import_weights(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Turns HF tensors into MLX parameters; tensors that no parameter holds are left out."""
        params = dict(weights)
        for step in self._steps:
            params = step.load(params)
        return {k: v for k, v in params.items() if k in self._shapes}

    def _experts(self, mlx_param: str) -> int:
        shape = self._shapes.get(mlx_param)
        if shape is None:
            # A module wrapped by an adapter has lost its plain weight; its siblings have the same first axis.
            stem = mlx_param.rsplit(".", 2)[0] + "."
            shape = next((s for n, s in self._shapes.items() if n.startswith(stem) and len(s) > 1), None)
        if not shape:
            raise ModelError(
                f"MLX parameter {mlx_param!r}",
                "a parameter of this model",
                "list them with dict(mlx.utils.tree_flatten(model.parameters()))",
            )
        return shape[0]

    def _check(self, weights: Mapping[str, mx.array]) -> None:
        if self._checkpoint.layout == "mlx":
            return
        stored = self._checkpoint.tensors
        unknown = sorted(n for n in weights if n not in stored)
        wrong = unknown or sorted(n for n, w in weights.items() if stored[n].shape != tuple(w.shape))
        if wrong:
            name = wrong[0]
            what = "a name the checkpoint does not have" if unknown else f"shape {tuple(weights[name].shape)}"
            raise ModelError(
                f"{name!r}: {what} ({len(wrong)} such tensor(s))",
                "the names and shapes of the model's own files",
                "export the adapter instead (trainer.save_model(dir)), or name the base model this was trained from",
            )
