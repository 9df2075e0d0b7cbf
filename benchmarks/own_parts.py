"""What a loss or an optimizer of the script's own costs: MLXSFTTrainer with torch's part, beside its own compiled step.

The same model, rows and settings in one process, the variants in turn, round after round; the figure is the median of
a step and its ratio to the compiled one. Adapters and all weights, since an optimizer in torch moves what is trained to
the host and back at each step.

    python benchmarks/own_parts.py                   # a small model, what a CPU can do
    python benchmarks/own_parts.py --preset llama-1b --dtype bfloat16 --json out.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sft_step import PRESETS, versions
from sft_step_peer import make_model

VARIANTS = ("compiled", "optimizer", "loss")
TRAINED = ("adapter", "all weights")


def main() -> None:
    """Run every variant and print the table."""
    from hf_mlx.blas import load_openblas

    # Before the model is made, which loads MLX.
    load_openblas()
    options = parse()
    seconds: dict[tuple[str, str], list[float]] = {(t, v): [] for t in options.trained for v in VARIANTS}
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = str(Path(folder, "model"))
        make_model({"folder": folder, "model": PRESETS[options.preset], "dtype": options.dtype})
        for _ in range(options.rounds):
            for trained, variant in seconds:
                times, counts[trained] = run(options, folder, trained, variant)
                seconds[trained, variant] += times
    results = []
    for (trained, variant), times in seconds.items():
        base = statistics.median(seconds[trained, "compiled"])
        median = statistics.median(times)
        results.append({"trained": trained, "variant": variant, "numbers": counts[trained], "seconds": median})
        results[-1]["ratio"] = median / base
        print(f"{trained:12} {counts[trained]:>12,} {variant:10} {1e3 * median:9.1f} ms  {median / base:5.2f}")
    if options.json:
        report = {"versions": versions(), "options": vars(options), "results": results}
        Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--trained", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shape", default="2x256", metavar="ROWSxTOKENS")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a round")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them: tracing, compiling, caches")
    parser.add_argument("--json", help="also write the figures to this file")
    return parser.parse_args()


def run(options: argparse.Namespace, folder: str, trained: str, variant: str) -> tuple[list[float], int]:
    """Seconds of each timed step, and how many numbers were trained."""
    import mlx.core as mx
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig

    from hf_mlx import MLXSFTTrainer

    class Own(MLXSFTTrainer):
        def create_optimizer(self, model: Any = None) -> Any:
            return super().create_optimizer(model)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.at: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            mx.synchronize()
            self.at.append(time.perf_counter())

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        import torch.nn.functional as F

        logits, targets = outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / num_items_in_batch

    rows, tokens = map(int, options.shape.split("x"))
    ids = [[3 + (7 * i + j * (i + 1)) % 200 for j in range(tokens)] for i in range(8 * rows)]
    clock = Clock()
    trainer = (Own if variant == "optimizer" else MLXSFTTrainer)(
        folder,
        SFTConfig(
            f"{folder}-out", per_device_train_batch_size=rows, max_steps=options.warm_up + options.steps, bf16=False,
            max_length=tokens, logging_steps=1000, report_to="none", save_strategy="no", disable_tqdm=True,
            model_init_kwargs={"dtype": options.dtype}, gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        peft_config=LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        if trained == "adapter"
        else None,
        callbacks=[clock],
        compute_loss_func=loss if variant == "loss" else None,
    )  # fmt: skip
    trainer.train()
    times = [b - a for a, b in zip(clock.at, clock.at[1:], strict=False)]
    return times[options.warm_up - 1 :], trainer.get_num_trainable_parameters()


if __name__ == "__main__":
    main()
