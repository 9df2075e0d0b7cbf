"""One step of continued pre-training, side by side: MLXTrainer and transformers.Trainer, on one device in one run.

Both run the same script: a model object, blocks of tokens that fill their rows, default_data_collator, logging,
callbacks and norm clipping; all weights train, or a LoRA with ``--rank``. Processes, shapes and figures are those of
`sft_step.py`.

    python benchmarks/trainer_step.py                # a small model, what a CPU can do
    python benchmarks/trainer_step.py --preset llama-1b --dtype bfloat16 --rank 16 --json out.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from sft_step import PRESETS, run_peer, versions

PEERS = ("hf_mlx", "transformers")
WORKER = Path(__file__).with_name("trainer_step_peer.py")


def main() -> None:
    """Run both on every shape and print the table."""
    options = parse()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        job = vars(options) | {"folder": folder, "model": PRESETS[options.preset], "on": options.checkpointing}
        run_peer({**job, "peer": "make-model"}, folder, WORKER)
        for shape, peer in product(options.shapes, options.peers):
            results += run_peer({**job, "peer": peer, "shapes": [shape]}, folder, WORKER)
    print(table(options, results))
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        report = {"versions": versions(), "options": vars(options), "results": results}
        Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--shapes", nargs="+", default=["2x256"], metavar="ROWSxTOKENS", help="batches to time")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rank", type=int, default=0, help="of a LoRA on all seven projections; 0 trains all weights")
    parser.add_argument("--accumulate", type=int, default=1, help="gradient_accumulation_steps")
    parser.add_argument("--clip", type=float, default=1.0, help="max_grad_norm; 0 is off")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before them: tracing, compiling, caches")
    parser.add_argument("--json", metavar="FILE", help="write every figure, with versions and device")
    return parser.parse_args()


def table(options: argparse.Namespace, results: list[dict[str, Any]]) -> str:
    """Ratios to hf_mlx, with the figures they come from."""
    trained = f"LoRA r={options.rank}" if options.rank else "all weights"
    lines = [
        f"\n{options.preset}, {trained}, {options.dtype}, AdamW, clip {options.clip or 'off'}, "
        f"mean of {options.steps} steps",
        f"{'batch':>9} {'peer':12} {'ms/step':>8} {'tokens/s':>9} {'x ours':>7} {'GiB':>9} {'x ours':>7}",
    ]
    ours = {r["shape"]: r for r in results if r["peer"] == "hf_mlx"}
    for r in results:
        base = ours.get(r["shape"], r)
        lines.append(
            f"{r['shape']:>9} {r['peer']:12} {1e3 * r['seconds']:8.1f} {r['tokens'] / r['seconds']:9.0f} "
            f"{base['seconds'] / r['seconds']:7.2f} {r['peak'] / 2**30:9.2f} {r['peak'] / base['peak']:7.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
