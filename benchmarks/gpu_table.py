"""The works of docs/performance.md, each beside TRL and mlx-lm, on one card in one run; written into that page.

    python benchmarks/gpu_table.py --json table.json                                # one CUDA GPU with 40 GiB
    python benchmarks/gpu_table.py --json table.json --write docs/performance.md    # what is measured is not run again
    python benchmarks/gpu_table.py --json tiny.json --tiny                          # on any machine

A run that was cut off goes on where it stopped. The page keeps its rows of works that were not measured, and says which
those are. The floor of a work is the time of its matrix products and causal attention alone at the speed that one large
bf16 product reaches on the same card, none computed twice.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_step import PRESETS, model_of, run_peer, versions

MARKS = "<!-- gpu_table: begin -->\n", "<!-- gpu_table: end -->\n"
PEERS = {"hf_mlx": "`MLXSFTTrainer`", "trl": "`trl.SFTTrainer`", "mlx-lm": "mlx-lm"}


@dataclass(frozen=True)
class Work:
    """One line of the table."""

    name: str
    preset: str
    shape: str
    trained: str = "lora"
    checkpointing: bool = False
    accumulate: int = 1
    steps: int = 10

    @property
    def job(self) -> dict[str, Any]:
        """What a peer is told."""
        return {
            "shapes": [self.shape],
            "trained": self.trained,
            "on": self.checkpointing,
            "accumulate": self.accumulate,
            "steps": self.steps,
        }


WORKS = [
    Work("LoRA", "llama-1b", "8x1024"),
    Work("all weights", "llama-1b", "4x1024", trained="all"),
    Work("all weights, checkpointing", "llama-1b", "8x1024", trained="all", checkpointing=True),
    Work("experts, LoRA", "qwen3-moe", "4x1024"),
    Work("gemma3-1b, LoRA", "gemma3-1b", "4x1024"),
    Work("qwen3-0.6b, LoRA, accumulation of 8", "qwen3-0.6b", "1x512", accumulate=8, steps=4),
    Work("LoRA, long rows", "llama-1b", "1x8192"),
    Work("LoRA, longer rows, checkpointing", "llama-1b", "1x16384", checkpointing=True, steps=6),
]
COMMON = {"dtype": "bfloat16", "rank": 16, "clip": 1.0, "warm_up": 3, "rounds": 0}


def main() -> None:
    """Measure what is missing, print, write."""
    options = parse()
    kept = Path(options.json)
    kept.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {"works": {}}
    if options.tiny:
        PRESETS.update(dict.fromkeys(PRESETS, (64, 128, 2, 4, 2, 512)))
    wanted = [work for work in WORKS if not options.works or work.name in options.works]
    missing = [
        (work, peer) for work in wanted for peer in options.peers if peer not in report["works"].get(work.name, {})
    ]
    if missing:
        report["versions"] = versions()
        report.setdefault("speed", product_speed(64 if options.tiny else 8192))
    with tempfile.TemporaryDirectory() as folder:
        run(missing, report, kept, options, folder)
    print(table(report, wanted))
    if options.write:
        write(options.write, report, wanted)


def run(
    missing: list[tuple[Work, str]], report: dict[str, Any], kept: Path, options: argparse.Namespace, folder: str
) -> None:
    """Measure each peer on each work that is missing, and keep each figure as it comes."""
    made = ""
    for work, peer in missing:
        if work.preset != made:
            run_peer({**job_of(work, options, folder), "peer": "make-model"}, folder)
            made = work.preset
        began = time.monotonic()
        found = run_peer({**job_of(work, options, folder), "peer": peer}, folder, limit=options.limit)
        for entry in found:
            report["works"].setdefault(work.name, {})[peer] = entry
            took = time.monotonic() - began
            figures = f"{1e3 * entry['seconds']:8.1f} ms {entry['peak'] / 2**30:7.2f} GiB, {took:.0f} s"
            print(f"{work.name:38} {peer:8} {figures}", flush=True)
        kept.write_text(json.dumps(report, indent=1), encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", required=True, metavar="FILE", help="every figure; what it holds is not run again")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the marks of this page")
    parser.add_argument("--works", nargs="+", choices=[work.name for work in WORKS], help="only these")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--limit", type=float, default=240, help="seconds for one peer on one work")
    parser.add_argument("--tiny", action="store_true", help="every model tiny, rows of 16: a look at the script itself")
    return parser.parse_args()


def job_of(work: Work, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What a peer is told of one work; its model lies in ``folder``."""
    job = COMMON | work.job | {"folder": folder, **model_of(work.preset)}
    if options.tiny:
        job |= {"shapes": [f"{work.shape.split('x')[0]}x16"], "dtype": "float32", "steps": 2, "warm_up": 1}
        if "moe_intermediate_size" in job["config"]:
            job["config"] = job["config"] | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return job


def product_speed(size: int) -> float:
    """FLOP/s of a bf16 product of two ``size`` x ``size`` matrices in torch."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(20):
        began = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def operations(work: Work) -> float:
    """FLOP of a step: the products with weights, three times where they are trained and twice where not, and attention.

    Adapters of a low rank and the recomputation of checkpoints are left out. The head is computed for all positions.
    """
    hidden, mlp, layers, heads, groups, vocabulary = PRESETS[work.preset]
    config = model_of(work.preset)["config"]
    head = config.get("head_dim", hidden // heads)
    experts = config.get("num_experts_per_tok", 0)
    feed_forward = 3 * hidden * (experts * config["moe_intermediate_size"] if experts else mlp)
    weights = layers * (hidden * head * (2 * heads + 2 * groups) + feed_forward) + hidden * vocabulary
    rows, tokens = map(int, work.shape.split("x"))
    tokens_a_step = rows * tokens * work.accumulate
    # Two products forward, five backward (flash attention computes the scores again), half of each under the mask.
    seen = min(tokens, 2 * config.get("sliding_window", tokens))
    attention = 7 * 2 * tokens_a_step * seen / 2 * heads * head * layers
    return (6 if work.trained == "all" else 4) * weights * tokens_a_step + attention


def table(report: dict[str, Any], wanted: list[Work], older: str = "") -> str:
    """The figures as a page shows them; of other works the rows of an ``older`` table."""
    lines = [
        "| work | rows x tokens | floor | " + " | ".join(PEERS.values()) + " | beside TRL |",
        "| --- | --- | ---: |" + " ---: |" * len(PEERS) + " ---: |",
    ]
    kept = []
    for work in WORKS:
        found = report["works"].get(work.name, {}) if work in wanted else {}
        if not found:
            rows = [line for line in older.splitlines() if line.startswith(f"| {work.name} |")]
            lines += rows
            kept += [work.name] if rows else []
            continue
        cells = [
            f"{1e3 * found[peer]['seconds']:.0f} ms, {found[peer]['peak'] / 2**30:.1f} GiB" if peer in found else "-"
            for peer in PEERS
        ]
        ours, theirs = found.get("hf_mlx"), found.get("trl")
        beside = "-"
        if ours and theirs:
            beside = f"{theirs['seconds'] / ours['seconds']:.2f}, {ours['peak'] / theirs['peak']:.2f}"
        shape = work.shape.replace("x", " x ") + (f" x {work.accumulate}" if work.accumulate > 1 else "")
        floor = f"{1e3 * operations(work) / report['speed']:.0f} ms"
        lines.append(f"| {work.name} | {shape} | {floor} | {' | '.join(cells)} | {beside} |")
    used = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if name not in ("machine",))
    notes = [f"One large product: {report['speed'] / 1e12:.0f} TFLOP/s. {used}.\n"]
    if kept:
        notes.append(f"Of an earlier run: {'; '.join(kept)}.\n")
    return "\n".join([*lines, "", *notes])


def write(page: Path, report: dict[str, Any], wanted: list[Work]) -> None:
    """Put the table between the marks of ``page``."""
    begin, end = MARKS
    whole = page.read_text(encoding="utf-8")
    if begin not in whole or end not in whole:
        sys.exit(f"{page} has no place for it: add the lines {begin!r} and {end!r}")
    before, rest = whole.split(begin)
    older, after = rest.split(end)
    page.write_text(before + begin + table(report, wanted, older) + end + after, encoding="utf-8")


if __name__ == "__main__":
    main()
