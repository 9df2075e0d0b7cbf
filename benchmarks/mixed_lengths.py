"""Chat data of mixed lengths, side by side: hf_mlx and trl.SFTTrainer, padded, grouped by length and packed.

Documents have log-normal lengths, as conversations do, and the first part of each is a prompt that is not trained. A
figure is real tokens a second, without padding. A trainer that compiles pays for each new shape once: `tokens/s`
counts every step after the warm-up, `steady` leaves out those that traced, which is what a long run comes to.

    python benchmarks/mixed_lengths.py               # a small model, what a CPU can do
    python benchmarks/mixed_lengths.py --preset llama-1b --dtype bfloat16 --steps 60 --json out.json
    python benchmarks/mixed_lengths.py --before ../older --peers hf_mlx before      # another version of this package

The model is built at random and every peer runs in a process of its own, as in `sft_step.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from sft_step import PRESETS, run_peer, versions

MODES = ("padded", "grouped", "packed")
PEERS = ("hf_mlx", "before", "trl")
WORKER = Path(__file__).with_name("mixed_lengths_peer.py")


def main() -> None:
    """Run every peer in every mode and print the table."""
    options = parse()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        job = vars(options) | {"folder": folder, "model": PRESETS[options.preset]}
        run_peer({**job, "peer": "make-model"}, folder, WORKER)
        for mode in options.modes:
            for peer in options.peers:
                if peer == "before" and not options.before:
                    continue
                path = [options.before] if peer == "before" else []
                variables = {
                    "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
                }
                work = {**job, "peer": peer, "mode": mode}
                results += best(run_peer(work, folder, WORKER, **variables) for _ in range(options.best))
    print(table(options, results))
    if options.json:
        report = {"versions": versions(), "options": vars(options), "results": results}
        Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="weights; bfloat16: bf16=True"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--before", metavar="FOLDER", help="holds another version of hf_mlx: the peer `before`")
    parser.add_argument("--median", type=int, default=250, help="tokens of a document, at the median")
    parser.add_argument("--sigma", type=float, default=0.9, help="of the logarithm of the length")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=2000, help="rows of the dataset")
    parser.add_argument("--rows", type=int, default=8, help="per_device_train_batch_size, padded and grouped")
    parser.add_argument("--packed-rows", type=int, default=2, help="per_device_train_batch_size, packed")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them")
    parser.add_argument("--best", type=int, default=1, help="runs of each, of which the fastest counts")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, where the machine is shared")
    parser.add_argument("--json", metavar="FILE", help="write every figure, with versions and device")
    return parser.parse_args()


def best(runs: object) -> list[dict]:
    """The fastest of several runs, if there is one."""
    done = [run for run in runs if run]  # type: ignore[attr-defined]
    return [min(done, key=lambda run: run["seconds"])] if done else []


def table(options: argparse.Namespace, results: list[dict]) -> str:
    """Ratios to hf_mlx padded, with the figures they come from."""
    lines = [
        f"\n{options.preset}, LoRA r={options.rank}, {options.dtype}, {options.steps} steps; documents of median "
        f"{options.median}, at most {options.max_length}; {options.rows} a step, packed {options.packed_rows} rows",
        f"{'mode':8} {'peer':7} {'tokens/s':>9} {'steady':>9} {'x padded':>8} {'padding':>8} {'traces':>6} {'GiB':>7}",
    ]
    ours = next((r for r in results if r["peer"] == "hf_mlx"), results[0] if results else None)
    for r in results:
        ratio = r["steady"] / ours["steady"] if ours else 1
        lines.append(
            f"{r['mode']:8} {r['peer']:7} {r['tokens'] / r['seconds']:9.0f} {r['steady']:9.0f} {ratio:8.2f} "
            f"{100 * r['padding']:7.1f}% {r['traces'] or '-':>6} {r['peak'] / 2**30:7.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
