"""Each way in which two runs can part, on traces made up to show it."""

import json
import math
from dataclasses import replace

import pytest

from hf_mlx.cli.main import main
from hf_mlx.errors import DataError
from hf_mlx.traces.compare import compare_traces
from hf_mlx.traces.trace import Trace, TraceStep, read_trace

HEADER = {"trace": 1, "max_grad_norm": 1.0, "bf16": False, "dtypes": ["float32"], "start_norm": 3.0}


def _run(header=(), **changes):
    """A smooth run of 12 steps; each change is a function of (step number, value)."""
    steps = []
    for n in range(1, 13):
        step = TraceStep(n, f"batch{n}", 100 + n, 90, 4.0 / n**0.3, 0.5 + 0.1 * n, 1e-4 * n)
        steps.append(replace(step, **{name: change(n, getattr(step, name)) for name, change in changes.items()}))
    return Trace({**HEADER, **dict(header)}, tuple(steps))


def _from(start, factor):
    return lambda n, value: value * factor if n >= start else value


def test_equal_runs_are_the_same():
    comparison = compare_traces(_run(), _run(loss=lambda n, loss: loss * (1 + 1e-6 * math.sin(n))))
    assert comparison
    assert comparison.steps == 12
    assert comparison.max_gap < 2e-6
    assert str(comparison).startswith("12 steps, the same")


@pytest.mark.parametrize(
    ("cause", "step", "field", "other"),
    [
        ("data order", 1, "batch", _run(batch=lambda n, _: f"batch{13 - n}", loss=_from(1, 1.1))),
        ("data order", 5, "batch", _run(batch=lambda n, b: f"x{n}" if n >= 5 else b, loss=_from(5, 1.1))),
        ("rows", 1, "batch", _run(batch=lambda n, _: f"x{n}", tokens=lambda n, t: t + 7, loss=_from(1, 1.1))),
        ("labels", 1, "targets", _run(targets=lambda n, _: 40, loss=_from(1, 1.3))),
        ("schedule", 1, "lr", _run(lr=_from(1, 2), loss=_from(2, 1.1))),
        ("schedule", 4, "lr", _run(lr=_from(4, 0.9), loss=_from(5, 1.01))),
        ("start", 1, "loss", _run(loss=_from(1, 1.2), grad_norm=_from(1, 0.7))),
        ("start", 1, "grad_norm", _run({"start_norm": 3.1}, grad_norm=_from(1, 1.07), loss=_from(2, 1.02))),
        ("start", 1, "grad_norm", _run(grad_norm=_from(1, 1.07), loss=_from(2, 1.02))),
        ("normalisation", 1, "loss", _run(loss=_from(1, 8), grad_norm=_from(1, 8))),
        ("normalisation", 1, "grad_norm", _run(grad_norm=_from(1, 1 / 4), loss=_from(2, 1.01))),
        ("dtype", 1, "loss", _run({"bf16": True}, loss=_from(1, 1.002), grad_norm=_from(1, 0.99))),
        ("dtype", 1, "loss", _run(loss=_from(1, 1.002), grad_norm=_from(1, 0.99))),
        ("dtype", 7, "loss", _run(loss=lambda n, v: v * (1 + 2e-6 * 2.0 ** (n - 1)))),
        # the gradient norm passes 1.0 at step 6, so the update of step 6 is the first that a clip changes
        ("clip", 7, "loss", _run(loss=_from(7, 1.02), grad_norm=_from(7, 1.05))),
        ("clip", 2, "loss", _run({"max_grad_norm": 0.1}, loss=_from(2, 1.02), grad_norm=_from(2, 1.05))),
        ("optimizer", 2, "loss", _run(loss=_from(2, 1.02), grad_norm=_from(2, 1.05))),
    ],
)
def test_each_cause_is_told_from_the_others(cause, step, field, other):
    for comparison in (compare_traces(_run(), other), compare_traces(other, _run())):
        assert not comparison
        assert (comparison.cause, comparison.step, comparison.field) == (cause, step, field)
        assert f"likely cause: {cause}" in str(comparison)


def test_a_nan_on_one_side_is_a_difference():
    comparison = compare_traces(_run(), _run(loss=lambda n, loss: math.nan if n == 9 else loss))
    assert (comparison.step, comparison.field) == (9, "loss")
    assert compare_traces(_run(loss=_from(9, math.nan)), _run(loss=_from(9, math.nan))).step is None


def test_a_shorter_run_is_equal_up_to_its_end():
    short = replace(_run(), steps=_run().steps[:5])
    comparison = compare_traces(_run(), short)
    assert not comparison
    assert (comparison.cause, comparison.step, comparison.steps) == ("length", None, 5)


def test_steps_without_a_log_are_compared_by_what_they_have():
    sparse = _run(loss=lambda n, loss: loss if n % 5 == 0 else None, grad_norm=lambda n, g: None)
    assert compare_traces(sparse, _run())
    assert compare_traces(sparse, _run(loss=_from(3, 1.5))).step == 5


def test_drift_has_a_sign_and_noise_has_none():
    drifting = compare_traces(_run(loss=lambda n, v: v * (1 + 5e-5)), _run())
    noisy = compare_traces(_run(loss=lambda n, v: v * (1 + 5e-5 * (-1) ** n)), _run())
    assert drifting.drift > 1e-4
    assert abs(noisy.drift) < 1e-5


def _write(path, trace):
    lines = [trace.header, *({k: v for k, v in vars(step).items() if v is not None} for step in trace.steps)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_files_are_read_back(tmp_path):
    assert read_trace(_write(tmp_path / "a.jsonl", _run())) == _run()


def test_the_command_prints_the_cause_and_exits_with_1(tmp_path, capsys):
    a, b = _write(tmp_path / "a.jsonl", _run()), _write(tmp_path / "b.jsonl", _run(lr=_from(1, 2)))
    assert main(["compare", a, a]) == 0
    assert main(["compare", a, b]) == 1
    assert "first difference at step 1: lr 0.0001 against 0.0002 (relative 5.00e-01)" in capsys.readouterr().out
    assert main(["compare", a, b, "--tolerance", "0.9"]) == 0


@pytest.mark.parametrize("text", [None, "", "not json", '{"step": 1}', '{"trace": 1}\n{"stop": 1}'])
def test_what_is_not_a_trace_is_refused(tmp_path, text):
    path = tmp_path / "a.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match="TraceCallback"):
        read_trace(path)
