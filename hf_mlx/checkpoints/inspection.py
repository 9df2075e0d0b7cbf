"""Whether a checkpoint folder is whole, and whether it is one this library can go on from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ModelError
from ..models.weights import inspect_checkpoint, read_header
from .files import tidy
from .folders import list_checkpoints
from .manifest import MANIFEST, find_damage, recorded_files
from .state_files import OPTIMIZER, SCHEDULER, TORCH_NAMES, has_state, state_files
from .torch_files import check_archive

STATE = "trainer_state.json"
ARGUMENTS = "training_args.bin"
RUN = "hf_mlx_state"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

_KNOWN = re.compile(
    r"\..*|README\.md|adapter_config\.json|adapter_model\.safetensors|config\.json|generation_config\.json"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|trainer_state\.json|training_args\.bin"
    r"|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.\w+|merges\.txt|spiece\.model|.*\.jinja"
    r"|(pre)?processor_config\.json|chat_template\.json|.*\.py|hf_mlx_\w+\.\w+"
    r"|(optimizer|scheduler|rng_state)\.(pt|pth|json|safetensors)"
)
# Folders that hold a part of the training state of engines that shard it.
_SHARDED = re.compile(r"global_step\d+|pytorch_model_fsdp.*|optimizer_\d+|.*distcp.*")
_RANK = re.compile(r"rng_state_(\d+)\.pth")


class DamagedCheckpoint(CheckpointError):
    """A folder that was not written to its end, or was changed since."""


def find_checkpoint(output_dir: str | Path, asked: str | Path | bool | None) -> tuple[Path | None, list[str]]:
    """The folder that ``resume_from_checkpoint`` means.

    Args:
        output_dir: Where this run's checkpoints are.
        asked: True for the newest complete one; a path for that one; None or False for none.

    Returns:
        The folder, or None, and what is wrong with each newer one that was passed over.

    Raises:
        CheckpointError: True and there is no complete one; a path that is not complete or cannot be resumed from.
    """
    if not asked:
        return None, []
    if asked is not True:
        folder = Path(asked)
        check_complete(folder)
        check_foreign(folder)
        return folder, []
    if Path(output_dir).is_dir():
        tidy(Path(output_dir))
    passed_over = []
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            check_complete(folder)
        except DamagedCheckpoint as error:
            passed_over.append(error.received)
            continue
        check_foreign(folder)
        return folder, passed_over
    raise CheckpointError(
        f"resume_from_checkpoint=True; {'; '.join(passed_over) or f'no checkpoint-N folder in {output_dir}'}",
        "a complete checkpoint in output_dir",
        "trainer.train() to start from the beginning, or the output_dir of the run to go on with",
    )


def check_complete(folder: Path) -> None:
    """Raise unless every file of the checkpoint is there and whole.

    A folder of this library is compared with its manifest, byte for byte. Any other is checked as far as its
    formats go: headers, archive checksums, JSON.

    Raises:
        DamagedCheckpoint: With what is wrong.
        CheckpointError: There is no such folder.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"resume_from_checkpoint={str(folder)!r}, which is not a folder",
            "a folder checkpoint-N that a run wrote",
            "trainer.train(resume_from_checkpoint=True) for the newest one in output_dir",
        )
    if (folder / MANIFEST).exists():
        damage = find_damage(folder)
    elif (folder / f"{RUN}.json").exists():
        damage = f"{MANIFEST} is missing"
    else:
        damage = _find_structural_damage(folder)
    if damage:
        raise DamagedCheckpoint(
            f"{folder}: {damage}",
            "a folder that was written to its end and not changed since",
            "trainer.train(resume_from_checkpoint=True) takes the newest complete checkpoint in output_dir",
        )


def check_foreign(folder: Path) -> None:
    """Raise when the folder belongs to several processes, or holds files whose meaning is not known.

    Raises:
        CheckpointError: With the files.
    """
    ranks = {int(found[1]) for path in folder.iterdir() if (found := _RANK.fullmatch(path.name))}
    sharded = sorted(path.name for path in folder.iterdir() if path.is_dir() and _SHARDED.fullmatch(path.name))
    if ranks or sharded:
        what = (
            f"random states of {max(ranks) + 1} processes" if ranks else f"{sharded[0]}/, state sharded over processes"
        )
        raise CheckpointError(
            f"{folder}: {what}",
            "a checkpoint of one process: with another number of them a step is made of other rows",
            "go on where it was written, or begin a new run here: trainer.train() without resume_from_checkpoint",
        )
    recorded = recorded_files(folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in recorded)
    unknown = [name for name in names if not _KNOWN.fullmatch(name)]
    if unknown:
        raise CheckpointError(
            f"{folder}: {', '.join(unknown[:3])}, not known as a part of a checkpoint",
            "files whose meaning is known, so that no training state is dropped silently",
            "the checkpoint folder as the run wrote it; files of your own belong beside it, not in it",
        )


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """trainer_state.json as a dict.

    Raises:
        DamagedCheckpoint: It is not readable or has no step.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if not isinstance(state["global_step"], int):
            raise TypeError("global_step is not a number")
        return state
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(
            f"{folder}: {STATE} cannot be read ({type(error).__name__}: {error})",
            "the JSON object that the trainer wrote",
            "trainer.train(resume_from_checkpoint=True) takes the newest complete checkpoint",
        ) from error


def _find_structural_damage(folder: Path) -> str | None:
    if not (folder / STATE).is_file():
        return f"{STATE} is missing, which is written last"
    if has_state(folder, OPTIMIZER) != has_state(folder, SCHEDULER):
        kind = SCHEDULER if has_state(folder, OPTIMIZER) else OPTIMIZER
        return f"{TORCH_NAMES[kind]} is missing"
    try:
        read_trainer_state(folder)
        _check_weights(folder)
        for kind in TORCH_NAMES:
            for name in state_files(kind):
                _check_file(folder / name)
    except (CheckpointError, ModelError) as error:
        return error.received.removeprefix(f"{folder}: ").removeprefix(f"{folder}/")
    return None


def _check_weights(folder: Path) -> None:
    if (folder / ADAPTER).is_file():
        read_header(folder / ADAPTER)
        try:
            json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{ADAPTER_CONFIG} cannot be read ({error})", "", "") from error
    elif (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{ADAPTER} is missing", "", "")
    else:
        inspect_checkpoint(folder)


def _check_file(path: Path) -> None:
    if not path.is_file():
        return
    if path.suffix in (".pt", ".pth"):
        check_archive(path)
    elif path.suffix == ".safetensors":
        read_header(path)
    else:
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{path.name} is not JSON ({error})", "", "") from error
