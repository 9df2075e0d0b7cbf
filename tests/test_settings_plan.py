"""From settings to the frozen plan: what is resolved, and what is refused before anything is loaded."""

import contextlib
import dataclasses
import math
from types import SimpleNamespace

import pytest

from hf_mlx.errors import SettingError
from hf_mlx.settings.plan import PrecisionPlan
from hf_mlx.settings.resolve import resolve_plan
from hf_mlx.settings.tables import CLASSES


def plan_of(args=None, peft_config=None, **keywords):
    return resolve_plan(args, peft_config, **keywords)[0]


def test_a_plain_training_arguments_keeps_its_values_and_gains_those_of_sft():
    plan = plan_of(SimpleNamespace(learning_rate=5e-5, gradient_checkpointing=False, bf16=False))
    assert (plan.optim.learning_rate, plan.checkpointing.enabled, plan.model.precision.autocast) == (5e-5, False, None)
    assert (plan.data.max_length, plan.data.dataset_text_field) == (1024, "text")


def test_no_arguments_are_those_of_sft_config():
    plan = plan_of(None)
    assert (plan.optim.learning_rate, plan.checkpointing.enabled) == (2e-5, True)
    assert plan.model.precision == PrecisionPlan("float32", "bfloat16")
    assert plan.lora is None


def test_the_plan_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan_of().batch.seed = 1


@pytest.mark.parametrize(
    ("norm", "value", "mode", "threshold"),
    [
        (1.0, None, "norm", 1.0),
        (0.3, None, "norm", 0.3),
        (0, None, "none", 0.0),
        (None, None, "none", 0.0),
        (0, 0.0, "none", 0.0),
        (1.0, 0.0, "norm", 1.0),
        (0, 5.0, "value", 5.0),
        (None, 1.0, "value", 1.0),
    ],
)
def test_a_script_never_gets_a_clip_that_it_did_not_ask_for(norm, value, mode, threshold):
    clip = plan_of({"max_grad_norm": norm}, max_grad_value=value).clip
    assert (clip.mode, clip.threshold) == (mode, threshold)


@pytest.mark.parametrize(
    ("kwargs", "dtype"),
    [
        (None, "float32"),
        ({}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "auto"}, "auto"),
        ({"dtype": None}, "auto"),
    ],
)
def test_a_named_model_loads_in_float32_unless_told_otherwise(kwargs, dtype):
    assert plan_of({"model_init_kwargs": kwargs}).model.precision.dtype == dtype


def test_quantization_is_read_from_wherever_it_stands():
    bits = SimpleNamespace(load_in_4bit=True, load_in_8bit=False, quant_method="bitsandbytes")
    assert plan_of({"model_init_kwargs": {"load_in_8bit": True}}).model.quantization_bits == 8
    assert plan_of({"model_init_kwargs": {"quantization_config": bits}}).model.quantization_bits == 4
    assert plan_of(SimpleNamespace(learning_rate=1e-4), quantization_config=bits).model.quantization_bits == 4
    assert plan_of({"model_init_kwargs": {"load_in_4bit": 1}}).model.quantization_bits == 4
    assert plan_of({"model_init_kwargs": {"load_in_4bit": False}}).model.quantization_bits is None
    with pytest.raises(SettingError, match="one place"):
        plan_of({"model_init_kwargs": {"quantization_config": bits}}, quantization_config=bits)
    with pytest.raises(SettingError, match="quantisation"):
        plan_of({}, quantization_config=bits, strict=True)


def test_accumulation_may_stand_in_the_accelerator_config():
    nested = {"gradient_accumulation_kwargs": {"num_steps": 4}, "use_seedable_sampler": False}
    batch = plan_of({"accelerator_config": nested}).batch
    assert (batch.gradient_accumulation_steps, batch.seedable_sampler) == (4, False)
    with pytest.raises(SettingError, match="num_steps"):
        plan_of({"accelerator_config": nested, "gradient_accumulation_steps": 2})


def test_a_launcher_that_sets_the_precision_wins_over_the_fields():
    launched = dataclasses.make_dataclass("Config", ["bf16", "fp16"])(False, False)
    launched.mixed_precision = "bf16"  # an attribute that TrainingArguments sets, not a field
    assert plan_of(launched).model.precision.autocast == "bfloat16"
    launched.mixed_precision = "fp16"
    with pytest.raises(SettingError, match="fp16=True"):
        plan_of(launched)


def test_optimizer_options_are_parsed_to_numbers():
    optim = plan_of({"optim": "sgd", "optim_args": "momentum=0.9, nesterov=True"}).optim
    assert (optim.name, dict(optim.options)) == ("sgd", {"momentum": 0.9, "nesterov": True})


@pytest.mark.parametrize(("warmup", "planned"), [(0, 0), (0.1, 0.1), (1.0, 1), (10, 10), (10.7, 10)])
def test_warmup_is_steps_from_one_on_and_a_share_below(warmup, planned):
    assert plan_of({"warmup_steps": warmup}).schedule.warmup_steps == planned


def test_a_lora_config_becomes_plain_values():
    lora = plan_of(
        {},
        {
            "r": 16,
            "lora_alpha": 32,
            "target_modules": {"v_proj", "q_proj"},
            "layers_to_transform": 3,
            "layers_pattern": "layers",
            "modules_to_save": ["lm_head"],
            "rank_pattern": {"q_proj": 4},
            "init_lora_weights": "gaussian",
        },
    ).lora
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (16, 32, ("q_proj", "v_proj"))
    assert (lora.layers_to_transform, lora.layers_pattern, lora.modules_to_save) == ((3,), ("layers",), ("lm_head",))
    assert (lora.rank_pattern, lora.init_lora_weights) == ({"q_proj": 4}, "gaussian")


@pytest.mark.parametrize(("asked", "planned"), [(None, None), (-1, None), (16, 16)])
def test_the_last_layers_are_counted_as_mlx_lm_counts_them(asked, planned):
    assert plan_of(finetune_last_n_layers=asked).finetune_last_n_layers == planned


nan, inf = math.nan, math.inf
# (arguments, LoraConfig fields, keywords of resolve_plan), what the error names, and the line it suggests
BAD_INPUT = [
    (({"learning_rate": nan},), "learning_rate=nan", "learning_rate="),
    (({"learning_rate": -1e-4},), "learning_rate=-0.0001", "learning_rate="),
    (({"learning_rate": inf},), "learning_rate=inf", "learning_rate="),
    (({"learning_rate": "2e-4"},), "learning_rate='2e-4'", "learning_rate="),
    (({"learning_rate": True},), "learning_rate=True", "learning_rate="),
    (({"learning_rate": None},), "learning_rate=None", "learning_rate="),
    (({"max_grad_norm": nan},), "max_grad_norm=nan", "max_grad_norm="),
    (({"max_grad_norm": -1.0},), "max_grad_norm=-1.0", "max_grad_norm=0"),
    (({"max_grad_norm": "1.0"},), "max_grad_norm='1.0'", "max_grad_norm="),
    (({"max_grad_norm": True},), "max_grad_norm=True", "max_grad_norm="),
    (({}, None, {"max_grad_value": -5.0}), "max_grad_value=-5.0", "max_grad_value="),
    (({"per_device_train_batch_size": 0},), "per_device_train_batch_size=0", "per_device_train_batch_size=1"),
    (({"per_device_train_batch_size": 2.5},), "per_device_train_batch_size=2.5", "per_device_train_batch_size=1"),
    (({"per_device_eval_batch_size": -8},), "per_device_eval_batch_size=-8", "per_device_eval_batch_size=1"),
    (({"gradient_accumulation_steps": 0},), "gradient_accumulation_steps=0", "gradient_accumulation_steps=1"),
    (({"num_train_epochs": 0},), "num_train_epochs=0", "num_train_epochs=3.0"),
    (({"num_train_epochs": -1.0},), "num_train_epochs=-1.0", "max_steps="),
    (({"num_train_epochs": nan},), "num_train_epochs=nan", "num_train_epochs="),
    (({"max_steps": 0},), "max_steps=0", "max_steps=1"),
    (({"max_steps": 1.5},), "max_steps=1.5", "max_steps="),
    (({"warmup_steps": -1},), "warmup_steps=-1", "warmup_steps="),
    (({"warmup_steps": nan},), "warmup_steps=nan", "warmup_steps="),
    (({"adam_beta1": 1.0},), "adam_beta1=1.0", "adam_beta1=0.9"),
    (({"adam_beta2": -0.1},), "adam_beta2=-0.1", "adam_beta2=0.999"),
    (({"adam_epsilon": -1e-8},), "adam_epsilon=-1e-08", "adam_epsilon="),
    (({"weight_decay": nan},), "weight_decay=nan", "weight_decay="),
    (({"weight_decay": -0.01},), "weight_decay=-0.01", "weight_decay="),
    (({"label_smoothing_factor": 1.0},), "label_smoothing_factor=1.0", "label_smoothing_factor="),
    (({"label_smoothing_factor": -0.1},), "label_smoothing_factor=-0.1", "label_smoothing_factor="),
    (({"neftune_noise_alpha": -5},), "neftune_noise_alpha=-5", "neftune_noise_alpha="),
    (({"max_length": 0},), "max_length=0", "max_length=1024"),
    (({"max_length": 1},), "max_length=1", "max_length=1024"),
    (({"max_length": "1024"},), "max_length='1024'", "max_length=1024"),
    (({"max_length": None, "packing": True},), "max_length=None", "max_length=1024"),
    (({"padding_free": True},), "padding_free=True", "packing=True"),
    (({"packing": "False"},), "packing='False'", "packing=False"),
    (({"pad_to_multiple_of": 0},), "pad_to_multiple_of=0", "pad_to_multiple_of=8"),
    (({"seed": -1},), "seed=-1", "seed=42"),
    (({"seed": 2**32},), "seed=4294967296", "seed=42"),
    (({"logging_steps": 0},), "logging_steps=0", "logging_steps="),
    (({"logging_steps": 2.5},), "logging_steps=2.5", "logging_steps=3"),
    (({"eval_strategy": "steps", "eval_steps": nan},), "eval_steps=nan", "eval_steps="),
    (({"load_best_model_at_end": True},), "load_best_model_at_end=True", "eval_strategy='steps'"),
    (({"save_strategy": "best"},), "save_strategy='best'", "metric_for_best_model='loss'"),
    (({"torch_empty_cache_steps": 0},), "torch_empty_cache_steps=0", "torch_empty_cache_steps=10"),
    (({"dataset_num_proc": 0},), "dataset_num_proc=0", "dataset_num_proc="),
    (({"lr_scheduler_type": "cosin"},), "lr_scheduler_type='cosin'", 'lr_scheduler_type="linear"'),
    (({"lr_scheduler_type": "reduce_lr_on_plateau"},), "reduce_lr_on_plateau", 'eval_strategy="epoch"'),
    (
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-8},),
        "learning_rate=1e-08",
        'lr_scheduler_kwargs={"lr_end"',
    ),
    (({"lr_scheduler_kwargs": {"num_cycle": 2}},), "lr_scheduler_kwargs={'num_cycle': 2}", "lr_scheduler_kwargs=None"),
    (({"lr_scheduler_type": "warmup_stable_decay"},), "lr_scheduler_kwargs={}", "num_decay_steps"),
    (({"lr_scheduler_type": "cosine_with_min_lr"},), "lr_scheduler_kwargs={}", "min_lr_rate"),
    (
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": nan}},),
        "'num_cycles': nan",
        "num_cycles",
    ),
    (({"optim": "adamw_hf"},), "optim='adamw_hf'", 'optim="adamw_torch"'),
    (({"optim": "muon"},), "optim='muon'", 'optim="adamw_torch"'),
    (({"optim_args": "beta1=0.8"},), "optim_args='beta1=0.8'", "adam_beta1="),
    (({"optim": "sgd", "optim_args": "momentum"},), "optim_args='momentum'", "momentum=0.9"),
    (({"optim": "sgd", "optim_args": "weight_decay=0.1"},), "weight_decay=0.1", "weight_decay=0.01"),
    (({"optim": "sgd", "optim_args": "momentum=fast"},), "momentum=fast", "momentum=0.9"),
    (({"optim": "sgd", "optim_args": "momentum=-0.9"},), "momentum=-0.9", "momentum=0.9"),
    (({"bf16": "False"},), "bf16='False'", "bf16=False"),
    (({"dataset_text_field": ["a", "b"]},), "dataset_text_field=['a', 'b']", 'dataset_text_field="text"'),
    (({"learning_rate": 10**400},), "learning_rate=1000", "learning_rate="),
    (({"label_names": 3},), "label_names=3", 'label_names=["labels"]'),
    (({"optim": "sgd", "optim_args": "nesterov=True"},), "nesterov=True", "momentum=0.9,nesterov=True"),
    (({}, {"r": 0}), "r=0", "r=8"),
    (({}, {"r": -8}), "r=-8", "r=8"),
    (({}, {"r": "8"}), "r='8'", "r=8"),
    (({}, {"lora_alpha": 0}), "lora_alpha=0", "lora_alpha=16"),
    (({}, {"lora_alpha": nan}), "lora_alpha=nan", "lora_alpha=16"),
    (({}, {"lora_dropout": 1.0}), "lora_dropout=1.0", "lora_dropout=0.05"),
    (({}, {"lora_dropout": -0.1}), "lora_dropout=-0.1", "lora_dropout=0.05"),
    (({}, {"trainable_token_indices": [5, -1]}), "trainable_token_indices=-1", "trainable_token_indices=["),
    (({}, {"trainable_token_indices": "<tool>"}), "trainable_token_indices='<tool>'", "trainable_token_indices=["),
    (({}, {"rank_pattern": {"q_proj": 0}}), "rank_pattern['q_proj']=0", "rank_pattern="),
    (({}, {"rank_pattern": [4]}), "rank_pattern=[4]", "rank_pattern="),
    (({}, {"alpha_pattern": {"q_proj": "x"}}), "alpha_pattern['q_proj']='x'", "alpha_pattern="),
    (({}, {"target_modules": []}), "target_modules=[]", "all-linear"),
    (({}, {"target_modules": 7}), "target_modules=7", "target_modules="),
    (({}, {"layers_to_transform": [-1]}), "layers_to_transform=-1", "layers_to_transform="),
    (({}, {"target_modules": ".*q_proj", "layers_to_transform": 1}), "layers_to_transform=1", "target_modules="),
    (({}, None, {"finetune_last_n_layers": 0}), "finetune_last_n_layers=0", "finetune_last_n_layers=16"),
    (
        ({}, {"layers_to_transform": [0]}, {"finetune_last_n_layers": 4}),
        "finetune_last_n_layers=4",
        "layers_to_transform",
    ),
]


@pytest.mark.parametrize(("request_", "received", "remedy"), BAD_INPUT)
def test_bad_input_is_named_with_the_line_to_write(request_, received, remedy):
    args, peft_config, keywords = (*request_, None, None)[:3]
    with pytest.raises(SettingError) as caught:
        resolve_plan(args, peft_config, **(keywords or {}))
    assert received in caught.value.received + caught.value.required
    assert caught.value.required
    assert remedy in caught.value.remedy


def test_none_switches_off_what_has_no_third_meaning():
    fields = ("packing", "shuffle_dataset", "assistant_only_loss", "auto_find_batch_size")
    plan = resolve_plan(dict.fromkeys(fields), {"use_dora": None})[0]
    assert not any((plan.data.packing, plan.data.shuffle_dataset, plan.data.assistant_only_loss))
    assert plan.auto_find_batch_size is False
    assert plan.lora is not None and plan.lora.use_dora is False


def test_a_refused_field_stops_the_run_before_a_bad_number_is_looked_at():
    with pytest.raises(SettingError, match="fp16"):
        resolve_plan({"fp16": True, "learning_rate": nan})


def test_no_value_whatever_gets_past_as_another_kind_of_error():
    garbage = [None, "x", "", -1, 0, 1, 2.5, nan, inf, [], ["a"], {}, {"a": 1}, object(), True, False, b"x", {1, "a"}]
    seen = 0
    for rules, where in ((CLASSES["TrainingArguments"] + CLASSES["SFTConfig"], 0), (CLASSES["LoraConfig"], 1)):
        for rule in rules:
            for value in garbage:
                request = ({}, {rule.field: value}) if where else ({rule.field: value}, None)
                with contextlib.suppress(SettingError):
                    assert resolve_plan(*request)[1][rule.field].shown
                seen += 1
    assert seen == 177 * len(garbage)
