"""Every broken file, whatever is done with its folder: a named error, or the numbers of the whole folder."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_runs import LORA, PRELOAD, SETTINGS, make_rows, make_trainer
from damage_cases import damaged_copy, draw_case
from damage_verbs import same, serve
from datasets import Dataset
from pairs import tiny_model
from peft import LoraConfig
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from hf_mlx.checkpoints.convert import from_torch
from hf_mlx.training.optim import decay_names

SECONDS = 20.0
# What a whole run of the verbs takes is 900 MiB, most of it torch and transformers themselves.
MEBIBYTES = 3000
ON_ADAPTERS = ("import", "merge", "export", "verify")


class Folders:
    """Whole folders of every kind, and the numbers that each verb gives on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = tiny_model("llama", root / "base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._run_here()
            self._run_in_trl()
        self.adapter = root / "adapter"
        self._make_adapters()
        written = shutil.copytree(self.checkpoint, root / "converted" / "checkpoint-4")
        from_torch(written, decay_names)
        self.kinds: dict[str, tuple[Path, tuple[str, ...]]] = {
            "base": (self.base, ("train", "import", "merge", "export", "verify", "doctor")),
            "adapter": (self.adapter, ON_ADAPTERS),
            "pickled adapter": (root / "pickled", ("import", "merge", "export")),
            "checkpoint": (self.checkpoint, ("resume", "resume", "convert", "import", "export")),
            "checkpoint of trl": (root / "trl" / "checkpoint-4", ("resume", "resume", "resume", "convert", "import")),
            "checkpoint without torch": (written, ("resume", "convert")),
        }
        self.expected: dict[tuple[str, str], Any] = {}

    @property
    def checkpoint(self) -> Path:
        return self.root / "mlx" / "checkpoint-4"

    def _run_here(self) -> None:
        make_trainer(self.base, self.root / "mlx", save_steps=4, max_steps=4, eval_strategy="no").train()

    def _run_in_trl(self) -> None:
        settings = {**SETTINGS, "save_steps": 4, "max_steps": 4, "eval_strategy": "no"}
        config = SFTConfig(output_dir=str(self.root / "trl"), **settings)
        data = Dataset.from_list(make_rows())
        SFTTrainer(str(self.base), config, train_dataset=data, peft_config=LoraConfig(**LORA)).train()

    def _make_adapters(self) -> None:
        for kind in ("adapter", "pickled"):
            (self.root / kind).mkdir()
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copy(self.checkpoint / name, self.root / kind / name)
        weights = self.root / "pickled" / "adapter_model.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()

    def reference(self, kind: str, verb: str, worker: Worker) -> Any:
        """What ``verb`` gives on the whole folder."""
        if (kind, verb) not in self.expected:
            source = self.kinds[kind][0]
            whole = shutil.copytree(source, self.root / "whole" / kind / verb / source.name)
            state, value, _ = worker.perform(verb, *self.places(kind, whole), self.root)
            assert state == "done", value
            self.expected[kind, verb] = value
        return self.expected[kind, verb]

    def places(self, kind: str, folder: Path) -> tuple[Path, Path, Path]:
        """Base, adapter and folder of a verb, where ``folder`` stands in for the whole one of its kind."""
        return (folder, self.adapter, folder) if kind == "base" else (self.base, folder, folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return Folders(tmp_path_factory.mktemp("folders"))


class Worker:
    """A process of its own that may hang or die."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._start()

    def _start(self) -> None:
        self._ours, theirs = self._context.Pipe()
        self._process = self._context.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def perform(self, *work: Any) -> tuple[str, Any, int]:
        """The outcome, or ("hang", …) and ("died", …); peak memory in MiB."""
        self._ours.send(work)
        if self._ours.poll(SECONDS):
            try:
                return self._ours.recv()
            except EOFError:
                self._process.join()
                outcome = "died", f"exit code {self._process.exitcode}", 0
        else:
            outcome = "hang", f"no answer within {SECONDS} s", 0
        self.stop()
        self._start()
        return outcome

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


@pytest.fixture(scope="module")
def worker(folders):
    made = Worker()
    # Imports and kernels are no part of what a broken file costs.
    made._ours.send(("train", *folders.places("base", folders.base), folders.root))
    made._ours.recv()
    yield made
    made.stop()


def run_cases(seed: int, count: int, folders: Folders, worker: Worker, scratch: Path) -> dict[str, int]:
    """Draw and run; every fault is collected, so that one run tells all of them."""
    print(f"seed {seed}")
    draw = random.Random(seed)
    faults, tally = [], {"done": 0, "refused": 0}
    for number in range(count):
        kind, name, damage, verb = draw_case(draw, folders.kinds)
        target = scratch / str(number) / folders.kinds[kind][0].name
        done = damaged_copy(folders.kinds[kind][0], target, name, damage, seed * 1000 + number)
        state, value, memory = worker.perform(verb, *folders.places(kind, target), scratch)
        label = f"case {number} of seed {seed}: {kind}, {name}, {damage} {done}, {verb}"
        if state == "refused":
            # The file, or where its content does not fit another's, the folder.
            if name not in value and str(target) not in value:
                faults.append(f"{label}: names no file: {value}")
        elif state != "done":
            faults.append(f"{label}: {state}: {value}")
        elif not same(value, folders.reference(kind, verb, worker)):
            faults.append(f"{label}: silently changed")
        if memory > MEBIBYTES:
            faults.append(f"{label}: {memory} MiB")
        if (target / "executed").exists():
            faults.append(f"{label}: ran code")
        tally[state] = tally.get(state, 0) + 1
        shutil.rmtree(scratch / str(number), ignore_errors=True)
    assert not faults, f"{len(faults)} of {count}:\n" + "\n".join(faults)
    assert sum(tally.values()) == count
    return tally


def test_a_fixed_sample_is_named_or_harmless(folders, worker, tmp_path):
    assert run_cases(1, 24, folders, worker, tmp_path)["refused"] >= 12


@pytest.mark.wide
def test_four_hundred_drawn_cases_are_named_or_harmless(folders, worker, tmp_path):
    seed = int(os.environ.get("HF_MLX_DAMAGE_SEED", "20"))
    assert run_cases(seed, 400, folders, worker, tmp_path)["refused"] >= 200
