"""One step of continued pre-training, side by side: MLXTrainer and transformers.Trainer, on one device in one run.

Both run the same script: a model object, blocks of tokens that fill their rows, default_data_collator, logging,
callbacks and norm clipping; all weights train, or a LoRA with ``--rank``. Processes, shapes and figures are those of
`sft_step.py`.

    python benchmarks/trainer_step.py                # a small model, what a CPU can do
    python benchmarks/trainer_step.py --preset llama-1b --dtype bfloat16 --rank 16 --shapes 4x1024 --json out.json
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from sft_step import PRESETS, run_peer, versions

PEERS = ("hf_mlx", "transformers")
WORKER = Path(__file__).with_name("trainer_step_peer.py")


def main() -> None:
    """Run both on every shape, print each line as it comes."""
    options = parse()
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    report = {"versions": versions(), "options": vars(options), "results": results}
    trained = f"LoRA r={options.rank}" if options.rank else "all weights"
    print(
        f"{options.preset}, {trained}, {options.dtype}, AdamW, clip {options.clip or 'off'}, "
        f"mean of {options.steps} steps on {report['versions']['device']}\n"
        f"{'batch':>9} {'peer':12} {'ms/step':>8} {'tokens/s':>9} {'x ours':>7} {'GiB':>9} {'x ours':>7} {'loss':>8}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        job = vars(options) | {"folder": folder, "model": PRESETS[options.preset], "on": options.checkpointing}
        run_peer({**job, "peer": "make-model"}, folder, WORKER)
        for shape in options.shapes:
            base: dict[str, Any] | None = None
            for peer in options.peers:
                for found in run_peer({**job, "peer": peer, "shape": shape}, folder, WORKER, limit=options.limit):
                    results.append(found)
                    base = found if peer == "hf_mlx" else base
                    print(line(found, base), flush=True)
                # What is measured stays, whatever comes next.
                if options.json:
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
    parser.add_argument("--limit", type=float, default=300, help="seconds for one peer on one shape")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before them: tracing, compiling, caches")
    parser.add_argument("--json", metavar="FILE", help="write every figure, with versions and device")
    return parser.parse_args()


def line(found: dict[str, Any], base: dict[str, Any] | None) -> str:
    """The figures of one peer, and their ratios to ours; nan where ours stopped."""
    speed = found["tokens"] / found["seconds"]
    ours = base["tokens"] / base["seconds"] if base else math.nan
    memory = found["peak"] / base["peak"] if base else math.nan
    return (
        f"{found['shape']:>9} {found['peer']:12} {1e3 * found['seconds']:8.1f} {speed:9.0f} {speed / ours:7.2f} "
        f"{found['peak'] / 2**30:9.2f} {memory:7.2f} {found['losses'][-1]:8.5f}"
    )


if __name__ == "__main__":
    main()
