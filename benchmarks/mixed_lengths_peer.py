"""One peer of ``mixed_lengths.py``, in a process of its own: ``mixed_lengths_peer.py JOB-AS-JSON RESULT-FILE``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from sft_step_peer import SEVEN, MLXMemory, TorchMemory, make_model


def main() -> None:
    """Run the job in its mode."""
    job, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    if job["peer"] == "make-model":
        make_model(job)
        return
    measured = run_trl(job) if job["peer"] == "trl" else run_hf_mlx(job)
    output.write_text(json.dumps({"peer": job["peer"], "mode": job["mode"]} | measured), encoding="utf-8")


def documents(job: dict[str, Any]) -> Any:
    """Random ids of log-normal lengths; the first fifth to three fifths of each are not trained."""
    import numpy as np
    from datasets import Dataset

    draw = np.random.default_rng(0)
    lengths = np.exp(draw.normal(np.log(job["median"]), job["sigma"], job["documents"]))
    rows = []
    for length in np.clip(lengths, 16, job["max_length"]).astype(int):
        ids = draw.integers(3, job["model"][-1], length)
        labels = np.where(np.arange(length) < length * draw.uniform(0.2, 0.6), -100, ids)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return Dataset.from_list(rows)


class Meter:
    """Seconds and real tokens of each step after the warm-up.

    Args:
        job: Steps, warm-up, and which clock.
        memory: Device memory: an object with ``reset()``, ``peak()`` and ``synchronize()``.
        traces: How many shapes were traced so far.
    """

    def __init__(self, job: dict[str, Any], memory: Any, traces: Callable[[], int]) -> None:
        self.first, self.last = job["warm_up"], job["warm_up"] + job["steps"]
        self.memory, self.traces = memory, traces
        self.clock = time.process_time if job["cpu_time"] else time.perf_counter
        self.marks: list[tuple[float, int, int]] = []
        self.step = 0

    def tick(self, tokens: int) -> None:
        """A step has ended; ``tokens`` were seen so far."""
        self.step += 1
        if self.step == self.first:
            self.memory.reset()
        if self.step >= self.first:
            # Waiting for each step costs every peer alike, and tells a step that traced from the next.
            self.memory.synchronize()
            self.marks.append((self.clock(), tokens, self.traces()))

    def result(self) -> dict[str, Any]:
        """Seconds and tokens of all timed steps, tokens a second of those that traced nothing, traces, and the peak."""
        spans = [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in pairwise(self.marks)]
        calm = [span for span in spans if not span[2]] or spans
        return {
            "seconds": self.marks[-1][0] - self.marks[0][0],
            "tokens": self.marks[-1][1] - self.marks[0][1],
            "steady": sum(tokens for _, tokens, _ in calm) / sum(seconds for seconds, _, _ in calm),
            "traces": self.marks[-1][2],
            "peak": self.memory.peak(),
        }


def make_trainer(trainer_class: Any, job: dict[str, Any], meter: Meter) -> Any:
    """The script that both trainers run."""
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig

    class Ticks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            meter.tick(state.num_input_tokens_seen)

    packed = job["mode"] == "packed"
    args = SFTConfig(
        output_dir=f"{job['folder']}/out",
        max_steps=meter.last,
        per_device_train_batch_size=job["packed_rows"] if packed else job["rows"],
        max_length=job["max_length"],
        packing=packed,
        train_sampling_strategy="group_by_length" if job["mode"] == "grouped" else "random",
        include_num_input_tokens_seen="non_padding",
        bf16=job["dtype"] == "bfloat16",
        model_init_kwargs={"dtype": job["dtype"]},
        gradient_checkpointing=job["checkpointing"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    lora = LoraConfig(r=job["rank"], lora_alpha=2 * job["rank"], target_modules=SEVEN, task_type="CAUSAL_LM")
    return trainer_class(job["folder"], args, train_dataset=documents(job), peft_config=lora, callbacks=[Ticks()])


def run_trl(job: dict[str, Any]) -> dict[str, Any]:
    """trl.SFTTrainer."""
    from trl import SFTTrainer

    meter = Meter(job, TorchMemory(), lambda: 0)
    trainer = make_trainer(SFTTrainer, job, meter)
    collate, seen = trainer.data_collator, {"positions": 0}

    def counting(rows: Any) -> Any:
        batch = collate(rows)
        seen["positions"] += batch["input_ids"].numel()
        return batch

    trainer.data_collator = counting
    trainer.train()
    # The loader collates one batch ahead of the steps at most.
    return meter.result() | {"padding": max(1 - trainer.state.num_input_tokens_seen / seen["positions"], 0)}


def run_hf_mlx(job: dict[str, Any]) -> dict[str, Any]:
    """MLXSFTTrainer."""
    from hf_mlx import MLXSFTTrainer

    meter = Meter(job, MLXMemory(), lambda: trainer.session.step.traces)
    trainer = make_trainer(MLXSFTTrainer, job, meter)
    trainer.train()
    progress = trainer.session.progress
    return meter.result() | {"padding": progress.padding / progress.positions}


if __name__ == "__main__":
    main()
