"""Settings that would fail deep inside: patterns that do not compile, huge numbers, no thread to be had."""

import threading
from typing import Any

import pytest

from hf_mlx.data.loader import read_ahead
from hf_mlx.data.processes import naming_processes
from hf_mlx.errors import DataError, SettingError, TrainingError
from hf_mlx.settings.resolve import resolve_plan

PATTERNS: list[dict[str, Any]] = [
    {"target_modules": r"(q_proj"},
    {"target_modules": r"*.q_proj"},
    {"target_modules": ["q_proj"], "exclude_modules": r"[a-"},
    {"target_modules": ["q_proj"], "rank_pattern": {"q_(proj": 4}},
    {"target_modules": ["q_proj"], "alpha_pattern": {"*q": 4}},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers["},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head("]},
    {"target_modules": r"q{99999999999999999999}"},
]
ADAPTERS = [
    {"r": 10**9},
    {"r": 10**30},
    {"rank_pattern": {"q_proj": 10**9}},
    {"lora_alpha": 10**400},
    {"lora_alpha": 1e400},
]
NUMBERS = [
    {name: value}
    for name in ("max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "save_total_limit", "seed")
    for value in (10**30, 10**5000, float("inf"))
] + [{"learning_rate": 1e400}, {"learning_rate": 10**400}, {"logging_steps": 10**400}, {"num_train_epochs": 1e400}]


@pytest.mark.parametrize("lora", PATTERNS)
def test_a_pattern_that_does_not_compile_is_named(lora):
    with pytest.raises(SettingError, match="regular expression that compiles"):
        resolve_plan({}, {"peft_type": "LORA", **lora})


def test_huge_numbers_are_named():
    seen = 0
    for settings, lora in [*((n, {}) for n in NUMBERS), *(({}, a) for a in ADAPTERS)]:
        with pytest.raises(SettingError, match=next(iter({**settings, **lora}))):
            resolve_plan(settings, {"peft_type": "LORA", "target_modules": ["q_proj"], **lora})
        seen += 1
    assert seen == len(NUMBERS) + len(ADAPTERS) == 24


def test_a_warmup_that_a_schedule_lacks_is_said_and_not_refused():
    for settings in ({"warmup_steps": 3}, {"warmup_steps": 0.1}):
        plan, ledger = resolve_plan({"lr_scheduler_type": "constant", **settings})
        assert plan.schedule.name == "constant"
        assert any("constant_with_warmup has one" in line for line in ledger.notices())


@pytest.mark.parametrize("count", [0, -1, 0.0])
def test_saving_at_no_count_of_steps_is_accepted(count):
    resolve_plan({"save_strategy": "steps", "save_steps": count})


def test_a_thread_that_cannot_start_is_named(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(TrainingError, match="ulimit -u"):
        list(read_ahead(iter(range(4)), 2))


@pytest.mark.parametrize(
    "error", [BlockingIOError(11, "Resource temporarily unavailable"), RuntimeError("can't start new thread")]
)
def test_processes_that_cannot_start_are_named(error):
    named = r"dataset_num_proc=4 .*train dataset[\s\S]*dataset_num_proc=None"
    with pytest.raises(DataError, match=named), naming_processes(4, "train"):
        raise error
    with pytest.raises(type(error)), naming_processes(None, "train"):
        raise error
