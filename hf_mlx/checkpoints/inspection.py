"""Whether a checkpoint folder is whole, and whether it is one this library can go on from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ModelError
from ..intake import LARGE, Types, lies, show
from ..models.pickles import check_archive
from ..models.weights import inspect_checkpoint, read_header
from .damage import FILES, DamagedCheckpoint
from .files import tidy
from .folders import list_checkpoints
from .manifest import MANIFEST, find_damage, recorded_files
from .state_files import OPTIMIZER, RANDOM, SCHEDULER, TORCH_NAMES, has_state, random_kind, state_files

STATE = "trainer_state.json"
ARGUMENTS = "training_args.bin"
RUN = "hf_mlx_state"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# transformers 5.23 TrainerState; True and false are numbers nowhere.
_STATE_TYPES: dict[str, Types] = {
    "global_step": int,
    "epoch": (float, None),
    "max_steps": int,
    "logging_steps": (float, None),
    "eval_steps": (float, None),
    "save_steps": (float, None),
    "train_batch_size": (int, None),
    "num_train_epochs": float,
    "num_input_tokens_seen": float,
    "total_flos": float,
    "log_history": (list, None),
    "best_metric": (float, None),
    "best_global_step": (int, None),
    "best_model_checkpoint": (str, None),
    "is_local_process_zero": bool,
    "is_world_process_zero": bool,
    "is_hyper_param_search": bool,
    "trial_name": (str, None),
    "trial_params": (dict, None),
    "stateful_callbacks": (dict, None),
}
_ENTRY_TYPES: dict[str, Types] = {"step": int, "num_tokens": (float, None), "eval_num_tokens": (float, None)}

_KNOWN = re.compile(
    r"\..*|README\.md|adapter_config\.json|adapter_model\.safetensors|config\.json|generation_config\.json"
    r"|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|trainer_state\.json|training_args\.bin"
    r"|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.\w+|merges\.txt|spiece\.model|.*\.jinja"
    r"|(pre)?processor_config\.json|chat_template\.json|.*\.py|hf_mlx_\w+\.\w+"
    r"|(optimizer|scheduler|rng_state(_\d+)?)\.(pt|pth|json|safetensors)"
)
# Folders that hold a part of the training state of engines that shard it.
_SHARDED = re.compile(r"global_step\d+|pytorch_model_fsdp.*|optimizer_\d+|.*distcp.*")
_RANK = re.compile(r"rng_state_(\d+)\.(pth|json)")


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
    if lies(folder / MANIFEST):
        damage = find_damage(folder)
    elif lies(folder / f"{RUN}.json"):
        damage = f"{MANIFEST} is missing"
    else:
        damage = _find_structural_damage(folder)
    if damage:
        raise DamagedCheckpoint(
            f"{folder}: {damage}",
            "a folder that was written to its end and not changed since",
            "trainer.train(resume_from_checkpoint=True) takes the newest complete checkpoint in output_dir",
        )


def count_processes(folder: Path) -> int:
    """How many processes wrote the folder, as its random states tell; 0 where there are none."""
    ranks = _ranks(folder)
    return max(ranks) + 1 if ranks else int(has_state(folder, RANDOM))


def _ranks(folder: Path) -> set[int]:
    return {int(found[1]) for path in folder.iterdir() if (found := _RANK.fullmatch(path.name))}


def check_foreign(folder: Path) -> None:
    """Raise when the folder holds a part of what several processes wrote, or files whose meaning is not known.

    Raises:
        CheckpointError: With the files.
    """
    ranks = _ranks(folder)
    if ranks and (len(ranks) <= max(ranks) or has_state(folder, RANDOM)):
        raise CheckpointError(
            f"{folder}: random states of {max(ranks) + 1} processes, and not one for each",
            "rng_state.pth of one process, or rng_state_0.pth and so on of several",
            "the checkpoint folder as the run wrote it",
        )
    sharded = sorted(path.name for path in folder.iterdir() if path.is_dir() and _SHARDED.fullmatch(path.name))
    if sharded:
        raise CheckpointError(
            f"{folder}: {sharded[0]}/, state sharded over processes",
            "a checkpoint whose weights and moments are whole, as those of DDP are",
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
    path = folder / STATE
    state = FILES.read_json(path, _STATE_TYPES, limit=LARGE)
    if state.get("global_step", -1) < 0:
        raise FILES.refuse(path, f"global_step={state.get('global_step')!r}", "the step it was written at")
    for entry in state.get("log_history") or []:
        if not isinstance(entry, dict):
            raise FILES.refuse(path, f"log_history holds {show(entry)}", "log_history: a list of objects")
        FILES.check_types(entry, _ENTRY_TYPES, path)
    return state


def _find_structural_damage(folder: Path) -> str | None:
    if not lies(folder / STATE):
        return f"{STATE} is missing, which is written last"
    if has_state(folder, OPTIMIZER) != has_state(folder, SCHEDULER):
        kind = SCHEDULER if has_state(folder, OPTIMIZER) else OPTIMIZER
        return f"{TORCH_NAMES[kind]} is missing"
    try:
        read_trainer_state(folder)
        _check_weights(folder)
        # One process's beside those of several is another fault, which check_foreign names.
        ranks = () if has_state(folder, RANDOM) else sorted(_ranks(folder))
        for kind in (*TORCH_NAMES, *(random_kind(rank, 2) for rank in ranks)):
            for name in state_files(kind):
                _check_file(folder / name)
    except (CheckpointError, ModelError) as error:
        return error.received.removeprefix(f"{folder}: ").removeprefix(f"{folder}/")
    return None


def _check_weights(folder: Path) -> None:
    # PEFT saves an adapter that is not called "default" into a folder of its name.
    named = sorted(path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    for other in named:
        _check_weights(other)
    if named and not lies(folder / ADAPTER_CONFIG) and not lies(folder / "config.json"):
        return
    if lies(folder / ADAPTER):
        read_header(folder / ADAPTER)
        FILES.read_json(folder / ADAPTER_CONFIG)
    elif lies(folder / ADAPTER_CONFIG):
        raise ModelError(f"{ADAPTER} is missing", "", "")
    else:
        inspect_checkpoint(folder)


def _check_file(path: Path) -> None:
    if not lies(path):
        return
    if path.suffix in (".pt", ".pth"):
        check_archive(path, FILES)
    elif path.suffix == ".safetensors":
        read_header(path)
    else:
        FILES.read_json(path, limit=LARGE)
