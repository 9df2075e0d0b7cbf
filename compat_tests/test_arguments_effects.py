"""Every setting that the ledger calls honoured or adapted visibly does something, the same as in TRL's run."""

import ast
import copy
import functools
from pathlib import Path

import effect_cases
import effect_checks
import pytest
from datasets import Dataset
from effect_cases import LORA, SETTINGS, Case
from pairs import SILENT, TIMED, Run, assert_same_curve, rows_of, run_mlx, run_trl, text_rows, tiny_model
from peft import LoraConfig
from sampling import sampled
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer
from hf_mlx.settings.lora_config import LORA_CONFIG
from hf_mlx.settings.sft_config import SFT_CONFIG
from hf_mlx.settings.training_arguments import TRAINING_ARGUMENTS
from hf_mlx.settings.verdicts import Verdict

pytestmark = pytest.mark.filterwarnings("ignore")

# As in test_trajectory_families: the promise of the library in fp32.
RELATIVE = 1e-4
WEIGHTS = 1e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Qwen2, because it has biases."""
    return tiny_model("qwen2", tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


def make_rows(kind: str) -> list[dict]:
    if kind != "two columns":
        return rows_of(kind, 12)
    # Enough that grouping by length sorts several batches together.
    count = 32
    others = text_rows(count, seed=9)
    return [
        {**row, "other": other["text"], "size": (7 * i) % count}
        for i, (row, other) in enumerate(zip(text_rows(count), others, strict=True))
    ]


def read_history(run: Run) -> list[dict]:
    return [{k: v for k, v in entry.items() if not any(t in k for t in TIMED)} for entry in run.history]


@functools.cache
def run_plain(model: Path, rows: str, base: str) -> Run:
    """Our run without the setting: many settings are compared with the same one."""
    eval_dataset = Dataset.from_list(make_rows(rows)[:5])
    return run_mlx(model, *_given(ast.literal_eval(base), rows), eval_dataset=eval_dataset)


def check_curve(model: Path, rows: str, base: tuple[dict, dict], changed: tuple[dict, dict], *, stays: bool) -> None:
    """Our run of ``changed`` equals TRL's, and is another one than that of ``base``."""
    keywords = {"eval_dataset": Dataset.from_list(make_rows(rows)[:5])}
    # transformers writes into the dicts it is given.
    theirs, ours = (run(model, *_given(copy.deepcopy(changed), rows), **keywords) for run in (run_trl, run_mlx))
    theirs.weights = {name.replace("_vector.weight", "_vector"): value for name, value in theirs.weights.items()}
    assert assert_same_curve(theirs, ours, relative=RELATIVE, weights=WEIGHTS) >= 2
    if not stays:
        plain = run_plain(model, rows, repr(base))
        assert (read_history(ours), ours.weights.keys()) != (read_history(plain), plain.weights.keys())


def _given(settings: tuple[dict, dict], rows: str) -> tuple[dict, list, dict]:
    return {**SETTINGS, **settings[0]}, make_rows(rows), {**LORA, **settings[1]}


# What the tests of curves, rows, schedules and callbacks set in each run too.
ELSEWHERE = (
    "max_steps", "data_seed", "train_sampling_strategy", "lr_scheduler_type", "adam_beta1", "adam_beta2",
    "logging_steps", "logging_strategy", "eval_strategy", "eval_steps", "per_device_eval_batch_size", "max_length",
    "packing", "padding_free", "gradient_checkpointing", "dataloader_drop_last", "num_train_epochs",
)  # fmt: skip
FEW = [item for item in effect_cases.ARGUMENTS.items() if item[0] not in ELSEWHERE]


@pytest.mark.parametrize(
    ("name", "case"), sampled(effect_cases.ARGUMENTS.items(), *FEW), ids=list(effect_cases.ARGUMENTS)
)
def test_an_argument_changes_the_curve_as_upstream(name, case, model):
    changed = {**case.beside, name: case.value}
    check_curve(model, case.rows, (case.beside, {}), (changed, {}), stays=case.stays)


@pytest.mark.parametrize(("name", "case"), effect_cases.ADAPTER.items(), ids=list(effect_cases.ADAPTER))
def test_a_field_of_the_adapter_changes_the_curve_as_upstream(name, case, model):
    changed = {**case.beside, name: case.value}
    check_curve(model, case.rows, ({}, case.beside), ({}, changed), stays=case.stays)


def saved_files(kind, model: Path, folder: Path, settings: dict) -> set[str]:
    """Which checkpoints a run leaves, and whether each can be resumed from."""
    trainer = kind(
        str(model),
        SFTConfig(output_dir=str(folder), **{**SILENT, **SETTINGS, **settings}),
        train_dataset=Dataset.from_list(text_rows(12)),
        eval_dataset=Dataset.from_list(text_rows(5, seed=1)),
        peft_config=LoraConfig(**LORA),
    )
    trainer.train()
    names = set()
    for checkpoint in folder.glob("checkpoint-*"):
        resumable = any(checkpoint.glob("optimizer*")) or any(checkpoint.glob("hf_mlx*optim*"))
        names.add(f"{checkpoint.name}{' and its optimizer' if resumable else ''}")
    best = trainer.state.best_model_checkpoint
    return names | {f"best: {Path(best).name if best else None}"}


@pytest.mark.parametrize(("name", "case"), effect_cases.FILES.items(), ids=list(effect_cases.FILES))
def test_a_setting_decides_what_is_saved(name, case: Case, model, tmp_path):
    changed = {**case.beside, name: case.value}
    theirs = saved_files(SFTTrainer, model, tmp_path / "theirs", changed)
    ours = saved_files(MLXSFTTrainer, model, tmp_path / "ours", changed)
    assert ours == theirs
    assert case.stays or ours != saved_files(MLXSFTTrainer, model, tmp_path / "plain", case.beside)


CHECKS = dict.fromkeys([*effect_checks.ARGUMENTS.values(), *effect_checks.ADAPTER.values()])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.strip("_"))
def test_what_the_log_does_not_show(check, model, tmp_path):
    check(effect_checks.Scene(model, tmp_path))


def acting(rules) -> set[str]:
    """Fields that some value of is honoured or done another way."""
    verdicts = (Verdict.HONOUR, Verdict.ADAPT)
    found = {rule.field for rule in rules if any(case.ruling.verdict in verdicts for case in rule.cases)}
    nested = {rule.field for rule in rules if any(case_is_honoured(key, verdicts) for key in getattr(rule, "keys", ()))}
    return found | nested


def case_is_honoured(rule, verdicts) -> bool:
    own = any(case.ruling.verdict in verdicts for case in rule.cases)
    return own or any(case_is_honoured(key, verdicts) for key in getattr(rule, "keys", ()))


# What acts on several processes alone, which test_ranks.py starts.
TOGETHER = {"average_tokens_across_devices", "ddp_timeout", "log_level_replica", "log_on_each_node"}


def test_every_setting_that_acts_is_seen_to_act():
    arguments = {*effect_cases.ARGUMENTS, *effect_cases.FILES, *effect_checks.ARGUMENTS, *TOGETHER}
    adapter = {*effect_cases.ADAPTER, *effect_checks.ADAPTER}
    assert arguments == acting((*TRAINING_ARGUMENTS, *SFT_CONFIG))
    assert adapter == acting(LORA_CONFIG)
    assert (len(arguments), len(adapter)) == (104, 24)
