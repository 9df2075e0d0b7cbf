"""The tables against the live dataclasses: a field that appears, goes or changes its default fails here."""

import dataclasses
import inspect
import subprocess
import sys

import pytest
from peft import LoraConfig
from transformers import SchedulerType, Trainer, TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR
from transformers.training_args import OptimizerNames
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from hf_mlx.settings import schedules
from hf_mlx.settings.dpo_config import DPO_CONFIG, DPO_DEFAULTS
from hf_mlx.settings.ledger import explain
from hf_mlx.settings.legacy import RENAMED, translate_arguments
from hf_mlx.settings.lora_config import LORA_CONFIG
from hf_mlx.settings.optimizers import OPTIONS, parse_optim_args
from hf_mlx.settings.reward_config import REWARD_CONFIG, REWARD_DEFAULTS
from hf_mlx.settings.sft_config import SFT_CONFIG, SFT_DEFAULTS
from hf_mlx.settings.trainer_keywords import TRAINER_KEYWORDS
from hf_mlx.settings.training_arguments import TRAINING_ARGUMENTS

pytestmark = pytest.mark.filterwarnings("ignore")


def live_defaults(cls):
    """Field name -> default, with factories called and nested configurations as a dict of what they change: {}."""
    found = {}
    for field in dataclasses.fields(cls):
        made = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if made else field.default
        found[field.name] = {} if dataclasses.is_dataclass(default) else default
    return found


BASE = live_defaults(TrainingArguments)
SFT_ONLY = {name: default for name, default in live_defaults(SFTConfig).items() if name not in BASE}
LIVE = [
    ("TrainingArguments", BASE, TRAINING_ARGUMENTS, 114),
    ("SFTConfig", SFT_ONLY, SFT_CONFIG, 21),
    ("LoraConfig", live_defaults(LoraConfig), LORA_CONFIG, 42),
]


@pytest.mark.parametrize(("name", "live", "rules", "count"), LIVE)
def test_every_field_has_exactly_one_rule(name, live, rules, count):
    listed = [rule.field for rule in rules]
    assert len(listed) == len(set(listed))
    added, gone = set(live) - set(listed), set(listed) - set(live)
    assert not added, f"{name} gained {len(added)} field(s) without a verdict: {sorted(added)}"
    assert not gone, f"{name} lost {len(gone)} field(s) that have a verdict: {sorted(gone)}"
    assert len(listed) == count


@pytest.mark.parametrize(("name", "live", "rules", "count"), LIVE)
def test_every_default_is_upstreams(name, live, rules, count):
    differ = {rule.field: (rule.default, live[rule.field]) for rule in rules if rule.default != live[rule.field]}
    assert not differ, f"{name}: (table, upstream) {differ}"


PAIRED = [(DPOConfig, DPO_CONFIG, DPO_DEFAULTS), (RewardConfig, REWARD_CONFIG, REWARD_DEFAULTS)]


@pytest.mark.parametrize(("config", "rules", "defaults"), PAIRED)
def test_configurations_of_pairs(config, rules, defaults, tmp_path):
    live, listed = live_defaults(config), {rule.field: rule.default for rule in rules}
    own = {name for name in live if name not in BASE}
    assert own <= listed.keys() <= live.keys() and len(own) >= 11
    assert listed == {name: live[name] for name in listed}
    assert {name: live[name] for name in BASE if live[name] != BASE[name]} == dict(defaults)
    ledger = explain(config(output_dir=str(tmp_path), bf16=False))
    ledger.raise_refused(strict=True)
    assert len(ledger) == len(live)


def test_the_defaults_that_sft_config_overrides_are_all_known():
    sft = live_defaults(SFTConfig)
    assert {name: sft[name] for name in BASE if sft[name] != BASE[name]} == dict(SFT_DEFAULTS)


def test_a_default_object_is_never_refused(tmp_path):
    made = [
        (TrainingArguments(output_dir=str(tmp_path)), None, 114),
        (SFTConfig(output_dir=str(tmp_path), bf16=False), None, 135),
        (SFTConfig(output_dir=str(tmp_path), use_cpu=True), LoraConfig(), 177),
    ]
    for args, peft_config, count in made:
        ledger = explain(args, peft_config)
        ledger.raise_refused(strict=True)
        assert len(ledger) == count


def test_every_optimizer_name_of_transformers_has_a_ruling():
    verdicts = {name.value: str(explain({"optim": name.value})["optim"].verdict) for name in OptimizerNames}
    assert len(verdicts) >= 41
    assert {name for name, verdict in verdicts.items() if verdict == "HONOUR"} == {
        "adamw_torch",
        "adamw_torch_fused",
        "sgd",
        "adagrad",
        "rmsprop",
        "adafactor",
        "lion_32bit",
    }
    assert {"adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"} <= {
        name for name, verdict in verdicts.items() if verdict == "ADAPT"
    }


@pytest.mark.parametrize("name", [name.value for name in SchedulerType])
def test_every_schedule_takes_the_options_that_its_function_takes(name):
    function = {"greedy": GreedyLR}.get(name, TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)])
    if name == "reduce_lr_on_plateau":
        from torch.optim.lr_scheduler import ReduceLROnPlateau as function
    common = {"self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    assert set(schedules.OPTIONS[name]) == set(inspect.signature(function).parameters) - common
    assert set(schedules.OPTIONS) == {name.value for name in SchedulerType}


@pytest.mark.parametrize(
    ("optim", "text"),
    [
        ("sgd", "momentum=0.9,nesterov=true"),
        ("sgd", "momentum=0.5, dampening=0.1, nesterov=False"),
        ("sgd", "momentum=0.0"),
        ("adagrad", "lr_decay=0.01,eps=1e-6"),
        ("rmsprop", "momentum=0.9,alpha=0.95,eps=1e-7,centered=1"),
    ],
)
def test_optim_args_reach_torch_as_they_reach_the_plan(tmp_path, optim, text):
    args = TrainingArguments(output_dir=str(tmp_path), optim=optim, optim_args=text)
    upstream = Trainer.get_optimizer_cls_and_kwargs(args)[1]
    parsed = parse_optim_args(text, optim)
    assert parsed == {key: upstream[key] for key in parsed}
    assert set(parsed) == set(upstream) - {"lr"}
    assert set(parsed) <= set(OPTIONS[optim])


def test_older_names_are_gone_upstream_and_their_successors_exist():
    live = set(BASE) | set(SFT_ONLY)
    assert len(RENAMED) >= 8
    assert not live & set(RENAMED)
    assert set(RENAMED.values()) <= live
    fields = {"SFTTrainer": live, "Trainer": set(BASE)}
    fields |= {"DPOTrainer": set(live_defaults(DPOConfig)), "RewardTrainer": set(live_defaults(RewardConfig))}
    trainers = {"SFTTrainer": SFTTrainer, "DPOTrainer": DPOTrainer, "RewardTrainer": RewardTrainer, "Trainer": Trainer}
    assert TRAINER_KEYWORDS.keys() == fields.keys()
    for trainer, known in TRAINER_KEYWORDS.items():
        assert set(known.values()) - {"processing_class"} <= fields[trainer]
        assert known.keys().isdisjoint(inspect.signature(trainers[trainer]).parameters)


def test_translated_arguments_construct_todays_config(tmp_path):
    old = {
        "output_dir": str(tmp_path),
        "evaluation_strategy": "steps",
        "eval_steps": 5,
        "warmup_ratio": 0.1,
        "group_by_length": True,
        "no_cuda": True,
        "include_tokens_per_second": True,
        "dispatch_batches": False,
        "max_seq_length": 256,
        "overwrite_output_dir": True,
        "save_safetensors": True,
        "optim": "adamw_hf",
        "logging_dir": "runs",
    }
    with pytest.raises(TypeError):
        SFTConfig(**old)
    current, notes = translate_arguments(old)
    config = SFTConfig(**current)
    assert (config.eval_strategy, config.warmup_steps, config.max_length) == ("steps", 0.1, 256)
    assert (config.train_sampling_strategy, config.use_cpu) == ("group_by_length", True)
    assert len(notes) == 11
    explain(config).raise_refused(strict=True)


def test_a_configuration_is_read_where_torch_is_absent(tmp_path):
    code = (
        "import sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "sys.modules['torch'] = None\n"
        "from transformers import TrainingArguments\n"
        "from hf_mlx.settings.resolve import resolve_plan\n"
        f"plan, ledger = resolve_plan(TrainingArguments(output_dir={str(tmp_path)!r}, learning_rate=1e-3))\n"
        "print(plan.optim.learning_rate, len(ledger))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["0.001", "114"]
