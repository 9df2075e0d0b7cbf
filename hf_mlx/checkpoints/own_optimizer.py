"""The states of a torch optimizer and schedule of the script's own, in the files that transformers writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..intake import lies
from .state_files import OPTIMIZER, SCHEDULER, TORCH_NAMES


def save_own(optimizer: Any, schedule: Any, folder: Path) -> None:
    """Write ``optimizer.pt`` and ``scheduler.pt``."""
    import torch

    torch.save(optimizer.state_dict(), folder / TORCH_NAMES[OPTIMIZER])
    torch.save(schedule.state_dict(), folder / TORCH_NAMES[SCHEDULER])


def load_own(folder: Path, optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states of an optimizer and its schedule, once they are known to fit; nothing is changed.

    Args:
        folder: A checkpoint of transformers, trl or this library.
        optimizer: The torch optimizer that is to go on.

    Raises:
        CheckpointError: Of an optimizer with other groups or other parameters, or not in torch's files.
    """
    import torch

    states = []
    for kind in (OPTIMIZER, SCHEDULER):
        path = folder / TORCH_NAMES[kind]
        if not lies(path):
            raise CheckpointError(
                f"{folder}: no {path.name}, for an optimizer of the script's own",
                "torch's files, as a run with that optimizer writes them",
                "a checkpoint of a run with the same optimizer",
            )
        states.append(torch.load(path, map_location="cpu", weights_only=True))
    _compare(states[0], optimizer.state_dict(), optimizer, folder)
    return states[0], states[1]


def _compare(found: Mapping[str, Any], now: Mapping[str, Any], optimizer: Any, folder: Path) -> None:
    counts = [len(group["params"]) for group in found["param_groups"]]
    wanted = [len(group["params"]) for group in now["param_groups"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = [number for group in found["param_groups"] for number in group["params"]]
    if counts == wanted:
        shapes = dict(zip(order, (parameter.shape for parameter in parameters), strict=True))
        odd = next((n for n, held in found["state"].items() if not _fits(held, shapes[n])), None)
        if odd is None:
            return
        counts, wanted = [f"parameter {odd} in another shape"], [f"{tuple(shapes[odd])}"]
    raise CheckpointError(
        f"{folder}: the state of an optimizer over {counts} parameters (group by group)",
        f"{wanted}, as this run's {type(optimizer).__name__} has them",
        "the optimizer, the groups and the peft_config that the checkpoint was written with",
    )


def _fits(held: Mapping[str, Any], shape: Any) -> bool:
    # Moments have the parameter's shape, or that of a factor of it; a whole other count of numbers is another model's.
    moments = [v for k, v in held.items() if k in ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum")]
    return all(value is None or value.shape == shape for value in moments)
