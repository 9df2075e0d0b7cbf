"""Two processes that hold one model together on MLX's ring, beside one process that holds all of it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import architecture_zoo
import numpy as np
import pytest
import torch
from compiling import compiles_all, tell_uncompiled, uncompiled_if
from rank_cases import STEADY, make_model
from rank_runs import HERE, finish, said, start
from safetensors.numpy import load_file
from tensor_cases import BASE, DRAWN, NAMED, case, play, play_upstream
from tensor_scenarios import LARGE, perform

from hf_mlx.models.tensor_parallel import SPLIT_TYPES

# Sums of float32 in another order: each layer's outputs are added up over two processes.
CLOSE = 1e-5
# One element may be turned by the quotient of two small numbers in AdamW; of many together this is left.
TOGETHER = 5e-5
# bf16 keeps 8 bits: each part of a sum is rounded to them before it is added up.
ROUNDED = 2**-8
SAMPLE = ["plain", "four_bits", "dropped", "mixture", "evaluated"]
# Without mx.compile, where only the sample runs: all three processes would build each kernel at the same time.
UNCOMPILED = ["four_bits", "dropped", "mixture", "evaluated"]
PLAYED = ["peak", "objects", "resumed", "taken_over", "interrupted", "unlike", "refused"]


def make_models(folder: Path) -> Path:
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
    for family in ("llama", "qwen2"):
        make_model(folder / family, family, **sizes)
    make_model(folder / "large", **LARGE)
    make_model(folder / "odd", num_attention_heads=2, num_key_value_heads=1, **sizes)
    make_typed(folder, "phi")
    make_typed(folder, "qwen3_moe").rename(folder / "experts")
    make_typed(folder, "qwen3_moe", output_router_logits=True).rename(folder / "balanced")
    return folder


def make_typed(folder: Path, model_type: str, **changes: Any) -> Path:
    """A tiny model of a type, with the tokenizer of the others."""
    model: Any = architecture_zoo.make_model(model_type, **changes)
    model.save_pretrained(folder / model_type)
    for file in (folder / "llama").glob("token*.json"):
        shutil.copy(file, folder / model_type)
    return folder / model_type


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


def launch(models: Path, folder: Path, cases: dict[str, Any], ranks: int = 2, **environ: str) -> list[Any]:
    """The processes that play ``cases``; of a scenario the case is None."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    arguments = [str(models), str(folder / "out"), str(folder / "cases.json")]
    environ |= {"HF_MLX_TENSOR_PARALLEL": str(ranks)}
    return start(ranks, folder, arguments, script=HERE / "tensor_worker.py", **environ)


def told(folder: Path, statuses: list[int]) -> list[dict[str, Any]]:
    """What each process said, all of which ended well."""
    assert not any(statuses), "\n".join(said(folder, rank)[-3000:] for rank in range(len(statuses)))
    return [json.loads((folder / f"out.{rank}").read_text()) for rank in range(len(statuses))]


def compare_logs(name: str, one: list[dict[str, Any]], two: list[dict[str, Any]]) -> int:
    """Assert that a run of processes has one process's log; how many values were compared."""
    compared = 0
    assert len(one) == len(two), name
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys(), (name, a, b)
        for key, value in a.items():
            assert b[key] == pytest.approx(value, rel=CLOSE, abs=1e-9), (name, key, a, b)
            compared += 1
    return compared


def compare_adapters(name: str, one: Path, two: Path, close: float = TOGETHER) -> int:
    """Assert that two adapter folders hold the same; how many arrays were compared."""
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (two, one))
    assert list(ours) == list(theirs), name
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    assert (one / "adapter_config.json").read_text() == (two / "adapter_config.json").read_text()
    for key, value in theirs.items():
        assert np.abs(ours[key]).sum() == pytest.approx(np.abs(value).sum(), rel=close, abs=1e-7), (name, key)
    flat = [np.concatenate([held[key].ravel().astype(np.float64) for key in theirs]) for held in (theirs, ours)]
    assert np.linalg.norm(flat[0] - flat[1]) <= TOGETHER * np.linalg.norm(flat[0]), name
    return len(theirs)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("played")


@pytest.fixture(scope="module")
def both(models: Path, stage: Path, request: pytest.FixtureRequest) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process says, and what two say at the same time."""
    logging.disable(logging.WARNING)
    try:
        alone = {"resumed": perform("resumed", models, str(stage / "one-resumed"))}
        # They go on from its checkpoints, among other things.
        shutil.copytree(stage / "one-resumed", stage / "out-taken_over-from")
        uncompiled = [] if compiles_all(request.config) else UNCOMPILED
        cases = {name: NAMED.get(name) for name in [*PLAYED, *SAMPLE]}
        started = launch(models, stage, cases, **tell_uncompiled(uncompiled))
        try:
            alone |= {name: perform(name, models, str(stage / f"one-{name}")) for name in ("peak", "objects")}
            for name in SAMPLE:
                with uncompiled_if(name in uncompiled):
                    alone[name] = play(NAMED[name], models, str(stage / f"one-{name}"))
        finally:
            statuses = finish(started, 400)
    finally:
        logging.disable(logging.NOTSET)
    return alone, told(stage, statuses)


@pytest.fixture(scope="module")
def alone(both: tuple[dict[str, Any], list[dict[str, Any]]]) -> dict[str, Any]:
    return both[0]


@pytest.fixture(scope="module")
def played(both: tuple[dict[str, Any], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return both[1]


def test_two_processes_log_what_one_logs(played: list[dict[str, Any]], alone: dict[str, Any], stage: Path) -> None:
    assert len(SAMPLE) == 5
    for name in SAMPLE:
        assert played[0][name]["log"] == played[1][name]["log"]
        assert compare_logs(name, alone[name]["log"], played[0][name]["log"]) >= 40
        folders = (stage / f"{kind}-{name}-adapter" for kind in ("one", "out"))
        assert compare_adapters(name, *folders, close=CLOSE) >= 8
    assert len(alone["plain"]["log"]) == len(alone["four_bits"]["log"]) == BASE["max_steps"] + 1


def test_what_is_exported_loads_in_peft(played: list[dict[str, Any]], models: Path, stage: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(20)[None]
    logits = []
    for kind in ("one", "out"):
        base = AutoModelForCausalLM.from_pretrained(models / "llama")
        adapted = PeftModel.from_pretrained(base, stage / f"{kind}-plain-adapter")
        with torch.no_grad():
            logits.append(adapted(ids).logits)
    assert (logits[0] - logits[1]).abs().max() <= 1e-4 * logits[0].abs().max()
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(models / "llama")(ids).logits
    assert (logits[1] - plain).abs().max() >= 1e-2 * plain.abs().max()


def test_each_holds_a_part_of_the_weights(played: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    one = alone["peak"]
    for two in (rank["peak"] for rank in played):
        assert compare_logs("peak", one["log"], two["log"]) >= 10
        assert two["peak"] <= 0.6 * one["peak"], (two["peak"], one["peak"])
        assert two["estimate"] <= 0.6 * one["estimate"]
        assert 1 / 1.5 <= two["peak"] / two["estimate"] <= 1.5
        assert "on each of 2 processes" in two["described"]
        line = next(line for line in one["described"].splitlines() if line.startswith("trainable params"))
        assert line in two["described"]


def test_objects_of_hf_know_the_processes(played: list[dict[str, Any]]) -> None:
    for rank, one in enumerate(made["objects"] for made in played):
        assert one["args"] == [2, rank] and one["accelerator"] == [2, rank]
        # Both read the same two rows.
        assert one["sizes"] == [2, 2] and one["zero"] == (rank == 0)


def test_predictions_and_texts_are_one_processs(
    played: list[dict[str, Any]], alone: dict[str, Any], stage: Path
) -> None:
    assert len(alone["objects"]["predicted"]) == 3
    for one in (made["objects"] for made in played):
        scale = max(alone["objects"]["magnitudes"])
        assert one["predicted"] == pytest.approx(alone["objects"]["predicted"], abs=CLOSE * scale)
        assert one["magnitudes"] == pytest.approx(alone["objects"]["magnitudes"], rel=CLOSE)
        assert one["generated"] == alone["objects"]["generated"]
    for kind in ("exported", "saved"):
        compare_adapters(kind, stage / f"one-objects-{kind}", stage / f"out-objects-{kind}")


def test_a_resumed_run_is_the_unbroken_one(played: list[dict[str, Any]], alone: dict[str, Any], stage: Path) -> None:
    one = alone["resumed"]
    for two in (rank["resumed"] for rank in played):
        assert two["whole"][:-1] == two["again"][:-1] and len(two["whole"]) == 7
        assert (two["files"], two["shown"], two["flos"]) == (one["files"], one["shown"], one["flos"])
        assert compare_logs("resumed", one["whole"], two["whole"]) >= 40
    whole, again = (stage / f"out-resumed-{kind}" / "adapter_model.safetensors" for kind in ("adapter", "again"))
    assert whole.read_bytes() == again.read_bytes()
    compare_adapters("resumed", stage / "one-resumed-adapter", stage / "out-resumed-adapter")


def test_checkpoints_are_one_processs(played: list[dict[str, Any]], alone: dict[str, Any], stage: Path) -> None:
    folders = [stage / f"{kind}-resumed" / "checkpoint-4" for kind in ("one", "out")]
    theirs, ours = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in folders)
    assert ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys()
    assert len(ours["state"]) == 28
    for key, held in theirs["state"].items():
        for slot, value in held.items():
            mine = ours["state"][key][slot]
            assert mine.shape == value.shape
            assert (mine - value).norm() <= 1e-4 * value.norm(), (key, slot)


def test_either_goes_on_from_the_others_checkpoint(
    played: list[dict[str, Any]], alone: dict[str, Any], models: Path, stage: Path
) -> None:
    for rank in played:
        assert compare_logs("taken over", alone["resumed"]["whole"][-3:-1], rank["taken_over"]["log"][-3:-1]) >= 10
    shutil.copytree(stage / "out-resumed", stage / "one-taken_over-from")
    taken = perform("taken_over", models, str(stage / "one-taken_over"))
    assert compare_logs("taken over", played[0]["resumed"]["whole"][-3:-1], taken["log"][-3:-1]) >= 10
    compare_adapters("taken over", stage / "one-taken_over-adapter", stage / "out-taken_over-adapter")


def test_ctrl_c_on_one_ends_both_at_the_same_step(played: list[dict[str, Any]]) -> None:
    made = [rank["interrupted"] for rank in played]
    assert made == [{"step": 2, "saved": ["checkpoint-2"]}] * 2


def test_what_cannot_be_split_is_refused_by_name(played: list[dict[str, Any]]) -> None:
    for rank in played:
        assert len(rank["refused"]) == 16
        for name, (kind, text) in rank["refused"].items():
            assert kind in ("SettingError", "ModelError", "AdapterError"), (name, text)
            assert "2 processes" in text or name == "auto_find_batch_size", (name, text)
            assert "remedy: " in text, (name, text)
        assert "'phi'" in rank["refused"]["a type without it"][1]
        assert "num_key_value_heads=1" in rank["refused"]["three heads"][1]


def test_another_number_of_processes_is_refused(models: Path, tmp_path: Path) -> None:
    environ = os.environ | {"HF_MLX_TENSOR_PARALLEL": "2", "PYTHONPATH": str(HERE.parent)}
    code = "from hf_mlx.processes.world import the_world; the_world()"
    made = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert "a model split over 2 processes, of which there are 1" in made.stderr
    assert "hf-mlx launch -n 2 --tensor-parallel train.py" in made.stderr


def test_ranks_with_other_rows_are_refused_by_name(played: list[dict[str, Any]]) -> None:
    for rank in played:
        assert "rank 1 with the content of train_dataset" in rank["unlike"]["said"]


@pytest.mark.wide
def test_a_rank_that_raises_ends_the_others(models: Path, tmp_path: Path) -> None:
    assert finish(launch(models, tmp_path, {"raising": None}), 300) == [1, 1]
    assert "ValueError: the disk of the last rank is full" in said(tmp_path, 1)
    assert "rank 1 has ended with ValueError: the disk of the last rank is full" in said(tmp_path, 0)


@pytest.mark.wide
def test_other_kinds_of_runs_log_what_one_process_logs(models: Path, tmp_path: Path) -> None:
    from mlx_lm import convert

    packed = models / "packed"
    if not packed.exists():
        convert(str(models / "llama"), str(packed), quantize=True, q_bits=4, q_group_size=64, dtype="float32")
        (packed / "README.md").write_text("---\nbase_model: owner/original-model\n---\n")
    ends = {"target_modules": ["lm_head", "embed_tokens", "q_proj"]}
    cases = {
        "packed": case("packed", max_steps=5),
        "language": case(language=True, max_steps=5, eval_rows=5, eval_strategy="steps", eval_steps=2),
        "ends": case(lora=ends, max_steps=5),
    }
    compare_all(list(cases), cases, models, tmp_path)


@pytest.mark.wide
def test_a_sum_of_rounded_parts_is_one_rounding_away(models: Path, tmp_path: Path) -> None:
    cases = {"rounded": case(max_steps=5, bf16=True, adam_epsilon=STEADY["adam_epsilon"])}
    two = told(tmp_path, finish(launch(models, tmp_path, cases), 300))
    one = play(cases["rounded"], models, str(tmp_path / "one"))["log"]
    assert two[0]["rounded"]["log"] == two[1]["rounded"]["log"]
    assert len(one) == len(two[0]["rounded"]["log"]) == 6
    for a, b in zip(one[:-1], two[0]["rounded"]["log"][:-1], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=ROUNDED)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=ROUNDED)


@pytest.mark.wide
def test_four_processes_log_what_one_logs(models: Path, tmp_path: Path) -> None:
    make_model(models / "four", hidden_size=128, intermediate_size=256, num_key_value_heads=4)
    cases = {"four": case("four", lora={"lora_dropout": 0.1}, max_steps=5)}
    compare_all(["four"], cases, models, tmp_path, ranks=4)


@pytest.mark.wide
@pytest.mark.parametrize("part", range(3))
def test_drawn_runs_log_what_one_process_logs(part: int, models: Path, tmp_path: Path) -> None:
    names = list(DRAWN)[part::3]
    assert len(names) == 6
    compare_all(names, DRAWN, models, tmp_path)


@pytest.mark.wide
def test_every_type_logs_what_one_process_logs(models: Path, tmp_path: Path) -> None:
    cases = {}
    for model_type in sorted(SPLIT_TYPES):
        if not (models / model_type).exists():
            make_typed(models, model_type)
        cases[model_type] = case(model_type, max_steps=4, learning_rate=1e-3, router_aux_loss_coef=0.0)
    assert len(cases) >= 8
    compare_all(list(cases), cases, models, tmp_path)


def compare_all(names: list[str], cases: dict[str, Any], models: Path, folder: Path, ranks: int = 2) -> None:
    made = told(folder, finish(launch(models, folder, {name: cases[name] for name in names}, ranks), 900))
    turned = []
    for name in names:
        one = play(cases[name], models, str(folder / f"one-{name}"))
        assert made[0][name]["log"] == made[1][name]["log"]
        adapters = [folder / f"{kind}-{name}-adapter" for kind in ("one", "out")]
        try:
            assert compare_logs(name, one["log"], made[0][name]["log"]) >= 15
            assert compare_adapters(name, adapters[0], adapters[1]) >= 4
        except AssertionError as error:
            turned.append(name)
            print(f"{name}: {str(error).splitlines()[0][:300]}")
            judge(cases[name], made[0][name]["log"], adapters[1], models, folder / f"judged-{name}")
    assert len(turned) <= 1, turned


def judge(described: dict[str, Any], log: list[dict[str, Any]], adapter: Path, models: Path, folder: Path) -> None:
    """Assert that a run which rounding turns is as close to upstream's in float64 as upstream's in float32 is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, exact = (play_upstream(described, models, str(folder), doubled=doubled) for doubled in (False, True))
    # Upstream's summary has counts that are no values of a step.
    assert len(log) == len(theirs["log"]) >= 4
    compared = 0
    for ours, a, b in zip(log[:-1], theirs["log"], exact["log"], strict=False):
        assert ours.keys() == a.keys()
        for key, value in b.items():
            assert abs(ours[key] - value) <= abs(a[key] - value) + CLOSE * abs(value), (key, ours, a, b)
            compared += 1
    ours = load_file(adapter / "adapter_model.safetensors")
    assert ours.keys() == exact["adapter"].keys()
    # All together: which elements are turned is anyone's.
    adapters = (exact["adapter"], theirs["adapter"], ours)
    whole, *others = (np.concatenate([held[name].ravel() for name in exact["adapter"]]) for held in adapters)
    far = [np.linalg.norm(other - whole) for other in others]
    assert far[1] <= far[0] + CLOSE * np.linalg.norm(whole), far
    assert compared >= 20
