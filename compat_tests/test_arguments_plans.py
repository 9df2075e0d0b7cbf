"""Live configurations into plans: what was written is what the plan holds."""

import dataclasses
import random

import pytest
import torch
from peft import LoraConfig, TaskType
from transformers import BitsAndBytesConfig, TrainingArguments
from trl import SFTConfig

from hf_mlx.errors import SettingError
from hf_mlx.settings.resolve import resolve_plan

pytestmark = pytest.mark.filterwarnings("ignore")

SEED, DRAWS = 20_260, 60
# Plan field -> the field of the configuration it comes from, where the value passes unchanged.
BATCH = {
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "num_train_epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "drop_last": "dataloader_drop_last",
    "seed": "seed",
    "data_seed": "data_seed",
    "sampling": "train_sampling_strategy",
}
OPTIM = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
DATA = (
    "dataset_text_field",
    "max_length",
    "truncation_mode",
    "packing",
    "packing_strategy",
    "eval_packing",
    "padding_free",
    "pad_to_multiple_of",
    "completion_only_loss",
    "assistant_only_loss",
    "shuffle_dataset",
)
LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "lora_bias", "init_lora_weights")
SCHEDULES = {
    "linear": None,
    "cosine": {"num_cycles": 0.5},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"lr_end": 1e-6, "power": 2.0},
    "constant_with_warmup": None,
    "inverse_sqrt": {"timescale": 100},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-6, "warmup_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 5, "decay_type": "1-sqrt"},
}


def assert_carried(args, plan):
    for planned, field in BATCH.items():
        assert getattr(plan.batch, planned) == getattr(args, field), field
    for field in OPTIM:
        assert getattr(plan.optim, field) == getattr(args, field), field
    assert plan.schedule.name == args.lr_scheduler_type.value
    assert plan.schedule.warmup_steps == args.warmup_steps
    assert dict(plan.schedule.options) == (args.lr_scheduler_kwargs or {})
    assert plan.loss.label_smoothing_factor == args.label_smoothing_factor
    assert plan.loss.neftune_noise_alpha == args.neftune_noise_alpha
    assert plan.clip.threshold == args.max_grad_norm
    assert plan.clip.mode == ("norm" if args.max_grad_norm else "none")
    assert plan.checkpointing.enabled == args.gradient_checkpointing
    assert plan.model.precision.autocast == ("bfloat16" if args.bf16 else None)


@pytest.mark.parametrize("make", [TrainingArguments, SFTConfig])
def test_the_defaults_of_hf_survive_into_the_plan(tmp_path, make):
    args = make(output_dir=str(tmp_path), use_cpu=True)
    plan, _ = resolve_plan(args)
    assert_carried(args, plan)
    sft = SFTConfig(output_dir=str(tmp_path), use_cpu=True)
    for field in DATA:
        assert getattr(plan.data, field) == getattr(sft, field), field
    expected = (5e-5, None, False) if make is TrainingArguments else (2e-5, "bfloat16", True)
    assert (plan.optim.learning_rate, plan.model.precision.autocast, plan.checkpointing.enabled) == expected


def test_the_defaults_of_lora_config_survive_into_the_plan():
    lora = resolve_plan(None, LoraConfig())[0].lora
    for field in LORA:
        assert getattr(lora, field) == getattr(LoraConfig(), field), field


def draw_arguments(rng, folder):
    schedule = rng.choice(list(SCHEDULES))
    packing = rng.random() < 0.3
    kwargs = {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": rng.random() < 0.5,
        "per_device_train_batch_size": rng.randint(1, 16),
        "per_device_eval_batch_size": rng.randint(1, 16),
        "gradient_accumulation_steps": rng.randint(1, 8),
        "num_train_epochs": rng.choice([0.5, 1, 3.0]),
        "max_steps": rng.choice([-1, 1, 100]),
        "dataloader_drop_last": rng.random() < 0.5,
        "seed": rng.randrange(2**32),
        "data_seed": rng.choice([None, 0, 7]),
        "train_sampling_strategy": rng.choice(["random", "sequential", "group_by_length"]),
        "learning_rate": 10 ** rng.uniform(-5, -2),
        "weight_decay": rng.choice([0.0, 0.01, 0.1]),
        "adam_beta1": rng.uniform(0.5, 0.95),
        "adam_beta2": rng.uniform(0.9, 0.9999),
        "adam_epsilon": 10 ** rng.uniform(-9, -6),
        "optim": rng.choice(["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]),
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": SCHEDULES[schedule],
        "warmup_steps": rng.choice([0, 0.1, 3, 10]),
        "max_grad_norm": rng.choice([0, 0.3, 1.0]),
        "label_smoothing_factor": rng.choice([0.0, 0.1]),
        "neftune_noise_alpha": rng.choice([None, 5.0]),
        "activation_checkpointing": rng.random() < 0.5,
        "eval_strategy": rng.choice(["no", "steps", "epoch"]),
        "save_strategy": rng.choice(["no", "steps", "epoch", "best"]),
        "metric_for_best_model": "loss",
        "logging_steps": rng.choice([1, 10, 0.1]),
        "report_to": rng.choice(["none", ["none"]]),
    }
    if rng.random() < 0.3:
        return TrainingArguments(**kwargs)
    return SFTConfig(
        **kwargs,
        max_length=rng.choice([64, 1024] if packing else [64, None]),
        packing=packing,
        packing_strategy=rng.choice(["bfd", "bfd_split", "wrapped"]),
        truncation_mode=rng.choice(["keep_start", "keep_end"]),
        completion_only_loss=rng.choice([None, True, False]),
        pad_to_multiple_of=rng.choice([None, 8]),
        loss_type="nll",
    )


def draw_lora(rng):
    if rng.random() < 0.3:
        return None
    return LoraConfig(
        r=rng.randint(1, 64),
        lora_alpha=rng.randint(1, 64),
        lora_dropout=rng.choice([0.0, 0.1]),
        target_modules=rng.choice([None, "all-linear", ["q_proj", "v_proj"], r".*\.(q|v)_proj"]),
        rank_pattern=rng.choice([{}, {"q_proj": 4}]),
        use_rslora=rng.random() < 0.5,
        use_dora=rng.random() < 0.3,
        init_lora_weights=rng.choice([True, False, "gaussian"]),
        bias=rng.choice(["none", "all", "lora_only"]),
        task_type=rng.choice([None, "CAUSAL_LM", TaskType.CAUSAL_LM]),
    )


def test_random_valid_configurations_resolve_to_what_was_written(tmp_path):
    rng, seen = random.Random(SEED), 0
    for _ in range(DRAWS):
        args, peft_config = draw_arguments(rng, str(tmp_path)), draw_lora(rng)
        plan, ledger = resolve_plan(args, peft_config, strict=True)
        assert_carried(args, plan)
        assert str(ledger)
        if isinstance(args, SFTConfig):
            assert all(getattr(plan.data, field) == getattr(args, field) for field in DATA)
        assert (plan.lora is None) == (peft_config is None)
        if peft_config is not None:
            assert all(getattr(plan.lora, field) == getattr(peft_config, field) for field in LORA)
            targets = peft_config.target_modules
            assert plan.lora.target_modules == (tuple(sorted(targets)) if isinstance(targets, set) else targets)
        seen += 1
    assert seen == DRAWS


@pytest.mark.parametrize(
    ("dtype", "planned"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16"), ("auto", "auto")]
)
def test_a_torch_dtype_is_read_by_its_name(tmp_path, dtype, planned):
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, model_init_kwargs={"dtype": dtype})
    assert resolve_plan(args)[0].model.precision.dtype == planned


@dataclasses.dataclass
class ScriptConfig(SFTConfig):
    """What scripts do that parse everything into one class."""

    model_name: str = "tiny"
    fp16: bool = True


def test_a_script_may_add_fields_but_an_overridden_default_still_counts(tmp_path):
    config = ScriptConfig(output_dir=str(tmp_path), model_name="other", fp16=False, bf16=False)
    assert resolve_plan(config)[1]["model_name"].verdict == "NO-OP"
    with pytest.raises(SettingError, match="fp16=True"):
        resolve_plan(ScriptConfig(output_dir=str(tmp_path), bf16=False))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bitsandbytes_config_is_read_by_its_width(tmp_path, bits):
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_compute_dtype=torch.bfloat16)
    args = SFTConfig(output_dir=str(tmp_path), bf16=False)
    nested = SFTConfig(output_dir=str(tmp_path), bf16=False, model_init_kwargs={"quantization_config": config})
    for plan, ledger in (resolve_plan(args, quantization_config=config), resolve_plan(nested)):
        assert plan.model.quantization_bits == bits
        assert [entry.field for entry in ledger.adapted(changes_numbers=True)] == ["model_init_kwargs"]


def test_an_accelerator_config_object_is_read_as_its_dict(tmp_path):
    args = SFTConfig(
        output_dir=str(tmp_path),
        bf16=False,
        accelerator_config={"use_seedable_sampler": False, "gradient_accumulation_kwargs": {"num_steps": 3}},
    )
    batch = resolve_plan(args)[0].batch
    assert (batch.seedable_sampler, batch.gradient_accumulation_steps) == (False, 3)
