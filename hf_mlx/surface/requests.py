"""What the constructor was handed, checked and completed before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import SettingError


def check_functions(keywords: dict[str, Any]) -> None:
    """Refuse what would run inside the step; takes it out of ``keywords`` when it is None.

    Raises:
        SettingError: One of them was given.
    """
    for name, remedy in _REFUSED_KEYWORDS.items():
        if keywords.pop(name, None) is not None:
            raise SettingError(f"{name}=", "what runs inside the compiled step is chosen by name", remedy)


_REFUSED_KEYWORDS = {
    "model_init": "MLXSFTTrainer(model=model_init(), …)",
}


def check_evaluation(args: Any, eval_dataset: Any, trainer: str) -> None:
    """Refuse to evaluate on nothing; ``trainer`` is the class's name.

    Raises:
        SettingError: ``eval_strategy`` asks for evaluation and there is no ``eval_dataset``.
    """
    if args.eval_strategy != "no" and eval_dataset is None:
        raise SettingError(
            f"eval_strategy={str(getattr(args.eval_strategy, 'value', args.eval_strategy))!r} without an eval_dataset",
            "an eval_dataset to evaluate on",
            f'{trainer}(..., eval_dataset=my_dataset), or eval_strategy="no"',
        )


def check_ignored(ignore_keys: list[str] | None, unseen: Sequence[str]) -> None:
    """Refuse predictions that would hold other things than those upstream returns.

    Args:
        ignore_keys: As ``evaluate`` and ``predict`` get them.
        unseen: What the torch model returns beside its logits, and MLX's does not.

    Raises:
        SettingError: Names them.
    """
    ignored = ignore_keys or ()
    if "logits" in ignored:
        raise SettingError(f"ignore_keys={ignore_keys!r}", "logits to predict with", "ignore_keys=None")
    missing = [key for key in unseen if key not in ignored]
    if missing:
        raise SettingError(
            f"predictions of a model whose config says output_router_logits=True, with {' and '.join(missing)} in them",
            "logits alone",
            f"trainer.evaluate(ignore_keys={['past_key_values', *unseen]!r}), train(ignore_keys_for_eval=…) likewise, "
            "or model.config.output_router_logits = False",
        )


def no_rows(trainer: str) -> SettingError:
    """What ``train()`` on a trainer without a train dataset raises."""
    return SettingError(
        "train() on a trainer without a train_dataset",
        "`Trainer: training requires a train_dataset.`",
        f"{trainer}(..., train_dataset=my_dataset)",
    )


def check_keywords(keywords: dict[str, Any], size: int) -> None:
    """Refuse keywords of ``save_pretrained`` that ask for other files than those written.

    Args:
        keywords: As they were given.
        size: Bytes of the weights that are written.

    Raises:
        SettingError: Names the keyword.
    """
    for name, value in keywords.items():
        if name not in _SAVING:
            raise unknown_keyword("save_pretrained", {name: value})
        if name == "safe_serialization" and value is False:
            raise SettingError("safe_serialization=False", "safetensors, which run no code", "leave it out")
        if name == "max_shard_size" and value is not None and _read_size(value) >= size:
            continue
        if value not in _SAVING[name]:
            asked = ", ".join(repr(honoured) for honoured in _SAVING[name])
            raise SettingError(f"save_pretrained({name}={value!r})", f"{name} of {asked}", f"leave {name}= out")


def _read_size(value: Any) -> int:
    from huggingface_hub.serialization._base import parse_size_to_int

    try:
        return value if isinstance(value, int) else parse_size_to_int(value)
    except (ValueError, AttributeError) as error:
        raise SettingError(f"max_shard_size={value!r}", "bytes, or a size", 'max_shard_size="5GB"') from error


def unknown_keyword(method: str, keywords: dict[str, Any]) -> SettingError:
    """What is raised for the first of ``keywords``, none of which ``method`` reads."""
    name, value = next(iter(keywords.items()))
    return SettingError(f"{method}({name}={value!r})", f"keywords that {method} honours here", f"leave {name}= out")


# Of transformers 5.23 ``PreTrainedModel`` and peft 0.21 ``PeftModel``: what is honoured of each.
_SAVING: dict[str, tuple[Any, ...]] = {
    "safe_serialization": (True, None),
    "max_shard_size": ("50GB", "5GB", None),
    "variant": (None,),
    "save_peft_format": (True,),
    "save_original_format": (True,),
    "selected_adapters": (None, ["default"]),
    "save_embedding_layers": ("auto", False),
    "path_initial_model_for_weight_conversion": (None,),
}
