"""The verdict on every field of a configuration object."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from .config_tables import SFT_TABLE, ConfigTable, choose_table
from .entries import Ledger
from .entry import Entry
from .lora_config import LORA_CONFIG
from .reading import owner, read_defaults, read_names, read_values
from .verdicts import PROCESS_COUNT, SCORES, Rule, Ruling, Values, Verdict, is_default, no_op, refused

__all__ = ["Entry", "Ledger", "complete_adapter", "complete_arguments", "explain"]

_LORA_RULES: Mapping[str, Rule] = {rule.field: rule for rule in LORA_CONFIG}


def explain(
    args: Any,
    peft_config: Any = None,
    *,
    overrides: Values | None = None,
    table: ConfigTable | None = None,
    processes: int = 1,
) -> Ledger:
    """Say what happens to every field of a configuration on MLX.

    Args:
        args: A ``TrainingArguments``, ``SFTConfig`` or ``DPOConfig``, judged for the trainer of its class; or a dict of
            fields. None is ``SFTConfig()``.
        peft_config: A ``LoraConfig``, or a dict of its fields.
        overrides: Fields that a keyword of the trainer sets over ``args``.
        table: The configuration class of the trainer in question; None goes by the class or the fields of ``args``.
        processes: How many train together.

    Returns:
        The ledger: print it, iterate over it as ``(field, value, verdict, reason)``, or call ``raise_refused()``.

    Example:
        >>> print(explain({"optim": "adamw_8bit"})["optim"].verdict)
        ADAPT
    """
    settings = {} if args is None else args
    table = table or choose_table(settings)
    if isinstance(settings, Mapping):
        settings, overrides = dict(settings) | dict(overrides or {}), None
    values = _merge_arguments(settings, overrides, table)
    present = values if isinstance(settings, Mapping) else read_values(settings) | dict(overrides or {})
    together = {**values, PROCESS_COUNT: processes}
    entries = _judge(settings, table.all_rules, together, present, _argument_defaults(settings, table), table.name)
    if peft_config is not None:
        entries += _judge_adapter(peft_config, {SCORES: table.scores})
    return Ledger(entries)


def complete_arguments(args: Any, overrides: Values | None = None, table: ConfigTable = SFT_TABLE) -> dict[str, Any]:
    """The values of ``args``, with the defaults of what it lacks.

    A ``TrainingArguments`` keeps its own values and gains the fields of SFTConfig at their defaults, as in
    trl 1.16's ``SFTTrainer.__init__``.
    """
    values = _merge_arguments({} if args is None else args, overrides, table)
    # transformers 5.23 mirrors the two names on construction; a field that was set later counts too.
    for suffix in ("", "_kwargs"):
        if values[f"activation_checkpointing{suffix}"] is None:
            values[f"activation_checkpointing{suffix}"] = values[f"gradient_checkpointing{suffix}"]
    return values


def _merge_arguments(settings: Any, overrides: Values | None, table: ConfigTable) -> dict[str, Any]:
    values = _argument_defaults(settings, table) | read_values(settings) | dict(overrides or {})
    # SFTConfig.__post_init__, for a configuration that is not constructed.
    if values["bf16"] is None:
        values["bf16"] = not values["fp16"]
    # What the Accelerator is given: the fields on construction, unless a launcher set the environment.
    precision = getattr(settings, "mixed_precision", None)
    if isinstance(precision, str):
        values["bf16"], values["fp16"] = precision == "bf16", values["fp16"] or precision == "fp16"
    return values


def _argument_defaults(settings: Any, table: ConfigTable) -> dict[str, Any]:
    defaults = {field: rule.default for field, rule in table.all_rules.items()}
    own = {rule.field for rule in table.rules}
    if isinstance(settings, Mapping) or not own.isdisjoint(read_names(settings)):
        defaults |= table.defaults
    return defaults


def complete_adapter(peft_config: Any) -> dict[str, Any]:
    """The values of a LoraConfig, with the defaults of what it lacks."""
    return {field: rule.default for field, rule in _LORA_RULES.items()} | read_values(peft_config)


def _judge_adapter(peft_config: Any, beside: Values) -> list[Entry]:
    values = complete_adapter(peft_config)
    ruling = _LORA_RULES["peft_type"].judge(values["peft_type"], values)
    if ruling.verdict is Verdict.REFUSE:
        # Its other fields belong to another method; one refusal says it all.
        return [Entry(_name(peft_config, "LoraConfig"), "peft_type", values["peft_type"], False, ruling)]
    defaults = {field: rule.default for field, rule in _LORA_RULES.items()}
    present = values if isinstance(peft_config, Mapping) else read_values(peft_config)
    return _judge(peft_config, _LORA_RULES, {**values, **beside}, present, defaults, "LoraConfig")


def _judge(
    settings: Any, rules: Mapping[str, Rule], values: Values, present: Values, defaults: Values, fallback: str
) -> list[Entry]:
    """Rule on the fields in ``present``, each in the light of all ``values``; unknown ones come last."""
    name = _name(settings, fallback)
    entries = []
    for field, rule in rules.items():
        if field in present:
            value = values[field]
            default = is_default(value, defaults[field]) or (isinstance(settings, Mapping) and field not in settings)
            entries.append(Entry(name, field, value, default, rule.judge(value, values)))
    own_defaults = read_defaults(settings)
    for field in present:
        if field not in rules:
            default = field in own_defaults and is_default(present[field], own_defaults[field])
            ruling = _judge_unknown(settings, field, default, rules)
            entries.append(Entry(name, field, present[field], default, ruling))
    return entries


def _judge_unknown(settings: Any, field: str, default: bool, rules: Mapping[str, Rule]) -> Ruling:
    cls = owner(settings, field)
    if cls is not None:
        return no_op(f"is the script's own, declared by {cls}; no trainer reads it")
    if default:
        return no_op("is not known to this release, and at its default asks for nothing")
    close = difflib.get_close_matches(field, rules, n=1)
    return refused("is not known to this release", write=f"{close[0]}=..." if close else f"the line without {field}=")


def _name(settings: Any, fallback: str) -> str:
    plain = isinstance(settings, Mapping) or type(settings).__name__ == "SimpleNamespace"
    return fallback if plain else type(settings).__name__
