"""Where the files come from: a local folder, or a snapshot of a hub repository."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import ModelError
from ..settings.plan import ModelPlan
from .config import FILES

# What a model and its tokenizer need; never pickles, never code.
_SMALL = ["*.json", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]
_WEIGHTS = ["model*.safetensors"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_folder(path_or_id: str | Path, plan: ModelPlan, *, weights: bool = True) -> Path:
    """Gives the local folder of a model. For a hub id each call asks the hub, so it is called once a run.

    Args:
        path_or_id: A folder, or a hub id (``owner/name``), which is downloaded into HF's own cache.
        plan: ``revision`` and ``token`` for the hub.
        weights: False fetches the config and the tokenizer alone.

    Raises:
        ModelError: No such folder, or the hub does not give the repository.
    """
    folder = Path(path_or_id).expanduser()
    if str(path_or_id).strip() and folder.is_dir():
        check_kinds(folder)
        return folder
    name = str(path_or_id)
    if str(path_or_id).strip() and folder.exists():
        raise ModelError(
            f"model={name!r} is a file", "a folder or a hub id", f'model="{folder.parent}" (the folder that holds it)'
        )
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelError(
            f"model={name!r}: no such folder",
            "an existing folder, or a hub id owner/name",
            'model="/path/to/folder" with config.json in it, or model="HuggingFaceTB/SmolLM2-135M"',
        )
    return _download(name, plan, [*_SMALL, *_WEIGHTS] if weights else _SMALL)


def check_kinds(folder: Path) -> None:
    """Refuse pipes, devices and sockets under names that transformers, tokenizers or mlx-lm may open and wait for.

    Raises:
        ModelError: With the first one.
    """
    for pattern in (*_SMALL, *_WEIGHTS, "*.bin", "*.model", "README.md"):
        for path in sorted(folder.glob(pattern)):
            if path.exists() and not path.is_file() and not path.is_dir():
                FILES.check(path)


def _download(repo: str, plan: ModelPlan, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=plan.revision, token=plan.token, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"model={repo!r}: no such folder here, and the hub has no such repository (or it is private or gated)",
            "an existing folder, or a hub id you may read",
            'check the spelling, or log in with "hf auth login" and accept the licence on the model\'s page',
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model={repo!r}: no such folder here, and the hub did not give it ({reason[:200]})",
            "a reachable hub, or the model in a local folder",
            f'model="/path/to/folder", or fetch it where there is a network: hf download {repo} --local-dir FOLDER',
        ) from error
