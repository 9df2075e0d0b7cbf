"""hf_mlx and trl.SFTTrainer in turn: a few steps of one, the same steps of the other, on a machine that others use too.

Both trainers are kept, each in a process of its own, and wait for their turn in a callback. What comes and goes on the
machine then slows both; the fastest turn and the processor time say what it left.

    python benchmarks/in_turn.py --shape 2x256                              # rows of one length
    python benchmarks/in_turn.py --mode grouped --median 120 --max-length 512   # documents, as in mixed_lengths.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from mixed_lengths import MODES
from sft_step import PRESETS, run_peer

PEERS = ("hf_mlx", "trl")


def main() -> None:
    """Give each peer its turns, print seconds, processor seconds and tokens of a second."""
    if sys.argv[1:2] == ["--as"]:
        take_turns(json.loads(sys.argv[2]))
        return
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        job = vars(options) | {"folder": folder, "model": PRESETS["small"], "dtype": "float32"}
        job |= {"on": False, "checkpointing": False, "accumulate": 1, "clip": 1.0, "documents": 2000, "sigma": 0.9}
        run_peer({**job, "peer": "make-model"}, folder)
        running = {peer: start({**job, "peer": peer}) for peer in PEERS}
        for process in running.values():
            turn(process, options.warm_up)
        measured: dict[str, list[Any]] = {peer: [] for peer in PEERS}
        for number in range(options.turns):
            for peer in PEERS[:: 1 if number % 2 else -1]:
                measured[peer].append(turn(running[peer], options.steps))
        for process in running.values():
            process.kill()
            process.wait()
    print(f"{'peer':8} {'ms/step':>8} {'fastest':>8} {'processor':>10} {'tokens/s':>9}   load {os.getloadavg()[0]:.1f}")
    for peer, turns in measured.items():
        walls, processor = ([1e3 * one[i] / options.steps for one in turns] for i in (0, 1))
        rate = sum(one[2] for one in turns) / sum(one[0] for one in turns)
        median = statistics.median(walls)
        print(f"{peer:8} {median:8.0f} {min(walls):8.0f} {statistics.median(processor):10.0f} {rate:9.0f}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="2x256", metavar="ROWSxTOKENS", help="rows of one length")
    parser.add_argument("--mode", choices=MODES, help="documents of mixed lengths instead")
    parser.add_argument("--median", type=int, default=120, help="tokens of a document, at the median")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8, help="per_device_train_batch_size, padded and grouped")
    parser.add_argument("--packed-rows", type=int, default=2, help="per_device_train_batch_size, packed")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before the first turn")
    return parser.parse_args()


def start(job: dict[str, Any]) -> subprocess.Popen:
    """A peer that has made its trainer and its first step."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--as", json.dumps(job)],
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
    )
    read(process)
    return process


def turn(process: subprocess.Popen, steps: int) -> list[float]:
    """Seconds, processor seconds and tokens of so many steps."""
    assert process.stdin is not None
    process.stdin.write(f"{steps}\n")
    return read(process)


def read(process: subprocess.Popen) -> Any:
    """What the peer answers."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a peer stopped, exit status {process.wait()}")
    return json.loads(line)


class Turns:
    """The clock of a peer: each tick that ends a turn answers, and waits for the next.

    Attributes:
        tokens: Of a step, where all rows have one length.
    """

    tokens = 0

    def __init__(self, job: dict[str, Any], memory: Any) -> None:
        self.last = 1 + job["warm_up"] + job["turns"] * job["steps"] + 1
        self.memory, self.left = memory, 1
        self.before = time.perf_counter(), time.process_time(), 0
        # What libraries print goes elsewhere.
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def tick(self, tokens: int) -> None:
        """A step has ended; ``tokens`` were seen so far."""
        self.left -= 1
        if self.left:
            return
        self.memory.synchronize()
        now = time.perf_counter(), time.process_time(), tokens
        self.answers.write(json.dumps([b - a for a, b in zip(self.before, now, strict=True)]) + "\n")
        self.left = int(sys.stdin.readline() or sys.exit())
        self.before = time.perf_counter(), time.process_time(), tokens

    def callback(self) -> Any:
        """For rows of one length, whose tokens count in steps."""
        from transformers import TrainerCallback

        class Ticks(TrainerCallback):
            def on_step_end(_, args, state, control, **kwargs):
                self.tick(state.global_step * self.tokens)

        return Ticks()


def take_turns(job: dict[str, Any]) -> None:
    """Be a peer."""
    import mixed_lengths_peer
    import sft_step_peer

    # hf_mlx before MLX, which it finds a BLAS for.
    if job["peer"] == "hf_mlx":
        from hf_mlx import MLXSFTTrainer as Trainer
    else:
        from trl import SFTTrainer as Trainer
    turns = Turns(job, sft_step_peer.MLXMemory() if job["peer"] == "hf_mlx" else sft_step_peer.TorchMemory())
    if job["mode"]:
        trainer = mixed_lengths_peer.make_trainer(Trainer, job, turns)
    else:
        rows, tokens = map(int, job["shape"].split("x"))
        turns.tokens = rows * tokens
        trainer = sft_step_peer.make_trainer(Trainer, job, rows, tokens, turns)
    trainer.train()


if __name__ == "__main__":
    main()
