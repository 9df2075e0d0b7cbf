"""Trackers of ``report_to``: transformers' own callbacks make the calls they make under TRL, with the same values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pairs
import pytest
import yaml
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import SettingError

FAKES = Path(__file__).parent / "fakes"
ALL = ["wandb", "mlflow", "trackio", "tensorboard", "comet_ml"]
CASES = {
    "all of them, an adapter by name": ({"report_to": ALL, "object": False, "lora": True}, "end", 108),
    "full, by name": ({"report_to": ["wandb"], "object": False, "lora": False}, "checkpoint", 30),
    "an adapter on an object": ({"report_to": ALL, "object": True, "lora": True}, "checkpoint", 108),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pairs.tiny_model("llama", tmp_path_factory.mktemp("trackers") / "base", hidden_size=32, intermediate_size=48)


@pytest.mark.parametrize(
    "case", [c if i == 0 else pytest.param(c, marks=pytest.mark.wide) for i, c in enumerate(CASES)]
)
def test_calls_and_values_are_trls(case, model, tmp_path):
    asked, logged_model, least = CASES[case]
    paths = os.pathsep.join([str(FAKES), str(FAKES.parent.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, FAKES / "run_trackers.py", model, json.dumps(asked), "calls.json"],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "WANDB_LOG_MODEL": logged_model},
        capture_output=True,
    )
    found = json.loads((tmp_path / "calls.json").read_text())
    theirs, ours = (found[kind]["calls"] for kind in ("trl", "mlx"))
    assert [call[0] for call in theirs] == [call[0] for call in ours]
    assert len(theirs) >= least
    for a, b in zip(theirs, ours, strict=True):
        assert_same(a[1:], b[1:], a[0])
    cards = [found[kind]["card"] for kind in ("trl", "mlx")]
    tags = [set(yaml.safe_load(card.split("---")[1])["tags"]) for card in cards]
    assert tags[0] <= tags[1]
    links = ["https://wandb.ai/me/runs/1"]
    links += ["https://me-space.hf.space", "https://comet.com/me/1"] if "trackio" in asked["report_to"] else []
    assert all(link in card for link in links for card in cards)


def assert_same(a: Any, b: Any, where: str) -> None:
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key, value in a.items():
            # A name of the tracker's own, drawn at random.
            if key != "new_space_id":
                assert_same(value, b[key], f"{where} {key}")
    elif isinstance(a, list):
        # Files of a checkpoint: ours has two more.
        a, b = ([part for part in x if not str(part).startswith("hf_mlx_")] for x in (a, b))
        assert len(a) == len(b), (where, a, b)
        # tensorboard gets names beside their values.
        if any(isinstance(part, str) and any(t in part for t in pairs.TIMED) for part in a):
            return
        for x, y in zip(a, b, strict=True):
            assert_same(x, y, where)
    elif isinstance(a, float):
        assert b == pytest.approx(a, rel=2e-4, abs=1e-7), where
    else:
        assert a == b, where


@pytest.fixture
def wandb(monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FAKES))
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("wandb", "recording"):
            del sys.modules[name]


@pytest.mark.parametrize("watched", ["gradients", "all", "parameters"])
def test_watching_is_refused_with_what_to_write(watched, wandb, monkeypatch, model, tmp_path):
    monkeypatch.setenv("WANDB_WATCH", watched)
    settings = {**pairs.SILENT, "max_steps": 1}
    rows = Dataset.from_list(pairs.text_rows(4))

    def build(**more: Any) -> Any:
        return MLXSFTTrainer(str(model), SFTConfig(str(tmp_path), **{**settings, **more}), train_dataset=rows)

    with pytest.raises(SettingError, match=rf"WANDB_WATCH={watched}.*\n.*\n.*WANDB_WATCH=false.*on_pre_optimizer_step"):
        build(report_to="wandb")
    trainer = build()
    from transformers.integrations import WandbCallback

    with pytest.raises(SettingError, match="WANDB_WATCH"):
        trainer.add_callback(WandbCallback)


def test_what_the_refusal_says_to_write_works(model, tmp_path):
    norms = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            norms.append({n: p.grad.norm() for n, p in model.named_parameters() if p.grad is not None})

    settings = {**pairs.SILENT, "max_steps": 1, "max_grad_norm": 0.0}
    rows = Dataset.from_list(pairs.text_rows(4))
    trainer = MLXSFTTrainer(str(model), SFTConfig(str(tmp_path), **settings), train_dataset=rows, callbacks=[Norms()])
    trainer.train()
    whole = sum(float(norm) ** 2 for norm in norms[0].values()) ** 0.5
    assert len(norms[0]) == 21
    assert trainer.session.step.updates == 1
    assert whole > 0
