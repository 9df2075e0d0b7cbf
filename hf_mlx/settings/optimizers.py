"""The optimizer names of ``transformers.training_args.OptimizerNames`` (5.23) and what each becomes here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import SettingError
from .verdicts import Case, Ruling, adapted, given, honoured, one_of, otherwise, refused

# HF name -> the algorithm that runs (OptimPlan.name).
ALGORITHMS: Mapping[str, str] = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "paged_adamw_32bit": "adamw",
    "adamw_8bit": "adamw",
    "adamw_bnb_8bit": "adamw",
    "paged_adamw_8bit": "adamw",
    "adamw_torch_8bit": "adamw",
    "sgd": "sgd",
    "adagrad": "adagrad",
    "rmsprop": "rmsprop",
    "adafactor": "adafactor",
    "lion_32bit": "lion",
    "paged_lion_32bit": "lion",
    "lion_8bit": "lion",
    "paged_lion_8bit": "lion",
}

# The keys of optim_args that have an effect upstream (transformers 5.23, trainer_optimizer), by algorithm.
# weight_decay is not among them: the Trainer's parameter groups override it.
OPTIONS: Mapping[str, Mapping[str, type]] = {
    "adamw": {},
    "adafactor": {},
    "lion": {},
    "sgd": {"momentum": float, "dampening": float, "nesterov": bool},
    "adagrad": {"lr_decay": float, "eps": float},
    "rmsprop": {"momentum": float, "alpha": float, "eps": float, "centered": bool},
}

_IN_FP32 = "keeps its state in 8 bits upstream; runs with fp32 state here, so the curve differs by the rounding"

OPTIM_CASES: tuple[Case, ...] = (
    one_of("adamw_torch", "adamw_torch_fused", ruling=honoured("AdamW with bias correction and decoupled decay")),
    one_of("sgd", "adagrad", "rmsprop", ruling=honoured("torch's formula")),
    one_of("adafactor", ruling=honoured("transformers' Adafactor with scale_parameter=False, relative_step=False")),
    one_of("lion_32bit", ruling=honoured("bitsandbytes' formula in fp32")),
    one_of("paged_adamw_32bit", ruling=adapted("is AdamW: unified memory needs no paging")),
    one_of("paged_lion_32bit", ruling=adapted("is Lion: unified memory needs no paging")),
    one_of(
        "adamw_8bit",
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "adamw_torch_8bit",
        ruling=adapted(_IN_FP32, write='optim="adamw_torch"', changes_numbers=True),
    ),
    one_of(
        "lion_8bit",
        "paged_lion_8bit",
        ruling=adapted(_IN_FP32, write='optim="lion_32bit"', changes_numbers=True),
    ),
    one_of(
        "rmsprop_bnb",
        "rmsprop_bnb_8bit",
        "rmsprop_bnb_32bit",
        ruling=refused("is bitsandbytes' RMSprop, another formula than torch's", write='optim="rmsprop"'),
    ),
    otherwise(refused("has no MLX implementation with the same formula", write='optim="adamw_torch"')),
)


OPTIM_ARGS_CASES: tuple[Case, ...] = (
    given(
        "a key that the optimizer does not read",
        lambda value, values: judge_optim_args(value, values).verdict == "REFUSE",
        refused("would have no effect", write="optim_args=None"),
    ),
    otherwise(honoured("options of the optimizer")),
)


def judge_optim_args(value: Any, values: Mapping[str, Any]) -> Ruling:
    """Rule on ``optim_args``: every key must have an effect on the optimizer that was chosen."""
    algorithm = ALGORITHMS.get(str(values.get("optim")), "adamw")
    try:
        parse_optim_args(value, algorithm)
    except SettingError as error:
        return refused(error.required, write=error.remedy)
    return honoured(f"options of {algorithm}")


def parse_optim_args(text: str | None, algorithm: str) -> dict[str, float | bool]:
    """Parse ``"k=v,k=v"`` as transformers 5.23 does (``trainer_optimizer._parse_optim_args``).

    Args:
        text: The string of ``TrainingArguments.optim_args``.
        algorithm: A value of :data:`ALGORITHMS`.

    Raises:
        SettingError: The string is malformed, or a key has no effect on this optimizer.
    """
    options: dict[str, float | bool] = {}
    for pair in filter(None, str(text or "").replace(" ", "").split(",")):
        key, equals, value = pair.partition("=")
        kind = OPTIONS[algorithm].get(key)
        if not equals or kind is None:
            raise _bad_option(text, key, algorithm)
        try:
            options[key] = value.lower() in ("true", "1", "yes") if kind is bool else float(value)
        except ValueError:
            raise _bad_option(text, key, algorithm) from None
        if not 0 <= options[key] < math.inf:
            raise _bad_option(text, key, algorithm)
    if options.get("nesterov") and (not options.get("momentum") or options.get("dampening")):
        raise SettingError(
            f"optim_args={text!r}",
            "has nesterov, which needs momentum > 0 and dampening = 0 (torch raises too)",
            'optim_args="momentum=0.9,nesterov=True"',
        )
    return options


def _bad_option(text: str | None, key: str, algorithm: str) -> SettingError:
    received, keys = f"optim_args={text!r}", OPTIONS[algorithm]
    if key == "weight_decay":
        return SettingError(
            received,
            "has weight_decay, which the Trainer's own parameter groups override, so it has no effect",
            "weight_decay=0.01 as an argument of its own",
        )
    if key in keys:
        required = f"has a value for {key!r} that is no finite number >= 0"
    else:
        required = f"has {key!r}, which {algorithm} does not read (it reads {', '.join(keys) or 'none'})"
    if key in ("betas", "beta1", "beta2", "eps"):
        return SettingError(received, required, "adam_beta1=, adam_beta2=, adam_epsilon= as arguments of their own")
    return SettingError(received, required, f'optim_args="{next(iter(keys))}=0.9"' if keys else "optim_args=None")
