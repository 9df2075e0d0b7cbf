"""What a launcher says in the environment: how many processes there are, and which one this is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import SettingError

_LINE = "hf-mlx launch -n 2 train.py"
#: Set where the processes hold one model together: how many, or "all" of them.
TENSOR_PARALLEL = "HF_MLX_TENSOR_PARALLEL"


@dataclass(frozen=True)
class Launched:
    """One process of several.

    Attributes:
        backend: Of ``mlx.core.distributed``.
        rank: Which process this is.
        size: How many there are; None where the launcher does not say.
        host: Where rank 0 can be reached; None where the launcher does not say.
        local_rank: Which process of its machine this is.
    """

    backend: str
    rank: int
    size: int | None
    host: str | None
    local_rank: int


def read_launcher(environ: Mapping[str, str] | None = None) -> Launched | None:
    """What ``mlx.launch`` or ``mpirun`` has set; None for a process that was started by itself.

    Args:
        environ: None reads the process's own.

    Raises:
        SettingError: ``torchrun`` or ``accelerate launch`` started it with others, which MLX knows nothing of.
    """
    environ = os.environ if environ is None else environ
    if "OMPI_COMM_WORLD_RANK" in environ and "MLX_RANK" not in environ:
        size = int(environ.get("OMPI_COMM_WORLD_SIZE", "1"))
        if size == 1:
            return None
        local = int(environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"))
        return Launched("mpi", int(environ["OMPI_COMM_WORLD_RANK"]), size, None, local)
    if "MLX_RANK" not in environ:
        _refuse_torch(environ)
        return None
    rank = int(environ["MLX_RANK"])
    if environ.get("MLX_HOSTFILE"):
        nodes = json.loads(Path(environ["MLX_HOSTFILE"]).read_text())
        hosts = [addresses[0].rpartition(":")[0] for addresses in nodes]
        if len(hosts) == 1:
            return None
        return Launched("ring", rank, len(hosts), hosts[0], hosts[:rank].count(hosts[rank]))
    if environ.get("MLX_JACCL_COORDINATOR"):
        devices = environ.get("MLX_IBV_DEVICES")
        size = len(json.loads(Path(devices).read_text())) if devices else None
        return Launched("jaccl", rank, size, environ["MLX_JACCL_COORDINATOR"].rpartition(":")[0], 0)
    size = int(environ.get("MLX_WORLD_SIZE", "1"))
    if size == 1:
        # mlx.launch -n 1: a group of one is no group.
        return None
    # mlx.launch shows each process one card, by its number on the machine.
    card = environ.get("CUDA_VISIBLE_DEVICES", "")
    return Launched("nccl", rank, size, environ.get("NCCL_HOST_IP"), int(card) if card.isdigit() else rank)


def read_tensor_parallel(processes: int, environ: Mapping[str, str] | None = None) -> bool:
    """Whether the processes hold one model together, rather than a copy each.

    Args:
        processes: How many there are.
        environ: None reads the process's own.

    Raises:
        SettingError: Over another number of processes than there are.
    """
    asked = (os.environ if environ is None else environ).get(TENSOR_PARALLEL, "") or "1"
    if asked not in ("1", "all") and asked != str(processes):
        raise SettingError(
            f"a model split over {asked} processes, of which there are {processes}",
            "all processes hold one model together: MLX's ring and jaccl do not divide them into groups",
            f"hf-mlx launch -n {asked if asked.isdigit() else 2} --tensor-parallel train.py",
        )
    return asked != "1" and processes > 1


def _refuse_torch(environ: Mapping[str, str]) -> None:
    size = environ.get("WORLD_SIZE", "1")
    if "LOCAL_RANK" in environ and size.isdigit() and int(size) > 1:
        raise SettingError(
            f"WORLD_SIZE={size} from torchrun or accelerate launch, whose processes would each train alone here",
            "processes that MLX started, so that they train together",
            f"hf-mlx launch -n {size} {_LINE.rpartition(' ')[2]}",
        )
