"""One step of preference training, side by side: MLXDPOTrainer and trl.DPOTrainer, on one device in one run.

Both run the same script, LoRA on a random model, with the adapter off as reference. Each peer and shape is run in a
process of its own, and each line is printed when it is measured. A shape is pairs x tokens of a prompt with its answer;
prompts are a quarter and half of them. The peak counts the steps after warm-up, without loading.

    python benchmarks/dpo_step.py                    # a small model, what a CPU can do
    python benchmarks/dpo_step.py --preset llama-1b --dtype bfloat16 --shapes 4x1024 --steps 20 --json out.json
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from sft_step import PRESETS, run_peer, versions

PEERS = ("hf_mlx", "hf_mlx, prompts twice", "trl")
REFERENCES = {
    "base": "the policy with its adapter off",
    "precomputed": "log-probabilities computed before the first step",
}
WORKER = Path(__file__).with_name("dpo_step_peer.py")


def main() -> None:
    """Run both on every shape, print each line as it comes."""
    options = parse()
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    report = {"versions": versions(), "preset": options.preset, "dtype": options.dtype}
    report |= {"reference": options.reference, "results": results}
    print(
        f"{options.preset}, LoRA r={options.rank} on all seven projections, {options.dtype}, "
        f"mean of {options.steps} steps on {report['versions']['device']}\n"
        f"reference: {REFERENCES[options.reference]}\n{header()}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        job = vars(options) | {"folder": folder, "model": PRESETS[options.preset]}
        run_peer({**job, "peer": "make-model"}, folder, WORKER)
        for checkpointing, shape, share in product(options.checkpointing, options.shapes, options.prompts):
            base: dict[str, Any] | None = None
            for peer in options.peers:
                job |= {"peer": peer, "on": checkpointing == "on", "shape": shape, "share": share}
                for found in run_peer(job, folder, WORKER, limit=options.limit):
                    results.append(found)
                    base = found if peer == "hf_mlx" else base
                    print(line(found, base), flush=True)
                # What is measured stays, whatever comes next.
                if options.json:
                    Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--shapes", nargs="+", default=["2x256"], metavar="PAIRSxTOKENS", help="batches to time")
    parser.add_argument("--prompts", nargs="+", type=float, default=[0.25, 0.5], help="prompt's share of the tokens")
    parser.add_argument(
        "--dtype", choices=("float32", "autocast", "bfloat16"), default="float32", help="as sft_step.py"
    )
    parser.add_argument("--reference", choices=REFERENCES, default="base")
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["hf_mlx", "trl"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1, help="gradient_accumulation_steps")
    parser.add_argument("--clip", type=float, default=1.0, help="max_grad_norm; 0 is off")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one peer on one shape")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before them: tracing, compiling, caches")
    parser.add_argument("--json", metavar="FILE", help="write every figure, with versions and device")
    return parser.parse_args()


def header() -> str:
    """Over the lines."""
    return (
        f"{'pairs':>9} {'prompt':>6} {'ckpt':>4} {'peer':22} {'ms/step':>8} {'pairs/s':>8} {'x ours':>7} {'GiB':>7} "
        f"{'x ours':>7} {'loss':>8}"
    )


def line(found: dict[str, Any], base: dict[str, Any] | None) -> str:
    """The figures of one peer, and their ratios to ours; nan where ours stopped."""
    speed = found["pairs"] / found["seconds"]
    ours = base["pairs"] / base["seconds"] if base else math.nan
    memory = found["peak"] / base["peak"] if base else math.nan
    return (
        f"{found['shape']:>9} {found['share']:6.2f} {'on' if found['checkpointing'] else 'off':>4} {found['peer']:22} "
        f"{1e3 * found['seconds']:8.1f} {speed:8.2f} {speed / ours:7.2f} {found['peak'] / 2**30:7.2f} "
        f"{memory:7.2f} {found['losses'][-1]:8.5f}"
    )


if __name__ == "__main__":
    main()
