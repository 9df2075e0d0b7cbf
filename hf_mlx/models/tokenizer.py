"""The tokenizer beside a model, through transformers' own AutoTokenizer (which needs no torch)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..intake import LARGE, Intake, Types, lies
from ..settings.plan import ModelPlan

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
_INTAKE = Intake(ModelError, "fetch the tokenizer's files again, or save it again: tokenizer.save_pretrained(folder)")
_TOKEN: Types = (str, dict, None)
_SPECIAL: dict[str, Types] = {
    **{f"{kind}_token": _TOKEN for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")},
    "additional_special_tokens": (list, dict, None),
    "extra_special_tokens": (list, dict, None),
}
_JSON: dict[str, dict[str, Types]] = {
    "tokenizer.json": {"model": dict, "added_tokens": list, "truncation": (dict, None), "padding": (dict, None)},
    "tokenizer_config.json": {
        **_SPECIAL,
        **{f"add_{kind}": (bool, None) for kind in ("bos_token", "eos_token", "prefix_space")},
        "added_tokens_decoder": (dict, None),
        "auto_map": (dict, None),
        "chat_template": (str, list, dict, None),
        "clean_up_tokenization_spaces": (bool, None),
        "model_input_names": (list, None),
        "model_max_length": (int, float, None),
        "padding_side": (str, None),
        "truncation_side": (str, None),
        "tokenizer_class": (str, None),
    },
    "special_tokens_map.json": _SPECIAL,
    "added_tokens.json": {},
    "vocab.json": {},
    "chat_template.json": {"chat_template": str},
    "tekken.json": {},
}
_TEXT = ("vocab.txt", "merges.txt", "chat_template.jinja")
_BINARY = ("tokenizer.model", "spiece.model")


def load_tokenizer(path: str | Path, plan: ModelPlan) -> Any:
    """Loads the tokenizer of a model folder.

    Args:
        path: The model's folder (:attr:`LoadedModel.path`).
        plan: ``trust_remote_code`` applies to the tokenizer only.

    Returns:
        A transformers ``PreTrainedTokenizerBase``.

    Raises:
        ModelError: The folder has no tokenizer, or one that transformers cannot read.
    """
    folder = Path(path)
    if not any(lies(folder / name) for name in _FILES):
        raise ModelError(
            f"{folder}: no tokenizer ({', '.join(_FILES[:3])} …)",
            "a tokenizer beside the model, or processing_class=",
            'MLXSFTTrainer(…, processing_class=AutoTokenizer.from_pretrained("owner/name")), or '
            f'tokenizer.save_pretrained("{folder}")',
        )
    check_files(folder)
    from transformers import AutoTokenizer

    try:
        with _INTAKE.understood(
            folder,
            "tokenizer files that AutoTokenizer.from_pretrained reads",
            failed="transformers cannot read the tokenizer",
        ):
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=plan.trust_remote_code)
    except ModelError as error:
        # What transformers said is cut short in the message.
        if "trust_remote_code" not in f"{error} {error.__cause__}":
            raise
        raise ModelError(
            f"{folder}: a tokenizer with Python code of its own",
            "your word that the code may run",
            "SFTConfig(trust_remote_code=True), once you have read it",
        ) from error


def check_files(folder: Path) -> None:
    """Prove the files that transformers reads a tokenizer from, where they are there.

    transformers takes most of them at their word: what it cannot read it often takes for absent.

    Raises:
        ModelError: One is not a regular file, too large, not text, not JSON, or holds a value of another type.
    """
    for name, types in _JSON.items():
        if lies(folder / name):
            _INTAKE.read_json(folder / name, types, limit=LARGE, finite=True)
    for name in _TEXT:
        if lies(folder / name):
            _INTAKE.read_text(folder / name, LARGE)
    for name in _BINARY:
        if lies(folder / name):
            _INTAKE.check(folder / name, LARGE)


def mirror_tokens(base: Any, tokenizer: Any, *, eos: bool) -> None:
    """Set pad (and eos) ids on config and generation_config, as trl 1.16 ``SFTTrainer.__init__`` does.

    Args:
        base: A transformers model; one that scores has no generation_config.
        tokenizer: Prepared.
        eos: The EOS token was set by the script.
    """
    text, generation = base.config.get_text_config(), getattr(base, "generation_config", None)
    for config in (text, generation) if generation is not None else (text,):
        config.pad_token_id = tokenizer.pad_token_id
    if eos:
        text.eos_token_id = tokenizer.eos_token_id
    if eos and generation is not None:
        known = generation.eos_token_id
        known = [] if known is None else [known] if isinstance(known, int) else list(known)
        if tokenizer.eos_token_id not in known:
            generation.eos_token_id = [tokenizer.eos_token_id, *known]
