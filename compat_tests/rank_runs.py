"""Starts the processes of a run on MLX's ring on this machine, and ends them all when one hangs."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from forked_scripts import start_forked

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
    common = {"HF_HUB_OFFLINE": "1", "MLX_HOSTFILE": str(hosts)} | environ
    words = [script or HERE / "rank_worker.py", *arguments]
    outputs = [folder / f"rank-{rank}.txt" for rank in range(ranks)]
    return [
        start_forked(words, output, output, common | {"MLX_RANK": str(rank)}) for rank, output in enumerate(outputs)
    ]


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
        while any(process.is_alive() for process in started) and time.monotonic() < deadline:
            if not failed and any(process.exitcode for process in started):
                failed, deadline = True, min(deadline, time.monotonic() + grace)
            time.sleep(0.05)
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
            process.join()
    return [process.exitcode for process in started]


def said(folder: Path, rank: int) -> str:
    """What a process has printed."""
    return (folder / f"rank-{rank}.txt").read_text()


def run(
    ranks: int, folder: Path, models: Path, cases: list[str], timeout: float, **environ: str
) -> list[dict[str, Any]]:
    """What each process says of ``cases``."""
    folder.mkdir(parents=True, exist_ok=True)
    statuses = finish(start(ranks, folder, [str(models), str(folder / "out"), *cases], **environ), timeout)
    assert statuses == [0] * ranks, "\n".join(said(folder, rank)[-3000:] for rank in range(ranks))
    return [json.loads((folder / f"out.{rank}").read_text()) for rank in range(ranks)]
