"""The optimizer's state as ``optimizer.pt`` has it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError
from ..settings.plan import OptimPlan
from .parameters import Parameters

# {torch's state name: {MLX parameter name: array}}
Moments = dict[str, dict[str, mx.array]]
_COMMON = {"maximize": False, "foreach": None, "differentiable": False}
# Options of a parameter group that change how torch computes, not what.
_SPEED = {"foreach", "capturable", "differentiable", "fused", "lr", "initial_lr", "params"}
# Argument that sets a group's option, for the remedy.
_ARGUMENTS = {"betas": "adam_beta1 and adam_beta2", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
# How the optimizer counts its steps: torch's tensors, transformers' Adafactor's int; the others do not.
_STEPS = {"adamw": mx.array, "adagrad": mx.array, "rmsprop": mx.array, "adafactor": int}


def group_options(plan: OptimPlan, *, fused: bool) -> dict[str, Any]:
    """The options of a parameter group, in torch 2.13's order (transformers' Adafactor, bitsandbytes' Lion)."""
    options = dict(plan.options)
    betas = (plan.adam_beta1, plan.adam_beta2)
    groups: dict[str, dict[str, Any]] = {
        "adamw": {"betas": betas, "eps": plan.adam_epsilon, "amsgrad": False, **_COMMON, "capturable": False}
        | {"fused": True if fused else None, "decoupled_weight_decay": True},
        "sgd": {"momentum": 0, "dampening": 0, "nesterov": False} | options | {**_COMMON, "fused": None},
        "adagrad": {"lr_decay": 0, "eps": 1e-10} | options | {"initial_accumulator_value": 0, **_COMMON, "fused": None},
        "rmsprop": {"momentum": 0, "alpha": 0.99, "eps": 1e-8, "centered": False} | options
        | {**_COMMON, "capturable": False},
        "adafactor": {"eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None}
        | {"scale_parameter": False, "relative_step": False, "warmup_init": False},
        "lion": {"betas": betas, "eps": 0.0},
    }  # fmt: skip
    return groups[plan.name]


def dump_optimizer(
    step: Any, parameters: Parameters, plan: OptimPlan, *, lr: float, base_lr: float | None, updates: int, fused: bool
) -> tuple[dict[str, Any], bool]:
    """The content of ``optimizer.pt``.

    Args:
        step: The training step: ``params``, ``state`` and ``optimizer`` are read.
        parameters: Names and layouts.
        plan: The optimizer's settings.
        lr: Learning rate of the next step.
        base_lr: ``initial_lr`` of the groups; None leaves it out, as the schedules that follow a metric do.
        updates: Steps this optimizer has made.
        fused: The fused AdamW was asked for.

    Returns:
        ``{"state": …, "param_groups": …}`` with arrays as ``mx.array``, and whether torch can read it. Where torch
        has other parameters than the files (fused experts), they go by name, which only this library reads.
    """
    moments: Moments = step.state
    shapes = {name: tuple(value.shape) for name, value in step.params.items()}
    owners = parameters.owners()
    reduced = {n for held in moments.values() for n, value in held.items() if tuple(value.shape) != shapes[n]}
    if all(parameters.is_plain(name) for name in reduced):
        stored = {slot: parameters.to_hf(held) for slot, held in moments.items()}
        sizes = parameters.to_hf(step.params) if plan.name == "adafactor" else {}
    else:
        stored, owners, sizes = moments, {name: name for name in shapes}, step.params
    order = parameters.order()
    by_id = order is not None and set(order) >= set(owners)
    names = list(order) if by_id and order is not None else list(owners)
    groups = _groups(names, owners, step)
    keys = {name: i if by_id else name for i, name in enumerate(n for group in groups for n in group)}

    def entry(name: str) -> dict[str, Any]:
        values: dict[str, Any] = {slot: held[name] for slot, held in stored.items() if name in held}
        if plan.name in _STEPS:
            kind = _STEPS[plan.name]
            values = {"step": kind(updates) if kind is int else mx.array(float(updates)), **values}
        if plan.name == "adafactor":
            values["RMS"] = mx.sqrt(mx.mean(mx.square(sizes[name].astype(mx.float32))))
        return values

    state = {keys[name]: held for name in keys if name in owners and (held := entry(name)) and updates}
    initial = {} if base_lr is None else {"initial_lr": base_lr}
    options = group_options(plan, fused=fused)
    param_groups = [
        {"weight_decay": decay, "lr": lr, **options, **initial, "params": [keys[n] for n in group]}
        for decay, group in zip((plan.weight_decay, 0.0), groups, strict=True)
    ]
    return {"state": state, "param_groups": param_groups}, by_id


def load_optimizer(
    tree: Mapping[str, Any], step: Any, parameters: Parameters, plan: OptimPlan, folder: Path
) -> tuple[Moments, int | None]:
    """The optimizer's state from the content of ``optimizer.pt``, whoever wrote it.

    Args:
        tree: What :func:`dump_optimizer` or torch's ``state_dict()`` returned.
        step: The training step that is to go on with it; not changed.
        parameters: Names and layouts.
        plan: The optimizer's settings now.
        folder: For messages.

    Returns:
        The state, and the steps the optimizer had made (None where it does not count them).

    Raises:
        CheckpointError: Another optimizer, another model, or other settings than the arrays were made with.
    """
    groups = _read_groups(tree, folder)
    _compare_options(groups, plan, folder)
    names = _names(groups, step, parameters, folder)
    updates = _read_updates(tree["state"], folder)
    if not tree["state"]:
        return step.optimizer.init(step.params), updates
    owned = parameters.owners()
    by_mlx_name = not {names[key] for key in tree["state"]} <= owned.keys()
    stored: dict[str, dict[str, mx.array]] = {}
    for key, values in tree["state"].items():
        for slot, value in values.items():
            if isinstance(value, mx.array) and slot not in ("step", "RMS"):
                stored.setdefault(slot, {})[names[key]] = value
    moments = {slot: dict(held) if by_mlx_name else parameters.from_hf(held) for slot, held in stored.items()}
    return _fit(moments, step, folder), updates


def _read_groups(tree: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    try:
        groups = list(tree["param_groups"])
        if len(groups) != 2 or not all(isinstance(group["params"], list) for group in groups):
            raise ValueError(f"{len(groups)} parameter groups")
        if not set(tree["state"]) <= {key for group in groups for key in group["params"]}:
            raise ValueError("state of parameters that no group lists")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: an optimizer state with {type(error).__name__}: {error}",
            "the state of one optimizer in two groups, with and without weight decay, as the Trainer makes them",
            "a checkpoint of transformers' Trainer, trl's SFTTrainer or hf_mlx",
        ) from error
    return groups


def _compare_options(groups: list[dict[str, Any]], plan: OptimPlan, folder: Path) -> None:
    ours = {"weight_decay": plan.weight_decay, **group_options(plan, fused=False)}
    for option, value in ours.items():
        if option in _SPEED or _plain(groups[0].get(option)) == _plain(value):
            continue
        if option not in groups[0]:
            raise CheckpointError(
                f"{folder}: the state of another optimizer than {plan.name!r} (no {option!r} in it)",
                "the optimizer that the checkpoint was written with",
                "set optim= as in that run, or begin anew: trainer.train() without resume_from_checkpoint",
            )
        raise CheckpointError(
            f"{folder}: {option}={_plain(groups[0][option])!r} in the checkpoint, {_plain(value)!r} in the arguments",
            "the same value; upstream goes on with the checkpoint's without a word",
            f"set {_ARGUMENTS.get(option, f'optim_args ({option})')} to {_plain(groups[0][option])!r}",
        )


def _names(groups: list[dict[str, Any]], step: Any, parameters: Parameters, folder: Path) -> dict[Any, str]:
    keys = [key for group in groups for key in group["params"]]
    owners = parameters.owners()
    if all(isinstance(key, str) for key in keys):
        if set(keys) not in (set(owners), set(step.params)):
            raise _other_model(
                folder, f"{len(keys)} parameters, among them {next(iter(set(keys) - set(owners)), '')!r}"
            )
        return {key: key for key in keys}
    order = parameters.order()
    if order is None or not set(order) >= set(owners):
        raise CheckpointError(
            f"{folder}: an optimizer state by number, for a model whose torch order is not known here",
            "torch and transformers, which know it, and a model whose torch parameters are those of its files",
            'pip install "hf-mlx[hf]", or SFTConfig(save_only_model=True) with only the weights of this checkpoint',
        )
    ours = _groups(order, owners, step)
    counts = [len(group["params"]) for group in groups]
    if counts != [len(group) for group in ours]:
        raise _other_model(folder, f"{counts[0]} + {counts[1]} parameters with and without weight decay")
    return dict(zip(keys, [*ours[0], *ours[1]], strict=True))


def _groups(names: list[str], owners: Mapping[str, str], step: Any) -> list[list[str]]:
    """With and without weight decay; what has no owner is a matrix that gets no gradient in torch."""
    decayed = {name for name in names if name not in owners or owners[name] in step.optimizer.decay}
    return [[n for n in names if n in decayed], [n for n in names if n not in decayed]]


def _read_updates(state: Mapping[Any, Mapping[str, Any]], folder: Path) -> int | None:
    steps = {float(values["step"]) for values in state.values() if "step" in values}
    if len(steps) > 1:
        raise CheckpointError(
            f"{folder}: parameters that made {min(steps):g} and {max(steps):g} steps",
            "one count of steps for all, as every parameter takes part in each",
            "another checkpoint of that run",
        )
    return int(steps.pop()) if steps else None


def _fit(moments: Moments, step: Any, folder: Path) -> Moments:
    fitted: Moments = step.optimizer.init(step.params)
    for slot, held in fitted.items():
        for name, zeros in held.items():
            value = moments.get(slot, {}).get(name)
            if value is None:
                raise _other_model(folder, f"no {slot} of {name}")
            if value.shape != zeros.shape:
                raise _other_model(folder, f"{slot} of {name} in shape {tuple(value.shape)}, not {tuple(zeros.shape)}")
            held[name] = value.astype(zeros.dtype)
    unknown = sorted(set(moments) - set(fitted))
    if unknown:
        raise CheckpointError(
            f"{folder}: {unknown[0]} in the optimizer's state",
            f"what this optimizer keeps: {', '.join(fitted) or 'nothing'}",
            "set optim= and optim_args= as in that run",
        )
    return fitted


def _other_model(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: an optimizer state with {what}",
        "the state of the parameters that this run trains",
        "the model and the peft_config that the checkpoint was written with",
    )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
