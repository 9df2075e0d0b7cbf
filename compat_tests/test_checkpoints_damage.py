"""Folders that must not be resumed from, and disks that cannot be written."""

from __future__ import annotations

import json
import logging
import shutil
import struct
import subprocess
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_runs import LORA, SETTINGS, make_rows, make_trainer
from datasets import Dataset
from pairs import tiny_model
from peft import LoraConfig
from sampling import sampled
from trl import SFTConfig, SFTTrainer

from hf_mlx.errors import CheckpointError


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module", params=["mlx", "trl"])
def written(request, model, tmp_path_factory) -> Path:
    """checkpoint-4, 8 and 12 of a run here, or of one in TRL."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = {"save_steps": 4, "save_total_limit": None, "max_steps": 12}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if request.param == "mlx":
            make_trainer(model, folder, **settings).train()
        else:
            data = Dataset.from_list(make_rows())
            config = SFTConfig(output_dir=str(folder), **{**SETTINGS, **settings, "eval_strategy": "no"})
            SFTTrainer(str(model), config, train_dataset=data, peft_config=LoraConfig(**LORA)).train()
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "out")


def truncate(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) * 2 // 3])

    return damage


def flip(name: str) -> Callable[[Path], None]:
    """Change one bit in the middle of the data; in an archive, of its largest member."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        middle = len(content) // 2
        if zipfile.is_zipfile(folder / name):
            member = max(zipfile.ZipFile(folder / name).infolist(), key=lambda info: info.file_size)
            header = member.header_offset
            lengths = struct.unpack("<HH", content[header + 26 : header + 30])
            middle = header + 30 + sum(lengths) + member.file_size // 2
        content[middle] ^= 0x10
        (folder / name).write_bytes(bytes(content))

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


DAMAGE: dict[str, Callable[[Path], None]] = {
    **{f"{name} cut short": truncate(name) for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt")},
    **{f"{name} cut short": truncate(name) for name in ("rng_state.pth", "trainer_state.json", "adapter_config.json")},
    **{f"{name} edited": flip(name) for name in ("optimizer.pt", "rng_state.pth")},
    **{f"{name} missing": remove(name) for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt")},
    "trainer_state.json missing": remove("trainer_state.json"),
    "adapter_model.safetensors empty": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
}


FEW = (
    "adapter_model.safetensors cut short", "scheduler.pt cut short", "trainer_state.json cut short",
    "optimizer.pt edited", "rng_state.pth edited", "optimizer.pt missing", "adapter_model.safetensors empty",
)  # fmt: skip


@pytest.mark.parametrize("damage", sampled(DAMAGE, *FEW))
def test_a_damaged_folder_is_named_and_passed_over(model, folder, damage, caplog):
    name = damage.split()[0]
    DAMAGE[damage](folder / "checkpoint-12")
    trainer = make_trainer(model, folder, max_steps=12)
    before = {key: value for key, value in trainer.session.step.params.items()}
    with pytest.raises(CheckpointError) as refused:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-12"))
    assert "checkpoint-12" in refused.value.received and name in refused.value.received
    # Nothing was half loaded.
    assert all(trainer.session.step.params[key] is value for key, value in before.items())
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert "Passed over" in caplog.text and name in caplog.text
    assert trainer.state.global_step == 12
    assert trainer._loop.first_step == 8


def test_an_edited_weight_is_found_where_there_is_a_manifest(model, folder):
    if not (folder / "checkpoint-12" / "hf_mlx_manifest.json").exists():
        assert "trl" in str(folder) or (folder / "checkpoint-12" / "optimizer.pt").exists()
        return
    flip("adapter_model.safetensors")(folder / "checkpoint-12")
    with pytest.raises(CheckpointError, match="SHA-256"):
        make_trainer(model, folder).train(resume_from_checkpoint=str(folder / "checkpoint-12"))


def test_when_none_is_complete_each_one_is_named(model, folder):
    for step in (4, 8, 12):
        remove("trainer_state.json")(folder / f"checkpoint-{step}")
    with pytest.raises(CheckpointError) as refused:
        make_trainer(model, folder).train(resume_from_checkpoint=True)
    assert all(f"checkpoint-{step}" in refused.value.received for step in (4, 8, 12))


def _drop_optimizer(folder: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "hf_mlx_manifest.json", "hf_mlx_state.json"):
        (folder / name).unlink(missing_ok=True)


def _set_step(folder: Path) -> None:
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    for values in state["state"].values():
        values["step"] -= 1  # one ahead is what a second train() leaves, one behind is another step's file
    torch.save(state, folder / "optimizer.pt")
    for name in ("hf_mlx_manifest.json", "hf_mlx_state.json"):
        (folder / name).unlink(missing_ok=True)


def _unknown_key(folder: Path) -> None:
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps({**state, "mystery": 1}))
    for name in ("hf_mlx_manifest.json", "hf_mlx_state.json"):
        (folder / name).unlink(missing_ok=True)


# What is changed in a complete folder, the run's settings, and what the error says.
MISFITS: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "another world size": (lambda f: (f / "rng_state.pth").rename(f / "rng_state_1.pth"), {}, "is missing|2 processes"),
    "two processes": (lambda f: (f / "rng_state_1.pth").write_bytes(b""), {}, "random states of 2 processes"),
    "sharded": (lambda f: (f / "global_step12").mkdir(), {}, "sharded over processes"),
    "an unknown file": (lambda f: (f / "scaler.pt").write_bytes(b"x"), {}, "scaler.pt"),
    "an unknown text": (lambda f: (f / "surprise.bin").write_bytes(b"x"), {}, "surprise.bin, not known"),
    "no optimizer": (_drop_optimizer, {}, "save_only_model"),
    "an optimizer of another step": (_set_step, {}, "after 11 steps beside a schedule after 12"),
    "an unknown key": (_unknown_key, {}, "unknown keys mystery"),
    "no adapter here": (lambda f: None, {"lora": False}, "peft_config"),
    "another optimizer": (lambda f: None, {"optim": "sgd"}, "another optimizer|other settings|momentum"),
    "another weight decay": (lambda f: None, {"weight_decay": 0.5}, "set weight_decay to 0.01"),
    "other betas": (lambda f: None, {"adam_beta1": 0.5}, "adam_beta1"),
    "another schedule": (
        lambda f: None,
        {"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0, "metric_for_best_model": "eval_loss"},
        "lr_scheduler_type",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_folder_that_does_not_fit_is_refused_and_nothing_is_lost(model, folder, misfit):
    change, settings, message = MISFITS[misfit]
    change(folder / "checkpoint-12")
    names = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        make_trainer(model, folder, **settings).train(resume_from_checkpoint=str(folder / "checkpoint-12"))
    assert sorted(path.name for path in folder.rglob("*")) == names


@pytest.mark.parametrize("other", [{"hidden_size": 32}, {"num_hidden_layers": 3}], ids=["narrower", "deeper"])
def test_a_checkpoint_of_another_model_is_refused(folder, tmp_path, other):
    another = tiny_model("llama", tmp_path / "another", **other)
    with pytest.raises(CheckpointError, match="another model"):
        make_trainer(another, folder).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_base_of_the_same_shape_is_refused(model, folder, tmp_path):
    if not (folder / "checkpoint-12" / "hf_mlx_manifest.json").exists():
        # TRL's folders hold no trace of the base's values.
        return
    another = tiny_model("llama", tmp_path / "another", seed=1)
    with pytest.raises(CheckpointError, match="another base"):
        make_trainer(another, folder).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("option", [{"r": 8}, {"lora_alpha": 16}, {"target_modules": ["q_proj"]}], ids=str)
def test_a_checkpoint_of_another_adapter_is_refused(model, folder, monkeypatch, option):
    for name, value in option.items():
        monkeypatch.setitem(LORA, name, value)
    with pytest.raises(CheckpointError, match="adapter"):
        make_trainer(model, folder).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("asked", ["nowhere/checkpoint-3", True], ids=str)
def test_no_such_folder(model, tmp_path, asked):
    with pytest.raises(CheckpointError):
        make_trainer(model, tmp_path / "out").train(resume_from_checkpoint=asked)


@pytest.fixture
def disk(tmp_path):
    """A file system of its own of 640 KiB: room for a few checkpoints."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(path)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"a file system can only be mounted by root: {made.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def _remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(path)], check=True)


def test_a_full_disk_stops_the_run_and_spares_the_last_checkpoint(model, disk, tmp_path):
    settings = {"save_steps": 2, "save_total_limit": None}
    with pytest.raises(CheckpointError, match="No space left on device") as full:
        make_trainer(model, disk / "out", **settings).train()
    assert "save_total_limit" in full.value.remedy
    left = {path.name for path in (disk / "out").iterdir()}
    assert "checkpoint-2" in left and not [name for name in left if name.startswith(".")]
    _remount(disk, "size=20M")
    resumed = make_trainer(model, disk / "out", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 14 and resumed._loop.first_step >= 2


def test_a_read_only_disk_is_said_before_a_step_and_at_saving(model, disk):
    trainer = make_trainer(model, disk / "out", save_steps=7, save_total_limit=1)
    _remount(disk, "ro")
    with pytest.raises(CheckpointError, match="Read-only"):
        make_trainer(model, disk / "out")
    with pytest.raises(CheckpointError, match="Read-only"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(CheckpointError, match="Read-only"):
        trainer.save_model()
    _remount(disk, "rw")
