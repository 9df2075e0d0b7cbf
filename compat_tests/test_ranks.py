"""Several processes on MLX's ring, beside what torchrun's recorded: ``record_ranks.py`` makes ``rank_records.json``."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from compiling import compiles_all, tell_uncompiled
from rank_cases import CASES, DRAWN, EQUAL, NAMED, OWN, OWN_EQUAL, PAIRS, PREDICTED, REWARDS, make_model
from rank_runs import HERE, finish, free_ports, run, said, start
from rank_worker import build, count_exchanges, describe

# float32 sums in another order, and AdamW's quotient of two small numbers behind them.
CLOSE = 1e-6
# One array's magnitudes, added up after a few of AdamW's steps.
WEIGHTS = 5e-5
COUNTED = ("num_tokens", "num_input_tokens_seen", "step", "epoch", "learning_rate", "eval_num_tokens")
#: What does not depend on which rows share a micro-batch.
DOUBLED = {"loss", "grad_norm", "entropy", "mean_token_accuracy", "eval_loss", *COUNTED}
SAMPLE = ["filled", "evaluated", "tail", "stream", "language_evaluated", "pairs_evaluated", "predicted_batched"]
SAMPLE += ["own_optimizer", "own_loss", "rewards_evaluated"]
#: Of the sample, where only it runs.
COMPILED = {"filled", "language_evaluated"}
#: Seconds in which the others of a rank that has failed name it and end.
IN_TIME = 10
#: Processes that leave theirs a fifth of two cores.
BUSY = 8
#: Of ranks, at events of callbacks and at steps that each of them has in a run of four steps with others after it.
KILLS = 20
EVENTS = {
    "on_train_begin": [0], "on_epoch_begin": [0, 2], "on_step_begin": [0, 1, 2, 3], "on_step_end": [1, 2, 3],
    "on_log": [1, 2, 3], "on_save": [1, 2, 3], "on_epoch_end": [2],
}  # fmt: skip
RECORDS = json.loads((HERE / "rank_records.json").read_text())


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "mixtral", "scored"):
        make_model(folder / family, family)
    return folder


def recorded(name: str, ranks: int) -> str:
    """Under which name upstream's numbers of a case stand."""
    return f"{(EQUAL | OWN_EQUAL).get(name, name)}/{ranks}"


def compare(
    name: str,
    ranks: int,
    made: list[dict[str, Any]],
    records: dict[str, Any] | None = None,
    doubled: dict[str, Any] | None = None,
) -> int:
    """Assert that a case has upstream's log and weights; how many values were compared.

    Args:
        name, ranks: Which.
        made: What each rank says.
        records: Upstream's numbers; None for the recorded ones.
        doubled: The same in float64: a value that is further from upstream's may be as far from them as that is.
    """
    theirs, ours = (RECORDS if records is None else records)[recorded(name, ranks)], made[0]
    exact = doubled[recorded(name, ranks)] if doubled is not None else theirs
    compared = 0
    assert ours["max_steps"] == theirs["max_steps"], name
    assert len(ours["log"]) == len(theirs["log"]), name
    for a, b, c in zip(theirs["log"], ours["log"], exact["log"], strict=True):
        assert a.keys() == b.keys() == c.keys(), (name, a, b)
        for key, value in a.items():
            near = 1e-9
            if key == "rewards/accuracies" and name in EQUAL and a["rewards/margins"] == 0:
                # Ties before the first update; log-probabilities that were computed apart are rounded apart.
                continue
            if "rewards/" in key:
                # Differences of sums over the tokens of an answer, times beta.
                near = CLOSE * max(abs(v) for name, v in a.items() if "logps/" in name)
            elif key.endswith(("_reward", "margin")):
                # Means and differences of scores, which lie on both sides of 0.
                near = CLOSE * max(abs(v) for name, v in a.items() if name.endswith("_reward"))
            elif "logits/" in key:
                # Means of what lies on both sides of 0.
                near = CLOSE / 10
            if key in COUNTED:
                assert b[key] == value, (name, key, a, b)
            else:
                assert is_close(b[key], value, c[key], CLOSE, near), (name, key, a, b, c)
            compared += 1
    assert ours["weights"].keys() == theirs["weights"].keys()
    for key, (_, magnitude) in theirs["weights"].items():
        found, double = ours["weights"][key][1], exact["weights"][key][1]
        assert is_close(found, magnitude, double, WEIGHTS, 1e-7), (name, key, found, magnitude, double)
    assert len({one["exact"] for one in made}) == 1, f"{name}: the ranks' weights differ"
    assert [one["world"] for one in made] == [[ranks, rank, ranks] for rank in range(ranks)]
    return compared


def is_close(found: float, theirs: float, exact: float, close: float, near: float) -> bool:
    """Whether a value is upstream's, or no further than ``close`` beyond upstream's own rounding from float64's."""
    if found == pytest.approx(theirs, rel=close, abs=near, nan_ok=True):
        return True
    return theirs != exact and abs(found - exact) <= abs(theirs - exact) + max(close * abs(exact), near)


def run_cases(
    ranks: int, cases: list[str], folder: Path, models: Path, timeout: float, records: dict[str, Any] | None = None
) -> None:
    """Assert that ``cases`` are upstream's: one in ten at most by float64's help, which rounding turned."""
    compared: dict[str, int] = {}
    missed = {}
    for part in range(0, len(cases), 10):
        names = cases[part : part + 10]
        made = run(ranks, folder / str(part), models, names, timeout)
        for name in names:
            found = [one[name] for one in made]
            try:
                compared[name] = compare(name, ranks, found, records)
            except AssertionError as error:
                missed[name] = found
                print(f"{name}, {ranks} ranks: {str(error).splitlines()[0][:300]}")
    assert len(missed) <= max(1, len(cases) // 10)
    if missed:
        names = [recorded(name, ranks).partition("/")[0] for name in missed]
        torchrun(ranks, str(folder / "doubled.json"), *names, RECORD_DOUBLE="1")
        doubled = json.loads((folder / "doubled.json").read_text())
        for name, found in missed.items():
            compared[name] = compare(name, ranks, found, records, doubled)
    # A drawn run may be too short for its first log, and has its summary and its weights alone then.
    assert len(compared) == len(cases) and min(compared.values()) >= 4
    assert sum(compared.values()) >= 10 * len(cases)


@pytest.fixture(scope="module")
def sample(
    models: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> list[dict[str, Any]]:
    """What two ranks say of the sample, and of the case that one process is compared with."""
    # Both build each kernel: they come to it at the same time.
    uncompiled = [] if compiles_all(request.config) else sorted(set(SAMPLE) - COMPILED)
    folder = tmp_path_factory.mktemp("sample")
    return run(2, folder, models, [*SAMPLE, "plain"], 300, **tell_uncompiled(uncompiled))


def test_two_ranks_log_what_torchrun_logs(sample: list[dict[str, Any]]) -> None:
    assert len(SAMPLE) == 10
    for name in (*SAMPLE, "plain"):
        assert compare(name, 2, [one[name] for one in sample]) >= 6


def test_two_ranks_of_two_rows_are_one_process_of_four(
    sample: list[dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    trainer = build(CASES["plain"] | {"per_device_train_batch_size": 4}, models, str(tmp_path / "one"))
    trainer.train()
    one, two = describe(trainer), sample[0]["plain"]
    assert len(one["log"]) == len(two["log"]) == 5
    for a, b in zip(one["log"][:-1], two["log"][:-1], strict=True):
        for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
            assert b[key] == pytest.approx(a[key], rel=CLOSE, abs=1e-9), (key, a, b)
        assert (a["num_tokens"], a["learning_rate"], a["epoch"]) == (b["num_tokens"], b["learning_rate"], b["epoch"])
    for key, (_, magnitude) in one["weights"].items():
        assert two["weights"][key][1] == pytest.approx(magnitude, rel=WEIGHTS, abs=1e-7), key


@pytest.mark.wide
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("kind", "count"), [("named", 20), ("drawn", 30), ("pairs", 9), ("predicted", 5), ("own", 8), ("rewards", 4)]
)
def test_every_case_logs_what_torchrun_logs(ranks: int, kind: str, count: int, models: Path, tmp_path: Path) -> None:
    cases = [
        *{
            "named": NAMED,
            "drawn": DRAWN,
            "pairs": {**PAIRS, **EQUAL},
            "predicted": PREDICTED,
            "own": {**OWN, **OWN_EQUAL},
            "rewards": REWARDS,
        }[kind]
    ]
    assert len(cases) == count
    run_cases(ranks, cases, tmp_path, models, 800)


@pytest.mark.wide
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [2, 3])
def test_fresh_cases_log_what_torchrun_logs(ranks: int, models: Path, tmp_path: Path) -> None:
    seed, records = fresh_seed(), tmp_path / "records.json"
    cases = [f"default_{seed + number}" for number in range(30)]
    torchrun(ranks, str(records), *cases, timeout=800)
    found = json.loads(records.read_text())
    # What upstream itself cannot do is no case.
    cases = [name for name in cases if f"{name}/{ranks}" in found]
    assert len(cases) >= 28
    run_cases(ranks, cases, tmp_path, models, 800, found)


@pytest.mark.wide
@pytest.mark.timeout(3600)
def test_drawn_runs_of_two_ranks_are_one_process_of_twice_the_rows(models: Path, tmp_path: Path) -> None:
    seed = fresh_seed()
    names = [f"doubled_{seed + number}" for number in range(12)]
    made = run(2, tmp_path / "two", models, names, 800)
    compared = 0
    for name in names:
        case = CASES[name]
        one = build(
            case | {"per_device_train_batch_size": 2 * case["per_device_train_batch_size"]},
            models,
            str(tmp_path / name),
        )
        one.train()
        alone, together = describe(one), made[0][name]
        assert together["exact"] == made[1][name]["exact"]
        assert len(alone["log"]) == len(together["log"]) > 1
        for a, b in zip(alone["log"][:-1], together["log"][:-1], strict=True):
            for key in a.keys() & DOUBLED:
                exact = key in COUNTED
                assert b[key] == (a[key] if exact else pytest.approx(a[key], rel=CLOSE, abs=1e-9)), (name, key, a, b)
                compared += 1
    assert compared > 20 * len(names)


def fresh_seed() -> int:
    """Another one each time, unless HF_MLX_SEED says which."""
    seed = int(os.environ.get("HF_MLX_SEED") or time.time_ns() // 1000 % 10**6)
    print(f"HF_MLX_SEED={seed}")
    return seed


def scenario(
    ranks: int, names: list[str], folder: Path, models: Path, timeout: float = 300, grace: float = 60, **environ: str
) -> list[int]:
    """The exit statuses of the processes that play ``names``."""
    return finish(begin(ranks, names, folder, models, **environ), timeout, grace)


def begin(ranks: int, names: list[str], folder: Path, models: Path, **environ: str) -> list[Any]:
    """The processes that play ``names``."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [str(models), str(folder / "out"), *names]
    return start(ranks, folder, arguments, script=HERE / "rank_scenarios.py", **environ)


def told(ranks: int, folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"out.{rank}").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("played")


@pytest.fixture(scope="module")
def played(models: Path, stage: Path) -> list[dict[str, Any]]:
    folder = stage
    names = ["objects", "exchange", "graph", "stopped", "interrupted", "predicted", "resumed", "own_disk"]
    names += ["shown", "different", "refused", "raising"]
    # The last one ends them both.
    assert scenario(2, names, folder, models) == [1, 1]
    made = told(2, folder)
    assert [list(one) for one in made] == [names[:-1]] * 2, said(folder, 0)[-3000:] + said(folder, 1)[-3000:]
    return made


def test_objects_of_hf_know_the_processes(played: list[dict[str, Any]]) -> None:
    first, second = (one["objects"] for one in played)
    assert first["args"] == [2, 0, 0, True, True] and second["args"] == [2, 1, 1, False, False]
    assert first["state"] == first["trainer"] == [True, True]
    assert second["state"] == second["trainer"] == [False, False]
    assert first["processes"] == [2, 0, True] and second["processes"] == [2, 1, False]
    assert float(first["first"][0]) <= float(second["first"][0])
    for one in (first, second):
        assert one["batch"] == 4
        assert (one["scalar"], one["rows"]) == ([0, 1], [[0.0, 1.5], [1.0, 1.5]])
        assert (one["sum"], one["mean"], one["padded"]) == ([2.0, 1.0], [1.0, 0.5], [2, 4])
        assert one["loader"] == [2, 2, 2, 2]


def test_a_step_exchanges_once(played: list[dict[str, Any]]) -> None:
    for one in played:
        assert one["graph"] == {"exchanges": 1, "arrays": 28}


def test_one_process_exchanges_nothing(models: Path, tmp_path: Path) -> None:
    trainer = build(CASES["plain"], models, str(tmp_path / "alone"))
    assert count_exchanges(trainer, tmp_path / "alone") == 0
    assert trainer.session.step.exchange is None and trainer.session.world.group is None


def test_gradients_of_every_kind_are_added_up(played: list[dict[str, Any]]) -> None:
    for rank, one in enumerate(played):
        assert max(one["exchange"]["worst"].values()) <= 1e-6
        assert one["exchange"]["norm"][0] == pytest.approx(one["exchange"]["norm"][1], rel=CLOSE)
        own = (0.5 + rank) * 2
        assert one["exchange"]["metrics"] == {"loss": 2.0, "micro_batches": 2.0, "entropy": 1.0, "own_loss": own}


def test_callbacks_see_the_gradients_of_all_ranks(played: list[dict[str, Any]]) -> None:
    theirs = RECORDS["plain/2"]["log"]
    for one in played:
        assert len(one["shown"]["norms"]) == 4
        for entry, logged, norm in zip(theirs, one["shown"]["log"], one["shown"]["norms"], strict=False):
            assert logged["loss"] == pytest.approx(entry["loss"], rel=CLOSE)
            assert logged["grad_norm"] == pytest.approx(entry["grad_norm"], rel=CLOSE)
            # None of them is above max_grad_norm, so they are not clipped.
            assert norm == pytest.approx(entry["grad_norm"], rel=CLOSE)
    assert played[0]["shown"]["exact"] == played[1]["shown"]["exact"]


def test_all_stop_at_the_same_step(played: list[dict[str, Any]]) -> None:
    for one in played:
        # All want to: at that step, as under torchrun. One wants to: one step later, which is said once.
        assert (one["stopped"]["all"], one["stopped"]["one"]) == ([2, True], [3, True])
        assert len(one["stopped"]["said"]) == 1 and "rank 1" in one["stopped"]["said"][0]


def test_ctrl_c_on_one_rank_saves_on_all_at_the_same_step(played: list[dict[str, Any]]) -> None:
    assert [one["interrupted"] for one in played] == [{"step": 2, "saved": ["checkpoint-2"]}] * 2


def test_predictions_are_those_of_all_rows_in_their_order(played: list[dict[str, Any]]) -> None:
    first, second = (one["predicted"] for one in played)
    assert first == second
    assert len(first["predictions"]) == 7
    # Labels of a row are its tokens, so their sums tell the order.
    assert first["seen"]["labels"] == first["rows"]
    assert first["evaluated"]["eval_labels"] == sum(sum(v != -100 for v in row) for row in _label_rows(first))


def _label_rows(predicted: dict[str, Any]) -> list[list[int]]:
    from rank_cases import token_rows

    rows = [row["input_ids"] for row in token_rows(7, 99)]
    assert [sum(row) for row in rows] == predicted["rows"]
    return rows


def test_a_resumed_run_is_the_unbroken_one_bit_by_bit(played: list[dict[str, Any]]) -> None:
    for one in played:
        whole, again = one["resumed"]["whole"], one["resumed"]["again"]
        assert whole["log"][:-1] == again["log"][:-1] and len(whole["log"]) == 5
        assert whole["exact"] == again["exact"]
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(one["resumed"]["files"])
        assert "rng_state.pth" not in one["resumed"]["files"]


def test_checkpoints_need_no_shared_disk(played: list[dict[str, Any]]) -> None:
    for one in played:
        assert one["own_disk"]["again"]["exact"] == one["resumed"]["whole"]["exact"]
    assert not [name for name in played[1]["own_disk"]["written"] if name.startswith("checkpoint")]


def test_ranks_that_differ_are_refused_by_name(played: list[dict[str, Any]]) -> None:
    for one in played:
        rows, seed = one["different"]
        assert rows[0] == seed[0] == "SettingError"
        assert "rank 1 with rows of train_dataset 17, where rank 0 has 16" in rows[1]
        assert "rank 1 with batch.seed '43', where rank 0 has '42'" in seed[1]


def test_what_is_not_proven_is_refused(played: list[dict[str, Any]]) -> None:
    for one in played:
        assert len(one["refused"]) == 6
        kind, text = one["refused"].pop("short stream")
        assert kind == "DataError" and "gradient_accumulation_steps=1, or" in text
        for name, (kind, text) in one["refused"].items():
            expected = "DataError" if name == "uneven evaluation" else "SettingError"
            assert kind == expected and "process" in text and "remedy:" in text, (name, text)


def test_a_rank_that_raises_ends_the_others(played: list[dict[str, Any]], stage: Path) -> None:
    assert "ValueError: the disk of rank 1 is full" in said(stage, 1)
    assert "TrainingError: received: rank 1 has ended with ValueError: the disk of rank 1 is full" in said(stage, 0)


SCRIPT = """
import argparse, sys, torch
parser = argparse.ArgumentParser()
parser.add_argument("-n", type=int)
own = parser.parse_args()
import numpy as np
from accelerate import Accelerator, PartialState
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
quiet = dict(report_to="none", bf16=False, use_cpu=True, disable_tqdm=True, save_strategy="no")
args = SFTConfig("{out}/run", per_device_train_batch_size=2, max_steps=2, logging_steps=1, **quiet)
with args.main_process_first(desc="rows"):
    rows = Dataset.from_list([{{"input_ids": list(range(3, 9 + row))}} for row in range(8)])
told = [own.n, args.world_size, args.process_index, args.should_save, PartialState().is_main_process]
other = SFTConfig("{out}/other", **quiet)
told += [other.world_size, Accelerator().gather(torch.tensor([args.process_index])).tolist()]
trainer = SFTTrainer("{model}", args, train_dataset=rows, peft_config=LoraConfig(r=4, target_modules="all-linear"))
trainer.train()
trainer.save_model("{out}/saved")
trainer.accelerator.wait_for_everyone()
print("TOLD", told, trainer.is_world_process_zero(), trainer.state.global_step, flush=True)
"""


@pytest.mark.wide
@pytest.mark.timeout(3600)
def test_an_unedited_script_is_launched_on_two_processes(models: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(out=tmp_path, model=models / "llama"))
    environ = {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hf_mlx.cli.main", "launch", "-n", "2", "--starting-port", str(free_ports(1)[0])]
    command += [word for name, value in environ.items() for word in ("--env", f"{name}={value}")]
    done = subprocess.run(
        [*command, str(script), "-n", "7"],
        env=os.environ | environ | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
    )
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("TOLD"))
    assert lines == [
        "TOLD [7, 2, 0, True, True, 2, [0, 1]] True 2",
        "TOLD [7, 2, 1, False, False, 2, [0, 1]] False 2",
    ], done.stdout[-2000:] + done.stderr[-3000:]
    # Once for all processes: the ledger and each log entry.
    assert (done.stdout + done.stderr).count("'grad_norm'") == 2
    assert (done.stdout + done.stderr).count("field    ") == 1
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


@pytest.mark.wide
@pytest.mark.timeout(3600)
def test_a_rank_that_hangs_is_named_and_ends_the_others(models: Path, tmp_path: Path) -> None:
    statuses = scenario(2, ["hanging"], tmp_path, models, timeout=200)
    # Rank 1 sleeps on; it is ended here.
    assert statuses[0] == 1
    assert "waited ddp_timeout=6 s at step" in said(tmp_path, 0) and "rank 1" in said(tmp_path, 0)


@pytest.mark.wide
def test_a_rank_that_dies_in_an_evaluation_ends_the_others(models: Path, tmp_path: Path) -> None:
    assert scenario(3, ["evaluating"], tmp_path, models, grace=IN_TIME) == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        assert "rank 1 has ended without a word" in said(tmp_path, rank)
        assert "at an evaluation" in said(tmp_path, rank)


@pytest.mark.wide
def test_a_rank_that_dies_ends_the_others_of_a_busy_machine(models: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = begin(3, ["killed"], tmp_path, models, KILLED_DIR=str(run), KILLED='[2, "on_step_end", 2, 0]')
    while not run.exists() and any(process.is_alive() for process in started):
        time.sleep(0.05)
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
    try:
        statuses = finish(started, 300, IN_TIME)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert statuses == [1, 1, -signal.SIGKILL]
    for rank in (0, 1):
        assert "rank 2 has ended without a word" in said(tmp_path, rank)


@pytest.mark.wide
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [2, 3])
def test_runs_that_lost_a_rank_anywhere_go_on_bit_by_bit(ranks: int, models: Path, tmp_path: Path) -> None:
    draw, cases = random.Random(f"{fresh_seed()}-{ranks}"), []
    for _ in range(KILLS // 2):
        event, steps = draw.choice(list(EVENTS.items()))
        # At once, or somewhere in what comes after it: another step, a checkpoint that is being written.
        delay = draw.choice([0, round(draw.uniform(0, 0.3), 3)])
        cases.append([draw.randrange(ranks), event, draw.choice(steps), delay])
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    words = [str(models), str(tmp_path / "played"), str(ranks), json.dumps(cases)]
    done = subprocess.run(
        [sys.executable, str(HERE / "rank_kills.py"), *words],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    made = json.loads((tmp_path / "played" / "told.json").read_text())
    assert len(made["killed"]) == len(cases) == 10
    named, slowest, gone = 0, 0.0, 0.0
    for case, ended in zip(cases, made["killed"], strict=True):
        rank, _, _, delay = case
        assert ended[rank]["status"] == -signal.SIGKILL, case
        for other in set(range(ranks)) - {rank}:
            # After the last step nobody waits for anybody.
            if ended[other]["status"] or delay == 0:
                assert ended[other]["status"] == 1, case
                assert f"rank {rank} has ended without a word" in ended[other]["said"], (
                    case,
                    ended[other]["said"][-2000:],
                )
                told_at = ended[other]["named"] or ended[other]["at"]
                named, slowest = named + 1, max(slowest, told_at - ended[rank]["at"])
                gone = max(gone, ended[other]["at"] - ended[rank]["at"])
    print(f"{len(cases)} kills of {ranks} ranks, named on {named} others in {slowest:.1f} s, gone in {gone:.1f} s")
    assert named >= len(cases) and slowest < IN_TIME and gone < IN_TIME
    assert [one["status"] for one in made["revived"]] == [0] * ranks, made["revived"][0]["said"][-3000:]
    for one in told(ranks, tmp_path / "played" / "revived"):
        whole = one["revived"].pop(str(tmp_path / "played" / "unbroken"))
        assert list(one["revived"]) == made["runs"] and len(whole["log"]) == 5
        for folder, again in one["revived"].items():
            assert again["exact"] == whole["exact"], folder
            assert again["log"][:-1] == whole["log"][:-1], folder


@pytest.mark.wide
@pytest.mark.timeout(3600)
def test_folders_of_torchrun_resume_here_and_ours_there(models: Path, tmp_path: Path) -> None:
    ours, theirs, again = tmp_path / "ours", tmp_path / "theirs", tmp_path / "again"
    assert scenario(2, ["foreign"], ours, models, FOREIGN_DIR=str(ours / "run")) == [0, 0]
    unbroken = told(2, ours)[0]["foreign"]
    run_saved(models, theirs / "run", None)
    environ: Any = {"FOREIGN_DIR": str(again / "run"), "FOREIGN_CHECKPOINT": str(theirs / "run" / "checkpoint-2")}
    assert scenario(2, ["foreign"], again, models, **environ) == [0, 0], said(again, 0)[-3000:]
    resumed = told(2, again)[0]["foreign"]
    _assert_close(unbroken["log"], resumed["log"], *VALUES, "num_tokens")
    # TRL counts num_tokens from 0 when it resumes.
    _assert_close(unbroken["log"], run_saved(models, theirs / "other", ours / "run" / "checkpoint-2"), *VALUES)


VALUES = ("loss", "grad_norm", "entropy", "learning_rate", "epoch")


def _assert_close(expected: list[dict[str, Any]], found: list[dict[str, Any]], *keys: str) -> None:
    assert len(expected) == len(found) == 5
    for a, b in zip(expected[:-1], found[:-1], strict=True):
        for key in keys:
            assert b[key] == pytest.approx(a[key], rel=CLOSE), (key, a, b)


@pytest.mark.wide
@pytest.mark.timeout(3600)
def test_another_number_of_ranks_goes_on_with_one_warning(models: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    assert scenario(2, ["foreign"], ours, models, FOREIGN_DIR=str(ours / "run")) == [0, 0]
    environ: Any = {"FOREIGN_CHECKPOINT": str(ours / "run" / "checkpoint-2")}
    for ranks in (1, 3):
        folder = tmp_path / str(ranks)
        assert scenario(ranks, ["foreign"], folder, models, FOREIGN_DIR=str(folder / "run"), **environ) == [0] * ranks
        told_of = [line for line in said(folder, 0).splitlines() if line.startswith("Changed since checkpoint-2")]
        assert len(told_of) == 1 and f"processes 2 → {ranks}" in told_of[0]
        log = told(ranks, folder)[0]["foreign"]["log"]
        assert log[0]["step"] == 1 and log[-1]["step"] > 2


def torchrun(ranks: int, *arguments: str, timeout: float = 400, **environ: str) -> None:
    """Run ``record_ranks.py`` on several processes."""
    environ = {"GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environ
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    # Its own choice of a port, 0, leaves the processes waiting for each other.
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_ports(1)[0])]
    command += [str(HERE / "record_ranks.py"), *arguments]
    done = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]


def run_saved(models: Path, out: Path, checkpoint: Path | None) -> list[dict[str, Any]]:
    """The log of TRL's own run of the saved case on two processes."""
    out.mkdir(parents=True)
    torchrun(2, "--resume", str(models), str(out), str(checkpoint or ""))
    return json.loads((out / "log.json").read_text())
