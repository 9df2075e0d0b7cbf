"""Runs that lose a rank, and what goes on from them: ``rank_kills.py MODELS FOLDER RANKS CASES``; FOLDER/told.json.

CASES is a JSON list of ``[rank, event, step, seconds after it]``. Processes are forked from one that has imported torch
and its kin, which is most of their start, and not MLX.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rank_runs import HERE, free_ports

LIMIT = 300
NAMED = "has ended without a word"


def run(ranks: int, folder: Path, models: str, name: str, **environ: str) -> list[dict[str, Any]]:
    """Status, end, output and the moment of :data:`NAMED` of each process that plays the scenario ``name``."""
    folder.mkdir(parents=True)
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ.update(environ, MLX_HOSTFILE=str(hosts), MLX_RANK=str(rank))
            output = os.open(folder / f"rank-{rank}.txt", os.O_CREAT | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = ["rank_scenarios.py", models, str(folder / "out"), name]
            runpy.run_path(str(HERE / "rank_scenarios.py"), run_name="__main__")
            sys.exit()
        pids.append(pid)
        (folder / f"rank-{rank}.txt").touch()
    ended: dict[int, dict[str, Any]] = {}
    named: dict[int, float] = {}
    deadline = time.time() + LIMIT
    while len(ended) < ranks:
        for rank, pid in enumerate(pids):
            if rank in ended:
                continue
            if rank not in named and NAMED in (folder / f"rank-{rank}.txt").read_text():
                named[rank] = time.time()
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ended[rank] = {"status": os.waitstatus_to_exitcode(status), "at": time.time()}
            elif time.time() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    said = {rank: (folder / f"rank-{rank}.txt").read_text() for rank in range(ranks)}
    return [ended[rank] | {"said": said[rank], "named": named.get(rank)} for rank in range(ranks)]


def main() -> None:
    models, folder, ranks, cases = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    for name in ("torch", "datasets", "peft", "transformers", "trl"):
        importlib.import_module(name)
    importlib.import_module("trl.trainer.sft_trainer")

    made: dict[str, Any] = {"killed": []}
    runs = [str(folder / f"run-{number}") for number in range(len(cases))]
    for number, case in enumerate(cases):
        environ = {"KILLED_DIR": runs[number], "KILLED": json.dumps(case)}
        made["killed"].append(run(ranks, folder / f"killed-{number}", models, "killed", **environ))
        print(number, case, [one["status"] for one in made["killed"][-1]], flush=True)
    environ = {"KILLED_DIRS": os.pathsep.join([str(folder / "unbroken"), *runs])}
    made["revived"] = run(ranks, folder / "revived", models, "revived", **environ)
    made["runs"] = runs
    (folder / "told.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
