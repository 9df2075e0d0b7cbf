"""Starts the processes of a run on MLX's ring on this machine, and ends them all when one hangs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


def start(ranks: int, folder: Path, arguments: list[str], *, script: Path | None = None, **environ: str) -> list[Any]:
    """The processes, each with its output in ``folder/rank-N.txt``."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    common = os.environ | quiet | {"HF_HUB_OFFLINE": "1", "MLX_HOSTFILE": str(hosts), "PYTHONPATH": path} | environ
    command = [sys.executable, str(script or HERE / "rank_worker.py"), *arguments]
    started = []
    for rank in range(ranks):
        output = (folder / f"rank-{rank}.txt").open("w")
        made = subprocess.Popen(
            command, env=common | {"MLX_RANK": str(rank)}, stdout=output, stderr=output, stdin=subprocess.DEVNULL
        )
        started.append(made)
    return started


def finish(started: list[Any], timeout: float, grace: float = 60) -> list[int]:
    """The exit statuses.

    Args:
        started: The processes.
        timeout: Seconds after which whoever is still there is ended (-9).
        grace: The same, after one of them has failed: the others are to end by themselves.
    """
    deadline = time.monotonic() + timeout
    failed = False
    try:
        while any(process.poll() is None for process in started) and time.monotonic() < deadline:
            if not failed and any(process.poll() for process in started):
                failed, deadline = True, min(deadline, time.monotonic() + grace)
            time.sleep(0.05)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
    return [process.returncode for process in started]


def said(folder: Path, rank: int) -> str:
    """What a process has printed."""
    return (folder / f"rank-{rank}.txt").read_text()


def run(ranks: int, folder: Path, models: Path, cases: list[str], timeout: float) -> list[dict[str, Any]]:
    """What each process says of ``cases``."""
    folder.mkdir(parents=True, exist_ok=True)
    statuses = finish(start(ranks, folder, [str(models), str(folder / "out"), *cases]), timeout)
    assert statuses == [0] * ranks, "\n".join(said(folder, rank)[-3000:] for rank in range(ranks))
    return [json.loads((folder / f"out.{rank}").read_text()) for rank in range(ranks)]
