"""Older names, translated or refused."""

import math
import warnings

import pytest

from hf_mlx.errors import SettingError
from hf_mlx.settings.config_tables import DPO_TABLE
from hf_mlx.settings.legacy import translate_arguments
from hf_mlx.settings.resolve import resolve_plan
from hf_mlx.settings.trainer_keywords import merge_trainer_keywords

TRANSLATED = [
    ({"evaluation_strategy": "steps"}, {"eval_strategy": "steps"}),
    ({"no_cuda": True}, {"use_cpu": True}),
    ({"per_gpu_train_batch_size": 4}, {"per_device_train_batch_size": 4}),
    ({"per_gpu_eval_batch_size": 4}, {"per_device_eval_batch_size": 4}),
    ({"push_to_hub_token": "t"}, {"hub_token": "t"}),
    ({"push_to_hub_model_id": "m"}, {"hub_model_id": "m"}),
    ({"push_to_hub_organization": "o", "push_to_hub_model_id": "m"}, {"hub_model_id": "o/m"}),
    ({"push_to_hub_organization": "o", "output_dir": "runs/m/"}, {"hub_model_id": "o/m", "output_dir": "runs/m/"}),
    ({"max_seq_length": 512}, {"max_length": 512}),
    ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
    ({"warmup_ratio": 0.0}, {"warmup_steps": 0.0}),
    ({"warmup_ratio": 0.1, "warmup_steps": 5}, {"warmup_steps": 5}),
    ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
    ({"group_by_length": False}, {}),
    ({"include_tokens_per_second": True}, {"include_num_input_tokens_seen": "all"}),
    ({"include_inputs_for_metrics": True}, {"include_for_metrics": ["inputs"]}),
    ({"dispatch_batches": False}, {"accelerator_config": {"dispatch_batches": False}}),
    ({"split_batches": True}, {"accelerator_config": {"split_batches": True}}),
    ({"adafactor": True}, {"optim": "adafactor"}),
    ({"optim": "adamw_hf"}, {"optim": "adamw_torch"}),
    ({"logging_dir": "runs"}, {}),
    ({"overwrite_output_dir": True}, {}),
    ({"save_safetensors": True}, {}),
    ({"use_mps_device": True}, {}),
    ({"fp16_backend": "auto"}, {}),
    ({"num_of_sequences": 64}, {}),
    ({"chars_per_token": 4.2}, {}),
    ({"report_to": None}, {"report_to": "all"}),
]
REFUSED = [
    {"save_safetensors": False},
    {"fp16_opt_level": "O2"},
    {"fp16_backend": "apex"},
    {"half_precision_backend": "apex"},
    {"use_ipex": True},
    {"past_index": 0},
    {"jit_mode_eval": True},
    {"torchdynamo": "inductor"},
    {"sharded_ddp": "simple"},
]


@pytest.mark.parametrize(("old", "new"), TRANSLATED)
def test_an_older_name_becomes_todays_with_one_note(old, new):
    before = dict(old)
    current, notes = translate_arguments(old)
    assert current == new
    assert old == before
    assert len(notes) == sum(name not in new or old[name] != new[name] for name in old)


def test_todays_names_pass_untouched():
    kwargs = {"eval_strategy": "steps", "learning_rate": 1e-4}
    assert translate_arguments(kwargs) == (kwargs, [])


def test_a_full_warmup_stays_a_full_warmup():
    share = translate_arguments({"warmup_ratio": 1.0})[0]["warmup_steps"]
    assert [math.ceil(share * total) for total in (1, 10, 1000, 12345)] == [1, 10, 1000, 12345]


@pytest.mark.parametrize("gone", REFUSED)
def test_a_name_that_is_gone_and_asked_for_something_is_refused(gone):
    [(name, value)] = gone.items()
    with pytest.raises(SettingError) as caught:
        translate_arguments(gone)
    assert f"{name}={value!r}" in caught.value.received
    assert caught.value.remedy.startswith("write ")


def test_an_old_and_a_new_name_that_disagree_are_refused():
    with pytest.raises(SettingError, match="eval_strategy='epoch'"):
        translate_arguments({"evaluation_strategy": "steps", "eval_strategy": "epoch"})


def test_older_trainer_keywords_mean_what_they_meant():
    keywords = {"tokenizer": "tok", "max_seq_length": 512, "packing": True, "dataset_num_proc": None}
    with pytest.warns(DeprecationWarning) as caught:
        overrides, tokenizer = merge_trainer_keywords({}, keywords)
    assert tokenizer == "tok"
    assert overrides == {"max_length": 512, "packing": True}
    said = [str(warning.message) for warning in caught]
    assert len(said) == 3
    assert any("max_seq_length= of SFTTrainer is deprecated; write SFTConfig(max_length=...)" in line for line in said)
    plan, ledger = resolve_plan({"max_length": 1024}, overrides=overrides)
    assert (plan.data.max_length, plan.data.packing) == (512, True)
    assert ledger["max_length"].value == 512


def test_a_preference_trainers_older_keywords_mean_what_they_meant():
    keywords = {"tokenizer": "tok", "beta": 0.3, "loss_type": "ipo", "max_length": 64, "label_pad_token_id": -100}
    with pytest.warns(DeprecationWarning) as caught:
        overrides, tokenizer = merge_trainer_keywords({}, keywords, "DPOTrainer")
    assert (tokenizer, len(caught)) == ("tok", 4)
    assert any("write DPOConfig(beta=...)" in str(warning.message) for warning in caught)
    plan, _ = resolve_plan({}, overrides=overrides, table=DPO_TABLE)
    assert (plan.loss.beta, plan.loss.losses, plan.data.max_length) == (0.3, (("ipo", 1.0),), 64)
    with pytest.raises(SettingError, match="max_prompt_length=32"):
        merge_trainer_keywords({}, {"max_prompt_length": 32}, "DPOTrainer")
    with pytest.raises(SettingError, match=r"beta=0\.1"):
        merge_trainer_keywords({}, {"beta": 0.1}, "Trainer")


def test_keywords_that_were_not_given_say_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert merge_trainer_keywords({"packing": True}, {"packing": None}) == ({"packing": True}, None)


@pytest.mark.parametrize(("name", "hint"), [("max_seq_len", "max_seq_length"), ("wibble", "SFTConfig")])
def test_a_keyword_that_sft_trainer_never_had_is_refused(name, hint):
    with pytest.raises(SettingError, match=name) as caught:
        merge_trainer_keywords({}, {name: 1})
    assert hint in caught.value.remedy
