"""One fine-tuning step, side by side: hf_mlx, mlx-lm's train() and trl.SFTTrainer, on one device in one run.

Each runs as its users run it: MLXSFTTrainer and SFTTrainer from the same script with logging, callbacks and norm
clipping, mlx-lm from its own LoRA layers and train(). The model is built at random from a configuration, so nothing is
downloaded. Every peer runs each shape in a process of its own, so that its peak memory is its own; the peak counts the
steps after warm-up, without loading.

    python benchmarks/sft_step.py                    # a small model, what a CPU can do
    python benchmarks/sft_step.py --preset llama-1b --dtype bfloat16 --checkpointing off on --json out.json

mlx-lm trains on ``batch[:, :-1]``. Its row called ``mlx-lm`` gets ``max_seq_length`` equal to the length, as one sets
it, and so computes on length - 1; ``mlx-lm +1`` gets one token more, which keeps its matrix products aligned.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

PRESETS = {
    # hidden, mlp, layers, heads, key-value heads, vocabulary
    "tiny": (64, 128, 2, 4, 2, 512),
    "small": (256, 768, 4, 4, 2, 8192),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "llama-1b": (2048, 8192, 16, 32, 8, 49152),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 151936),
    "gemma3-1b": (1152, 6912, 26, 4, 1, 262144),
    "qwen3-moe": (2048, 6144, 8, 32, 4, 49152),
}
# What a preset's configuration has beside its sizes; a Llama without an entry.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {"model_type": "qwen3", "head_dim": 128, "tie_word_embeddings": True},
    "gemma3-1b": {"model_type": "gemma3_text", "head_dim": 256, "tie_word_embeddings": True, "sliding_window": 512},
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "head_dim": 128,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
}
PEERS = ("hf_mlx", "mlx-lm", "mlx-lm +1", "trl")
WORKER = Path(__file__).with_name("sft_step_peer.py")


def main() -> None:
    """Run every peer on every shape and print the table."""
    options = parse()
    for file in filter(None, (options.json, options.chart)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    report = {"versions": versions(), "preset": options.preset, "dtype": options.dtype, "results": results}
    with tempfile.TemporaryDirectory() as folder:
        job = vars(options) | {"folder": folder, **model_of(options.preset)}
        run_peer({**job, "peer": "make-model"}, folder)
        for checkpointing in options.checkpointing:
            for peer, shape in product(options.peers, options.shapes):
                job |= {"peer": peer, "on": checkpointing == "on", "shapes": [shape]}
                results += run_peer(job, folder)
                # After each peer: what is measured stays, whatever comes next.
                if options.json:
                    Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(table(options, results))
    if options.chart:
        draw(results, options.chart)


def model_of(preset: str) -> dict[str, Any]:
    """What a job says of its model."""
    return {"model": PRESETS[preset], "config": CONFIGS.get(preset, {})}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--shapes", nargs="+", default=["2x256"], metavar="ROWSxTOKENS", help="batches to time")
    parser.add_argument(
        "--dtype",
        choices=("float32", "autocast", "bfloat16"),
        default="float32",
        help="float32; autocast: fp32 weights and bf16=True, what TRL does with a model given by name; bfloat16: bf16 "
        "weights and bf16=True. mlx-lm computes in the dtype of the weights, bf16 for both (float32)",
    )
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--trained", choices=("lora", "all"), default="lora", help="LoRA on linear layers, or all weights"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--accumulate", type=int, default=1, help="gradient_accumulation_steps")
    parser.add_argument("--clip", type=float, default=1.0, help="max_grad_norm; 0 is off")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before them: tracing, compiling, caches")
    parser.add_argument("--rounds", type=int, default=3, help="of hf_mlx's trainer and its bare step in turn; 0 is off")
    parser.add_argument("--json", metavar="FILE", help="write every figure, with versions and device")
    parser.add_argument("--chart", metavar="FILE", help="write a bar chart (PNG)")
    return parser.parse_args()


def run_peer(job: dict, folder: str, worker: Path = WORKER, *, limit: float | None = None, **variables: str) -> Any:
    """Run one peer in a process of its own; what it wrote, or an empty list once it was said why there is nothing.

    Args:
        job: What ``worker`` does; ``peer`` and ``mode`` name it in a message.
        folder: For the result.
        worker: Script that takes the job and the file to write.
        limit: Seconds after which it is stopped.
        variables: Of its environment, beside this one's.
    """
    output = Path(folder, "result.json")
    output.unlink(missing_ok=True)
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"} | variables
    command = [sys.executable, str(worker), json.dumps(job), str(output)]
    reason = ""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=limit)
        if done.returncode:
            # Where it stopped, not only why: the machine may be gone when someone asks.
            reason = "\n".join(done.stderr.strip().splitlines()[-8:]) or f"exit status {done.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"it took more than {limit:.0f} seconds (--limit)"
    if reason:
        print(f"{job['peer']} {job.get('mode', '')}".strip() + f" stopped: {reason}", file=sys.stderr, flush=True)
    return json.loads(output.read_text(encoding="utf-8")) if output.exists() else []


def table(options: argparse.Namespace, results: list[dict]) -> str:
    """Ratios to hf_mlx, with the figures they come from."""
    trained = "all weights" if options.trained == "all" else f"LoRA r={options.rank} on all seven projections"
    lines = [
        f"\n{options.preset}, {trained}, {options.dtype}, AdamW, "
        f"clip {options.clip or 'off'}, mean of {options.steps} steps",
        f"{'batch':>9} {'ckpt':>4} {'peer':10} {'ms/step':>8} {'tokens/s':>9} {'x ours':>7} {'GiB':>9} {'x ours':>7}",
    ]
    ours = {(r["shape"], r["checkpointing"]): r for r in results if r["peer"] == "hf_mlx"}
    for r in sorted(results, key=lambda r: (options.shapes.index(r["shape"]), r["checkpointing"])):
        base = ours.get((r["shape"], r["checkpointing"]), r)
        lines.append(
            f"{r['shape']:>9} {'on' if r['checkpointing'] else 'off':>4} {r['peer']:10} {1e3 * r['seconds']:8.1f} "
            f"{r['tokens'] / r['seconds']:9.0f} {r['tokens'] / r['seconds'] / (base['tokens'] / base['seconds']):7.2f} "
            f"{r['peak'] / 2**30:9.2f} {r['peak'] / base['peak']:7.2f}"
        )
        if r.get("alone"):
            kinds = {"medians": statistics.median, "means": statistics.mean}
            over = ", ".join(f"{name} {100 * (f(r['whole']) / f(r['alone']) - 1):+.1f}%" for name, f in kinds.items())
            lines.append(f"{'':15}the trainer over its bare compiled step, {options.rounds} times in turn: {over}")
    return "\n".join(lines)


def draw(results: list[dict], path: str) -> None:
    """Tokens per second and peak memory as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.6 + 0.35 * len(results)), layout="constrained")
    labels = [f"{r['peer']}  {r['shape']}{'  ckpt' if r['checkpointing'] else ''}" for r in results]
    colours = [f"C{PEERS.index(r['peer'])}" for r in results]
    axes[0].barh(labels, [r["tokens"] / r["seconds"] for r in results], color=colours)
    axes[0].set_title("tokens per second")
    axes[1].barh(labels, [r["peak"] / 2**30 for r in results], color=colours)
    axes[1].set_title("peak memory, GiB")
    axes[1].set_yticklabels([])
    for axis in axes:
        axis.invert_yaxis()
    figure.savefig(path, dpi=120)


def versions() -> dict[str, str]:
    """Versions of what was measured, and the machine."""
    names = ("mlx", "mlx-lm", "transformers", "trl", "peft", "torch", "accelerate")
    return {name: installed(name) for name in names} | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device(),
    }


def installed(name: str) -> str:
    """The version that is imported; empty where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def device() -> str:
    """Name of the GPU, or of the processor and its cores."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
