"""``hf-mlx doctor --self-test``: its stored numbers are TRL's, it passes here, and it sees what is planted."""

import json
import re
import sys
from dataclasses import replace

import mlx.core as mx
import pytest
from datasets import Dataset
from pairs import _quiet
from peft import LoraConfig
from sampling import sampled
from transformers import Trainer
from trl import DPOTrainer, SFTConfig, SFTTrainer

from hf_mlx.cli.main import main
from hf_mlx.errors import SettingError
from hf_mlx.self_test import mixture, reference, run_self_test
from hf_mlx.self_test.checks import BF16, BF16_NORM, CHECKS
from hf_mlx.self_test.materials import LORA, SETTINGS, rows, write_model
from hf_mlx.self_test.scripts import train_language, train_pairs
from hf_mlx.training import cpu_attention, expert_rows, routed_experts


@pytest.mark.parametrize("kind", ["FP32", "BF16"])
def test_the_stored_numbers_are_what_trl_computes(kind, tmp_path):
    with _quiet() as folder:
        args = SFTConfig(output_dir=folder, use_cpu=True, **{**SETTINGS, "bf16": kind == "BF16"})
        data = Dataset.from_dict({"input_ids": rows()})
        trainer = SFTTrainer(str(write_model(tmp_path)), args, train_dataset=data, peft_config=LoraConfig(**LORA))
        trainer.train()
    logged = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert len(logged) == 6
    # Another CPU may sum in another order, and rounds bf16 products otherwise: what the self-test itself allows.
    limits = {"FP32": (1e-4, 1e-4), "BF16": (BF16, BF16_NORM)}[kind]
    for name, key, limit in (("LOSSES", "loss", limits[0]), ("NORMS", "grad_norm", limits[1])):
        assert [line[key] for line in logged] == pytest.approx(getattr(reference, f"{name}_{kind}"), rel=limit)


@pytest.mark.parametrize(
    ("kind", "script", "trainer"), [("PAIRS", train_pairs, DPOTrainer), ("LANGUAGE", train_language, Trainer)]
)
def test_the_stored_numbers_of_the_other_trainers(kind, script, trainer, tmp_path):
    with _quiet():
        logged = [line for line in script(trainer, tmp_path).state.log_history if "grad_norm" in line]
    assert len(logged) == 6
    for name, key in (("LOSSES", "loss"), ("NORMS", "grad_norm")):
        assert [line[key] for line in logged] == pytest.approx(getattr(reference, f"{name}_{kind}"), rel=1e-4)


def test_it_passes_here_and_writes_its_report(tmp_path, capsys):
    assert main(["doctor", "--self-test", "--limit", "800", "--report", str(tmp_path / "report.json")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] is True
    assert len(report["checks"]) == 22
    assert all(check["name"] in printed for check in report["checks"])
    assert "all right" in printed
    assert {"device", "machine", "versions"} <= set(report["environment"])
    assert "WRONG" not in printed
    assert str(tmp_path) not in json.dumps(report)


def wrong_rope(monkeypatch):
    true = mx.fast.rope
    monkeypatch.setattr(mx.fast, "rope", lambda x, *a, **k: true(x * 1.01, *a, **k))


def wrong_gradient(monkeypatch):
    # What comes out is right; what goes back is one percent too long.
    true = mx.fast.rms_norm

    def norm(*args):
        out = true(*args)
        return out + 0.01 * (out - mx.stop_gradient(out))

    monkeypatch.setattr(mx.fast, "rms_norm", norm)


def wrong_half(monkeypatch):
    # A kernel that is wrong in bf16 alone.
    true = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(
        mx.fast, "scaled_dot_product_attention", lambda q, *a, **k: true(q, *a, **k) * (1 + (q.dtype == mx.bfloat16))
    )


def wrong_file(monkeypatch):
    # What is read is not what was written, by one part in 100,000.
    true = mx.load
    monkeypatch.setattr(mx, "load", lambda *a, **k: {name: v * 1.00001 for name, v in true(*a, **k).items()})


def wrong_product(monkeypatch):
    true = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", lambda *a, **k: true(*a, **k) * 1.002)


def nan_product(monkeypatch):
    true = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", lambda *a, **k: true(*a, **k) * float("nan"))


def no_mask(monkeypatch):
    # Every document sees those before it in its row; MLX's attention is asked on every device.
    monkeypatch.setattr(cpu_attention, "on_cpu", lambda: False)
    true = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(
        mx.fast, "scaled_dot_product_attention", lambda *a, mask=None, **k: true(*a, mask="causal", **k)
    )


def no_memory(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("[metal::malloc] Resource limit (499000) exceeded.")

    monkeypatch.setattr(mx, "quantize", fail)


PLANTED = {
    "rope": (wrong_rope, ["fp32 step"], "fp32 step"),
    "gradient": (wrong_gradient, ["fp32 step"], "fp32 step: gradient norms"),
    "half": (wrong_half, ["bf16 step", "fp32 step"], "bf16 step"),
    "checkpoint": (wrong_file, ["checkpoint"], "checkpoint: adapter after resuming"),
    "product": (wrong_product, ["4-bit product"], "4-bit product"),
    "product of 8 bits": (wrong_product, ["8-bit product"], "8-bit product"),
    "nan": (nan_product, ["4-bit gradient"], "4-bit gradient"),
    "gradient of 8 bits": (wrong_product, ["8-bit gradient"], "8-bit gradient"),
    "mask": (no_mask, ["packed attention"], "packed attention: loss"),
    "raises": (no_memory, ["4-bit product"], "4-bit product"),
}


@pytest.mark.parametrize("planted", sampled(PLANTED, "gradient", "half", "checkpoint", "nan", "mask", "raises"))
def test_a_planted_error_is_seen(planted, monkeypatch):
    plant, names, expected = PLANTED[planted]
    plant(monkeypatch)
    report = run_self_test({name: CHECKS[name] for name in names})
    assert not report.ok
    wrong = [check.name for check in report.checks if not check.ok]
    assert any(name.startswith(expected) for name in wrong)
    assert f"WRONG: {wrong[0]}" in str(report)
    json.loads(report.to_json(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_a_mixture_is_right_in_tiles_and_a_gradient_of_an_empty_row_is_seen(monkeypatch):
    # What CUDA computes, here on any device.
    monkeypatch.setattr(routed_experts, "tile_size", lambda layers, choices: (256, mixture.EXPERTS))
    report = run_self_test({"experts": CHECKS["experts"]})
    assert report.ok and len(report.checks) == 4
    sort = expert_rows.ExpertRows.sort
    monkeypatch.setattr(expert_rows.ExpertRows, "sort", lambda *given: replace(sort(*given), filled=None))
    report = run_self_test({"experts": CHECKS["experts"]})
    assert [check.name for check in report.checks if not check.ok] == ["experts: by A", "experts: by B"]


def test_other_stored_numbers_fail(monkeypatch):
    monkeypatch.setattr(reference, "LOSSES_FP32", tuple(v * 1.001 for v in reference.LOSSES_FP32))
    report = run_self_test({"fp32 step": CHECKS["fp32 step"]})
    assert [check.name for check in report.checks if not check.ok] == ["fp32 step: losses of 6 steps"]


# A worker whose checks do what a GPU has been seen to do. It stands for the machine without its libraries, whose import
# would be most of each of its processes.
PLANTED_WORKER = """
import os, sys, time
from types import SimpleNamespace
sys.modules["hf_mlx.models.doctor"] = SimpleNamespace(environment=lambda: {"device": "a GPU", "machine": "a Mac"})
from hf_mlx.self_test import checks, worker
from hf_mlx.self_test.report import Measured
def fine(folder):
    yield "number", Measured(0.0, 1.0, "apart")
def wrong(folder):
    yield "number", Measured(2.0, 1.0, "apart")
def hangs(folder):
    yield "first", Measured(0.0, 1.0, "apart")
    time.sleep(600)
def busy(folder):
    while True:
        pass
    yield
def aborts(folder):
    print("[METAL] Command buffer execution failed: Impacting Interactivity", file=sys.stderr, flush=True)
    os.abort()
    yield
checks.CHECKS = {"a": fine, "b": hangs, "c": fine, "d": aborts, "e": wrong, "f": fine, "g": busy}
worker.main(sys.argv[1:])
"""


def test_a_check_that_hangs_or_ends_the_process_fails_by_name_and_the_others_run(monkeypatch, capsys):
    monkeypatch.setattr("hf_mlx.self_test.checks.CHECKS", dict.fromkeys("abcdefg"))
    started = []
    report = run_self_test(announce=started.append, limit=4, worker=[sys.executable, "-c", PLANTED_WORKER])
    assert started == list("abcdefg")
    found = {check.name: check for check in report.checks}
    assert {name for name, check in found.items() if check.ok} == {"a: number", "b: first", "c: number", "f: number"}
    assert re.fullmatch(
        r"did not end within 4 s, and was stopped at <string>:13 in hangs after 0 s of CPU time", found["b"].error
    )
    assert 4 <= found["b"].seconds < 60
    assert "in busy after" in found["g"].error and int(re.search(r"(\d+) s of CPU", found["g"].error)[1]) >= 1
    assert "SIGABRT" in found["d"].error and "Impacting Interactivity" in found["d"].error
    assert found["e: number"].value == 2.0
    assert "WRONG: b, d, e: number, g" in str(report)
    assert report.environment == {"device": "a GPU", "machine": "a Mac"}
    assert json.loads(report.to_json())["ok"] is False


def test_a_process_that_does_not_start_fails_every_check(monkeypatch):
    monkeypatch.setattr("hf_mlx.self_test.checks.CHECKS", dict.fromkeys("ab"))
    report = run_self_test(worker=[sys.executable, "-c", "raise SystemExit('no such device')"])
    assert [(check.name, check.ok) for check in report.checks] == [("a", False), ("b", False)]
    assert all("status 1: no such device" in check.error for check in report.checks)
    assert "WRONG: a, b" in str(report)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["doctor"], "without a model"),
        (["doctor", "a/b", "--self-test"], "with a model"),
        (["doctor", "a/b", "--report", "r.json"], "without --self-test"),
        (["doctor", "a/b", "--limit", "5"], "--limit without --self-test"),
        (["doctor", "--self-test", "--limit", "0"], "more than none"),
        (["doctor", "--self-test", "--report", "no/such/folder/r.json"], "a folder that exists"),
    ],
)
def test_what_contradicts_itself_is_refused(argv, message, capsys):
    assert main(argv) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert SettingError.__name__ in printed
