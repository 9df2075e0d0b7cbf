"""One peer of ``sft_step.py``, in a process of its own: ``sft_step_peer.py JOB-AS-JSON RESULT-FILE``."""

from __future__ import annotations

import gc
import json
import resource
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Run the job on each of its shapes."""
    job, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    if job["peer"] == "make-model":
        make_model(job)
        output.write_text("[]", encoding="utf-8")
        return
    runner = {"hf_mlx": run_hf_mlx, "trl": run_trl}.get(job["peer"], run_mlx_lm)
    results = []
    for shape in job["shapes"]:
        rows, tokens = map(int, shape.split("x"))
        measured = runner(job, rows, tokens)
        entry = {"peer": job["peer"], "shape": shape, "checkpointing": job["on"]}
        results.append(entry | {"tokens": rows * tokens * measured.pop("windows", 1)} | measured)
        # A shape that does not fit must not lose the ones before it.
        output.write_text(json.dumps(results), encoding="utf-8")
        gc.collect()


def make_model(job: dict[str, Any]) -> None:
    """Write a model of random weights, a Llama unless the job says otherwise, with a tokenizer into its folder."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    hidden, mlp, layers, heads, key_value_heads, vocabulary = job["model"]
    changes = {"model_type": "llama", "tie_word_embeddings": False} | job.get("config", {})
    config = AutoConfig.for_model(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        max_position_embeddings=16384,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **changes,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config)
    model.to(torch.float32 if job["dtype"] == "float32" else torch.bfloat16).save_pretrained(job["folder"])
    # mlx-lm reads what transformers 5 no longer writes in these places.
    file = Path(job["folder"], "config.json")
    written = json.loads(file.read_text(encoding="utf-8"))
    older = {"rope_theta": 10000.0} | {key: value for key, value in changes.items() if key == "num_experts"}
    file.write_text(json.dumps(older | written), encoding="utf-8")
    words = {f"w{i}": i for i in range(vocabulary)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")),
        bos_token="w0",
        eos_token="w1",
        pad_token="w2",
        unk_token="w3",
    ).save_pretrained(job["folder"])


def random_rows(job: dict[str, Any], count: int, tokens: int) -> list[list[int]]:
    """``count`` rows of ``tokens`` random ids; where the job is ``uneven``, of half as many to all of them."""
    import numpy as np

    draw = np.random.default_rng(0)
    rows = draw.integers(3, job["model"][-1], (count, tokens)).tolist()
    return [row[: draw.integers(tokens // 2, tokens + 1)] for row in rows] if job.get("uneven") else rows


class Clock:
    """Times the steps after warm-up, with the device drained at both ends, and their peak memory.

    Args:
        memory: Device memory: an object with ``reset()``, ``peak()`` and ``synchronize()``.
    """

    def __init__(self, job: dict[str, Any], memory: Any) -> None:
        self.first, self.last = job["warm_up"], job["warm_up"] + job["steps"]
        self.memory = memory
        self.ends: list[float] = []
        self.step = 0

    def callback(self) -> Any:
        """A ``TrainerCallback`` that ticks at the end of each step."""
        from transformers import TrainerCallback

        class Ticks(TrainerCallback):
            def on_step_end(_, args, state, control, **kwargs):
                self.tick()

        return Ticks()

    def tick(self) -> None:
        """A step has ended."""
        self.step += 1
        if self.step == self.first:
            self.memory.synchronize()
            self.memory.reset()
        if self.step == self.last:
            self.memory.synchronize()
        if self.step >= self.first:
            self.ends.append(time.perf_counter())

    def restart(self) -> None:
        """Time another run."""
        self.ends, self.step = [], 0

    def intervals(self) -> list[float]:
        """Seconds of each timed step."""
        return [after - before for before, after in pairwise(self.ends)]

    def result(self) -> dict[str, Any]:
        """Mean seconds of a step, those of each, and the peak in bytes."""
        each = self.intervals()
        return {"seconds": statistics.mean(each), "each": each, "peak": self.memory.peak()}


class MLXMemory:
    """MLX's device; on a CPU the peak is the process's."""

    def __init__(self) -> None:
        import mlx.core as mx

        self._mx, self._cpu = mx, mx.default_device() == mx.Device(mx.cpu)

    def synchronize(self) -> None:
        self._mx.synchronize()

    def reset(self) -> None:
        self._mx.reset_peak_memory()

    def peak(self) -> int:
        return process_peak() if self._cpu else self._mx.get_peak_memory()


class TorchMemory:
    """torch's CUDA device, or the process where there is none."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda if torch.cuda.is_available() else None

    def synchronize(self) -> None:
        if self._cuda:
            self._cuda.synchronize()

    def reset(self) -> None:
        if self._cuda:
            self._cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return self._cuda.max_memory_allocated() if self._cuda else process_peak()


def process_peak() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def settings(job: dict[str, Any], rows: int, clock: Clock) -> dict[str, Any]:
    """What every script writes into its arguments."""
    return {
        "output_dir": job.get("output_dir", f"{job['folder']}/out"),
        "max_steps": clock.last,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": job["accumulate"],
        "max_grad_norm": job["clip"],
        "bf16": job["dtype"] != "float32",
        "gradient_checkpointing": job["on"],
        "use_cpu": job.get("use_cpu", False),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def named_dtype(job: dict[str, Any]) -> dict[str, str]:
    """``model_init_kwargs`` of a model given by name."""
    return {"dtype": "bfloat16" if job["dtype"] == "bfloat16" else "float32"}


def lora(job: dict[str, Any]) -> Any:
    """The adapter of every script."""
    from peft import LoraConfig

    targets = job.get("targets", SEVEN)
    return LoraConfig(r=job["rank"], lora_alpha=2 * job["rank"], target_modules=targets, task_type="CAUSAL_LM")


def make_trainer(trainer_class: Any, job: dict[str, Any], rows: int, tokens: int, clock: Clock) -> Any:
    """The script that both trainers run."""
    from datasets import Dataset
    from trl import SFTConfig

    count = rows * job["accumulate"] * job.get("processes", 1) * clock.last
    data = Dataset.from_dict({"input_ids": random_rows(job, count, tokens)})
    options = {"logging_steps": job.get("logging_steps", 10)}
    args = SFTConfig(**settings(job, rows, clock), **options, max_length=tokens, model_init_kwargs=named_dtype(job))
    adapter = None if job.get("trained") == "all" else lora(job)
    return trainer_class(job["folder"], args, train_dataset=data, peft_config=adapter, callbacks=[clock.callback()])


def run_trl(job: dict[str, Any], rows: int, tokens: int) -> dict[str, Any]:
    """trl.SFTTrainer."""
    from trl import SFTTrainer

    clock = Clock(job, TorchMemory())
    trainer = make_trainer(SFTTrainer, job, rows, tokens, clock)
    trainer.train()
    return clock.result() | {"windows": job["accumulate"], "losses": losses(trainer)}


def run_hf_mlx(job: dict[str, Any], rows: int, tokens: int) -> dict[str, Any]:
    """MLXSFTTrainer, and its compiled step alone."""
    from hf_mlx import MLXSFTTrainer

    clock = Clock(job, MLXMemory())
    trainer = make_trainer(MLXSFTTrainer, job, rows, tokens, clock)
    trainer.train()
    result = clock.result() | {"windows": job["accumulate"], "losses": losses(trainer)}
    # In turn, since a GPU at its power limit is not as fast from one second to the next.
    alone, whole = [], []
    for _ in range(job["rounds"]):
        alone += time_bare_step(trainer, job)
        clock.restart()
        trainer.train()
        whole += clock.intervals()
    return result | {"traces": trainer.session.step.traces, "alone": alone, "whole": whole}


def time_bare_step(trainer: Any, job: dict[str, Any]) -> list[float]:
    """Seconds of each step of the trainer's compiled step alone, on one batch that is already on the device."""
    from hf_mlx.data.generator import TorchGenerator
    from hf_mlx.surface.estimate import estimate_memory
    from hf_mlx.training.command_buffers import wait_for_memory

    session, clock = trainer.session, Clock(job, MLXMemory())
    loader = iter(trainer.data.train_loader(trainer.train_dataset, TorchGenerator(0)))
    window = [trainer.data.inputs(next(loader)) for _ in range(job["accumulate"])]
    session.loaded.model.train()
    held, metrics = session.step.hold(), None
    with wait_for_memory(trainer.plan, lambda: estimate_memory(trainer).bound):
        for step in range(clock.last):
            before, metrics = metrics, session.step(window, step + 1, 1e-5)
            if before is not None:
                before.loss.item()  # keeps one step in flight, as the trainer does
            clock.tick()
    session.step.restore(held)
    return clock.intervals()


def losses(trainer: Any) -> list[float]:
    """The logged losses: two trainers on the same rows show the same."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run_mlx_lm(job: dict[str, Any], rows: int, tokens: int) -> dict[str, Any]:
    """mlx-lm's own LoRA layers and train(); on a Linux CPU with the BLAS that hf_mlx loads."""
    from hf_mlx.blas import load_openblas

    load_openblas()
    from mlx.optimizers import AdamW
    from mlx_lm import load
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import CacheDataset, TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    class Rows(list):
        def process(self, row):
            return row, 0

    class Ticks(TrainingCallback):
        def on_train_loss_report(self, train_info):
            clock.tick()

    clock = Clock(job, MLXMemory())
    network, _ = load(job["folder"])
    if job.get("trained") != "all":
        network.freeze()
        inner = "mlp.switch_mlp" if "num_experts" in job.get("config", {}) else "mlp"
        keys = [f"self_attn.{name}" for name in SEVEN[:4]] + [f"{inner}.{name}" for name in SEVEN[4:]]
        options = {"rank": job["rank"], "scale": 2.0, "dropout": 0.0, "keys": keys}
        linear_to_lora_layers(network, len(network.layers), options)
    length = tokens + (job["peer"] == "mlx-lm +1")
    micro_batches = clock.last * job["accumulate"]
    train(
        model=network,
        optimizer=AdamW(learning_rate=2e-5),
        train_dataset=CacheDataset(Rows(random_rows(job, rows * micro_batches, length))),
        args=TrainingArgs(
            batch_size=rows,
            iters=micro_batches,
            steps_per_report=job["accumulate"],
            grad_accumulation_steps=job["accumulate"],
            steps_per_save=10**9,
            max_seq_length=length,
            grad_checkpoint=job["on"],
            adapter_file=f"{job['folder']}/adapters.safetensors",
        ),
        training_callback=Ticks(),
    )
    return clock.result() | {"windows": job["accumulate"]}


if __name__ == "__main__":
    main()
