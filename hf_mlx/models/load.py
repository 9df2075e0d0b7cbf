"""From a folder or hub id to a model that computes what transformers computes, or to a named error."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ..errors import ModelError
from ..intake import describe
from ..settings.plan import ModelPlan
from .architectures import (
    BUFFERS,
    State,
    accepts_loss_kwargs,
    counts_every_label,
    look_up,
    module_renames,
    steps_for,
)
from .bitsandbytes import compute_dtype, describe_packed, find_packed, hold_packed, is_four_bit, unpack
from .classes import mlx_classes, with_layout
from .config import FILES, Config, check_generation_config, interpret, normalise, read_config
from .guards import check_config, check_layers
from .names import NameMap
from .overrides import adapt, model_classes, own_head
from .padding_row import named_padding_row
from .quantize import quantize_base
from .scoring import WEIGHT, check_head, check_scored, scored_class, scored_config
from .source import resolve_folder
from .unusual import unusual_options
from .weights import Checkpoint, inspect_checkpoint

_BUILDABLE = "a config.json with every key of its model type, each with a value that this type can have"


@dataclass
class LoadedModel:
    """A model ready to train, and what is known about it.

    Attributes:
        model: mlx-lm module in eval mode; floating parameters in ``plan.precision.dtype``.
        config: ``config.json`` as it was written.
        path: The folder it was read from.
        model_type: HF model type.
        names: Names and layouts, MLX ↔ HF.
        state: ``"verified"`` (compared with torch by the tests) or ``"unknown"``.
        accepts_loss_kwargs: Whether HF's class divides the loss by the tokens of the whole window.
        counts_every_label: Whether that count takes in the first label of each row, which is no target.
        buffers: Parameter paths that transformers holds as buffers: never to be trained.
        notes: What is done another way than upstream, one line each, to be said once.
        resized: Embedding and head have another number of rows than in the base that ``path`` names.
        decomposed: PEFT has taken an adapter's start (PiSSA, OLoRA) out of these weights already.
        untied: The head was tied to the embedding and has been given weights of its own, to be trained apart.
        sizes: Elements of each array of the whole model, by its path, where several processes hold it together.
        padding_row: Id whose row of the input embedding gets no gradient (torch's ``padding_idx``), or None.
        scores: It scores rows, and has no vocabulary head.
        fresh_head: The score is still to be drawn: the files hold none.
        head_draws: 32-bit draws of torch's generator that the score took.
    """

    model: nn.Module
    config: Config
    path: Path
    model_type: str
    names: NameMap
    state: State
    accepts_loss_kwargs: bool
    counts_every_label: bool = False
    buffers: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    resized: bool = False
    untied: bool = False
    decomposed: bool = False
    padding_row: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    scores: bool = False
    fresh_head: bool = False
    head_draws: int = 0

    def freeze_buffers(self) -> None:
        """Freezes what transformers holds as buffers. Call it after every ``model.unfreeze()``."""
        for path in self.buffers:
            owner, _, key = path.rpartition(".")
            module_at(self.model, owner).freeze(recurse=False, keys=key)

    def read_weights(self) -> None:
        """Reads what is still on disk, a module at a time: of what is cast or quantised no more is there twice."""
        for module in self.model.modules():
            mx.eval([value for value in module.values() if isinstance(value, mx.array)])


def load_model(path_or_id: str | Path, plan: ModelPlan) -> LoadedModel:
    """Loads a model that ``save_pretrained`` wrote, or that mlx-lm converted.

    Args:
        path_or_id: Local folder, or a hub id.
        plan: Revision, dtype and quantisation.

    Raises:
        ModelError: A folder, config, weight file or architecture that would not load right.
    """
    loaded = open_model(resolve_folder(path_or_id, plan), plan)
    loaded.read_weights()
    _check_finite(loaded)
    return loaded


def open_model(folder: Path, plan: ModelPlan) -> LoadedModel:
    """Like :func:`load_model`, with the weights left on disk until something needs them.

    Every check is made, in milliseconds. Each weight is then read straight into what it becomes: cast or quantised
    further before it is first evaluated, it never exists in the dtypes between. The files have to stay until then.

    Args:
        folder: Local.
        plan: dtype and quantisation.

    Raises:
        ModelError: As for :func:`load_model`.
    """
    config = read_config(folder)
    check_generation_config(folder)
    return assemble(folder, config, lambda: (inspect_checkpoint(folder), None), plan)


def assemble(
    folder: Path, config: Config, read: Callable[[], tuple[Checkpoint, dict[str, mx.array] | None]], plan: ModelPlan
) -> LoadedModel:
    """The stages of loading, wherever the weights come from; none of them evaluates the weights.

    Args:
        folder: Where the model came from.
        config: ``config.json`` as written.
        read: Called once the config is accepted; gives what is stored, and the weights under their stored names
            or None to have mlx-lm map the files of ``folder``.
        plan: dtype (``"auto"`` keeps each tensor's own) and quantisation.

    Raises:
        ModelError: As for :func:`load_model`.
    """
    with FILES.understood(folder / "config.json", _BUILDABLE):
        return _assemble(folder, config, read, plan)


def _assemble(
    folder: Path, config: Config, read: Callable[[], tuple[Checkpoint, dict[str, mx.array] | None]], plan: ModelPlan
) -> LoadedModel:
    # mlx-lm's layers bring transformers and torch, which the checks of a script do without.
    from .precision import cast_for_experts

    model_type = config["model_type"]
    architecture = look_up(config, folder)
    full = interpret(config)
    check_config(full, folder)
    if plan.scores:
        check_scored(config, folder)
    checkpoint, weights = read()
    fresh_head = check_head(checkpoint, folder, scores=plan.scores)
    four_bit = is_four_bit(config) and weights is None
    checkpoint, weights, packed = unpack(folder, checkpoint) if four_bit else (checkpoint, weights, {})
    check_layers(full, checkpoint, folder)
    steps = steps_for(full, checkpoint)
    # mlx-lm's own converter has renamed and stacked already, and only its sanitize reads packed weights.
    converts = checkpoint.layout == "hf" and (bool(packed) or not config.get("quantization_config"))
    model = _build(folder, full, steps if converts else None, weights, scores=plan.scores)
    coded = find_packed(model, packed)
    adapt(model, full, converts)
    cast_for_experts(model)
    if converts:
        _check_dtypes(model, folder)
    _cast(model, plan.precision.dtype)
    notes = quantize_base(model, plan, config)
    if packed:
        notes.append(describe_packed(hold_packed(model, coded, compute_dtype(config)), len(packed)))
    model.eval()
    params: Any = tree_flatten(model.parameters())
    shapes = {k: tuple(v.shape) for k, v in params}
    names = NameMap(steps, module_renames(model_type), shapes, checkpoint)
    if architecture.state == "unknown":
        warnings.warn(
            f"model type {model_type!r} has not been compared with transformers here. Before training, run: "
            f"hf-mlx doctor {folder}",
            stacklevel=2,
        )
    buffers = tuple(k for k, _ in params if k.endswith(BUFFERS))
    loaded = LoadedModel(
        model,
        scored_config(config) if plan.scores else config,
        folder,
        model_type,
        names,
        architecture.state,
        accepts_loss_kwargs(config),
        counts_every_label(config),
        buffers,
        notes,
        padding_row=named_padding_row(full),
        scores=plan.scores,
        fresh_head=fresh_head,
    )
    if plan.scores:
        # Files that hold none yet are saved with one.
        loaded.names = names.with_shapes({WEIGHT: shapes[WEIGHT]})
    loaded.freeze_buffers()
    return loaded


def _build(
    folder: Path,
    config: Config,
    steps: tuple | None,
    weights: dict[str, mx.array] | None = None,
    *,
    scores: bool = False,
) -> nn.Module:
    """Builds through mlx-lm's loader, or from ``weights``; ``steps`` None leaves them to mlx-lm's own ``sanitize``."""
    from mlx_lm.utils import load_model as load_mlx

    flat = normalise(config)
    untied = config.get("tie_word_embeddings") is False and not scores

    def classes(config: Config) -> tuple[Any, Any]:
        base, args = model_classes(flat["model_type"]) or mlx_classes(flat["model_type"])
        if untied and flat["model_type"] in own_head.EMBEDDINGS:
            base = own_head.building(base, flat["model_type"])
        base = scored_class(base) if scores else base
        known.extend(getattr(args, "__dataclass_fields__", ()))
        return (base if steps is None else with_layout(base, steps, flat)), args

    known: list[str] = []
    try:
        if weights is None:
            model, _ = load_mlx(folder, lazy=True, model_config=flat, get_model_classes=classes)
        else:
            model_class, args = classes(flat)
            model = model_class(args.from_dict(flat))
            model.load_weights(list(model.sanitize(weights).items()))
    except (ValueError, IndexError) as error:
        raise _mismatch(folder, config, error, known) from error
    except Exception as error:  # mlx-lm checks no value: it fails where one is used
        raise ModelError(
            f"{folder}: mlx-lm cannot build {config['model_type']!r} from it ({describe(error)})"
            f"{unusual_options(config, known)}",
            _BUILDABLE,
            "save it again with transformers 5: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)",
        ) from error
    return model


def _check_dtypes(model: nn.Module, folder: Path) -> None:
    parameters: Any = tree_flatten(model.parameters())
    wrong = [(name, value.dtype) for name, value in parameters if not mx.issubdtype(value.dtype, mx.floating)]
    if wrong:
        raise ModelError(
            f"{folder}: {wrong[0][0]} is stored as {str(wrong[0][1]).removeprefix('mlx.core.')}",
            "weights in floating point",
            FILES.remedy,
        )


def _check_finite(loaded: LoadedModel) -> None:
    parameters: Any = tree_flatten(loaded.model.parameters())
    for name, value in parameters:
        if mx.issubdtype(value.dtype, mx.floating) and not mx.isfinite(value).all().item():
            raise FILES.refuse(loaded.path, f"{name} holds NaN or infinite values", "finite weights")


def _cast(model: nn.Module, dtype: str) -> None:
    if dtype == "auto":
        return
    target = getattr(mx, dtype)
    model.update(tree_map(lambda x: x.astype(target) if mx.issubdtype(x.dtype, mx.floating) else x, model.parameters()))


def module_at(model: nn.Module, path: str) -> Any:
    """The module at a dotted path; the model itself for an empty one."""
    node: Any = model
    for part in path.split(".") if path else ():
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


def _mismatch(folder: Path, config: Config, error: Exception, known: list[str]) -> ModelError:
    text = " ".join(str(error).split())
    return ModelError(
        f"{folder}: the weights do not fit a {config['model_type']!r} of this config: {text[:400]}"
        f"{unusual_options(config, known)}",
        "exactly the tensors, with the shapes, that config.json describes",
        "config.json and the weights come from different models, or use an option mlx-lm lacks: save both together "
        "with model.save_pretrained(folder)",
    )
