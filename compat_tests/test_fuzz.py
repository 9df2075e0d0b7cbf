"""Settings and datasets that nobody chose, drawn from a printed seed: TRL's curve, TRL's refusal, or ours by name.

Each draw runs twice, by trl and here, for two steps. Nothing else is allowed than

- ``equal``: both train, with the same log keys in the same order and the same numbers;
- ``both raise``: trl raises, and here a HFMLXError is raised, or the very class that trl raises;
- ``no config``: SFTConfig or LoraConfig itself raises, before there is a trainer;
- ``accepted``: trl raises what works here, for a reason that ``ACCEPTED`` holds;
- ``refused``: trl trains what is refused here by name, for a reason that ``REFUSALS`` holds;
- ``otherwise``: both train, with other numbers, for a reason that ``OTHERWISE`` holds and the run says.

``HF_MLX_SEED=7 pytest compat_tests/test_fuzz.py`` draws other ones.
"""

import copy
import math
import os
import re
from collections import Counter
from typing import Any

import pytest
from datasets import Dataset
from fuzz_rows import draw_rows
from fuzz_settings import draw_settings
from pairs import SILENT, TIMED, _quiet, rows_of, tiny_model
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from hf_mlx import HFMLXError, MLXSFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore")

# As in test_trajectory_families: the promise of the library in fp32.
RELATIVE = 1e-4

DEFAULT = 20262
SEED = int(os.environ.get("HF_MLX_SEED", DEFAULT))
# `make test` runs the first few of the same sequences that `make compat` runs in full.
SAMPLE, ALL = 6, 120

BASE: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1, "max_length": 64,
}  # fmt: skip
LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

# Words of a refusal of something that trl trains, and why it is refused.
REFUSALS: dict[str, str] = {
    r"LoraConfig\.inference_mode freezes": "PEFT leaves nothing to train, and trl goes through the motions",
    r"LoraConfig\.\w+ turns on": "a variant of LoRA that is not implemented, also where its other half is missing",
    r"LoraConfig\.init_lora_weights derives": "a start that is not implemented",
    r"LoraConfig\.task_type is not": "an adapter for another task",
    r"modules_to_save is a string": "PEFT reads it letter by letter",
    r"target_parameters=.* match no parameter": "PEFT warns, and trains what target_modules match",
    r"SFTConfig\.optim_target_modules belongs": "no effect under trl with this optimizer: nothing is dropped silently",
    r"SFTConfig\.(fp16_full_eval|fp16) ": "fp16 is not implemented",
    r"SFTConfig\.include_for_metrics names": "a word that transformers does not know and passes over",
    r"SFTConfig\.debug ": "torch's debugging",
    r"SFTConfig\.enable_jit_checkpoint ": "a cluster's signal",
    r"SFTConfig\.label_smoothing_factor is dropped": "trl drops it silently with dft",
    r"SFTConfig\.optim_args has": "trl drops an option that the optimizer does not read",
    r"SFTConfig\.lr_scheduler_kwargs has": "trl drops an option that the schedule does not read",
    r"SFTConfig\.\w+ is none of": "no such choice, which trl takes for another or does not read in this run",
    r"SFTConfig\.train_sampling_strategy balances": "there is one process",
    r"max_steps=0\n": "trl trains all epochs instead of none",
    r"SFTConfig\.label_names ": "a causal model has one label column",
    r"SettingError: received: ([\w\['\]]+)=('\w*'|None|True|-?[\d.]+|nan|inf)\n  required: [\w\['\]]+ is ": (
        "a value outside its type or range, which trl takes for something else"
    ),
    r"a loss of nan at step": "the run is lost from there on; trl goes on",
    r"two formats at once": "trl picks one",
    r"has the column '(labels|\w+_masks?)' beside": "trl lays it over the tokens that it makes of the row",
    r"explicit choice: TRL ignores the mask": "trl trains on the prompt silently",
    r"column '\w*mask\w*'": "a mask that is not one 0 or 1 for each token",
    r"completion_only_loss=True with a": "no completion to train on; trl ignores it",
    r"ids from 0 to \d+: the model embeds": "a row that trl would stop at later than these two steps",
    r"row [1-9]\d* of the train dataset, column '(tools|messages)': .*\n  required: a (list of|dict with)": (
        "a row of a stream that trl would stop at later than these two steps"
    ),
    r"stream .*row [1-9]\d* of the train dataset, column 'text'": "the same",
    r"column 'labels': \d+ values for \d+ input_ids": "labels that are not one for each token",
    r"roles out of order: message 0 \(assistant\)": "an answer to nothing",
    r"no messages \(an empty list\)": "a turn without messages",
    r"dataloader_drop_last=True\n  required: at least one batch": "trl trains nothing and says so nowhere",
    r"no row has a token to train on": "trl trains an epoch of zeros, or nothing",
}
# Words of trl's error where this library trains, and why it does.
ACCEPTED: dict[str, str] = {
    r"(persistent_workers|prefetch_factor|num_workers) option": "of torch's DataLoader, which is not used",
    r"should be a boolean value, but got drop_last=None": "None is False for every switch",
    r"liger-kernel .* is not available": "CUDA kernels, which are not used",
    r"must be a `Dataset` or `IterableDataset`, got `(list|tuple)`": "rows in a list are rows",
    r"A formatting function was provided while": "the formatted text is trained, and said so",
    r"numpy format.* (KeyError: 'text'|AttributeError: 'numpy.ndarray')": "rows are read as Python values, always",
    r"numpy format.* (KeyError: 'body'|.*is not conversational)": "the same",
    r"numpy format.* ArrowInvalid: arrays to be concatenated must be identically typed": "the same",
    r"The chat template is not training-compatible": "the assistant's turns are found by ChatML's delimiters",
    r"'activation_offloading': True.*'NoneType' object has no attribute 'type'": "needs an accelerator under trl",
    r"attention_mask, attention_mask='None'.* torch format": "a column that is not read here",
    r"text, with tools='.*JSONDecodeError": "the same",
    r"template options.*'NoneType' object is not a mapping": "None is what Arrow stores for a row without options",
    r"assistant_masks, .*the dataset is not conversational": "the masks are there",
    r"optim.*need to install `bitsandbytes`": "its formula is computed here",
    r"'max_grad_norm': None.*'>' not supported between": "None is no clipping",
    r"'r': 2\.0.*found element of type float": "2.0 is 2",
    r"'init_lora_weights': 1.*'int' object has no attribute 'lower'": "1 is True",
    r"_pattern': None.*'NoneType' object has no attribute 'keys'": "None is no pattern",
}
# What is trained here on purpose, with a line in the log, where trl trains something else.
OTHERWISE: dict[str, str] = {
    r"prompt and completion.*'completion_only_loss': False.*formatting_func": "trl trains the row's own columns",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model("llama", tmp_path_factory.mktemp("model"), hidden_size=32, intermediate_size=48))


def run_both(what: str, model: str, *drawn: Any) -> str:
    """The outcome of trl's run and ours."""
    print(f"HF_MLX_SEED={SEED} {what}")
    try:
        with _quiet() as folder:
            configure(folder, *drawn[:2])
    except Exception:
        return "no config"
    return judge(what, attempt(SFTTrainer, model, *drawn), attempt(MLXSFTTrainer, model, *drawn))


def configure(folder: str, settings: Any, lora: Any) -> tuple[SFTConfig, LoraConfig | None]:
    """The two configs; from a copy, because transformers writes into nested settings."""
    settings, lora = copy.deepcopy((settings, lora))
    args = SFTConfig(output_dir=folder, **{**SILENT, **BASE, **settings})
    return args, None if lora is None else LoraConfig(**{**LORA, **lora})


def attempt(trainer: Any, model: str, settings: Any, lora: Any, make: Any, keywords: Any) -> Any:
    """The log of a run, or the error that ends it."""
    with _quiet() as folder:
        args, peft_config = configure(folder, settings, lora)
        try:
            made = trainer(model, args, train_dataset=make(), peft_config=peft_config, **keywords)
            made.train()
        except Exception as error:
            return error
    return made.state.log_history


def judge(what: str, theirs: Any, ours: Any) -> str:
    """The outcome, or an AssertionError."""
    if isinstance(theirs, Exception):
        if isinstance(ours, Exception):
            print(
                f"  trl: {type(theirs).__name__}: {str(theirs)[:90]!r}; here: {type(ours).__name__}: {str(ours)[:90]!r}"
            )
            assert isinstance(ours, HFMLXError) or type(ours) is type(theirs), f"raw: {ours!r} (trl: {theirs!r})"
            return "both raise"
        assert _listed(ACCEPTED, _said(what, theirs)), f"trains what trl refuses: {theirs!r}"
        return "accepted"
    if isinstance(ours, Exception):
        assert isinstance(ours, HFMLXError), f"raw, and trl trains: {ours!r}"
        assert _listed(REFUSALS, _said(what, ours)), f"needless refusal: {ours}"
        return "refused"
    assert len(theirs) == len(ours), f"trl {theirs}, here {ours}"
    for a, b in zip(theirs, ours, strict=True):
        assert list(a) == list(b), f"keys or their order: {a} {b}"
        for key, value in a.items():
            if not any(part in key for part in TIMED) and key != "total_flos" and not _close(value, b[key]):
                assert _listed(OTHERWISE, what), f"{key}: trl {a}, here {b}"
                return "otherwise"
    return "equal"


def _said(what: str, error: Exception) -> str:
    return f"{what} {type(error).__name__}: {error}"


def _listed(table: dict[str, str], text: str) -> bool:
    return any(re.search(pattern, text) for pattern in table)


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return a == b or abs(a - b) <= RELATIVE * max(abs(a), 1e-3)


def run_settings(index: int, model: str) -> str:
    settings, lora = draw_settings(f"{SEED}-settings-{index}")
    what = f"settings #{index}: {settings} {lora}"
    held_out = Dataset.from_list(rows_of("text", 3, seed=1))
    keywords = {"eval_dataset": held_out} if settings.get("eval_strategy", "no") != "no" else {}
    return run_both(what, model, settings, lora, lambda: Dataset.from_list(rows_of("text", 7)), keywords)


def run_rows(index: int, model: str) -> str:
    drawn = draw_rows(f"{SEED}-rows-{index}")
    what = f"rows #{index}: {drawn.what} {drawn.settings} {list(drawn.keywords)}"
    return run_both(what, model, drawn.settings, LORA, drawn.make, drawn.keywords)


RUNS = {"settings": run_settings, "rows": run_rows}


def run_all(name: str, numbers: range, model: str) -> Counter[str]:
    """How often each outcome was seen; a failure ends nothing, all of them are shown."""
    outcomes: Counter[str] = Counter()
    failures = []
    for index in numbers:
        try:
            outcomes[RUNS[name](index, model)] += 1
        except AssertionError as failure:
            failures.append(f"#{index}: {failure}")
    print(f"{name}: {dict(outcomes)}")
    assert not failures, f"{len(failures)} of {len(numbers)}\n" + "\n\n".join(failures)
    assert outcomes.total() == len(numbers)
    return outcomes


# What the default seed's draws end in; of another seed's, a good part trains.
SAMPLED: dict[str, dict[str, int]] = {
    "settings": {"equal": 3, "both raise": 3},
    "rows": {"equal": 2, "both raise": 3, "refused": 1},
}
OUTCOMES: dict[str, dict[str, int]] = {
    "settings": {"equal": 57, "both raise": 29, "no config": 14, "refused": 10, "accepted": 4},
    "rows": {"equal": 44, "both raise": 53, "refused": 14, "accepted": 3},
}


@pytest.mark.parametrize("name", RUNS)
def test_sample(name, model):
    outcomes = run_all(name, range(SAMPLE), model)
    assert outcomes == SAMPLED[name] or SEED != DEFAULT


@pytest.mark.wide
@pytest.mark.parametrize("name", RUNS)
def test_all(name, model):
    outcomes = run_all(name, range(SAMPLE, ALL), model)
    assert outcomes == OUTCOMES[name] or SEED != DEFAULT
    assert outcomes["equal"] >= 25
    assert outcomes["both raise"] >= 15
