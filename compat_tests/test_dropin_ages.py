"""Every entry of the tables of older names, as a script of its time writes it, under ``hf-mlx run``."""

import json
import re

import pytest
from dropin_models import make_tokenizer
from forked_scripts import HF_MLX_RUN, run_forked

from hf_mlx.errors import SettingError
from hf_mlx.settings.legacy import OLDER_FIELDS, Gone, Renamed, Rewritten, translate_arguments
from hf_mlx.settings.trainer_keywords import TRAINER_KEYWORDS, merge_trainer_keywords
from hf_mlx.stand_in.older import OLDER

# What a script of its time gave a field; for a field without a successor one of the values that asked for nothing.
VALUES = {
    "evaluation_strategy": "epoch", "no_cuda": True, "push_to_hub_token": "t", "push_to_hub_model_id": "m",
    "per_gpu_train_batch_size": 3, "per_gpu_eval_batch_size": 5, "max_seq_length": 77, "use_liger": True,
    "warmup_ratio": 0.25, "group_by_length": True, "include_tokens_per_second": True,
    "include_inputs_for_metrics": True, "push_to_hub_organization": "o", "logging_dir": "logs", "adafactor": True,
    "dispatch_batches": False, "split_batches": True, "rpo_alpha": 0.5, "overwrite_output_dir": True,
    "use_mps_device": False, "dataset_batch_size": 500, "num_of_sequences": 64, "chars_per_token": 2.5,
    "infinite": True, "use_logits_to_keep": True, "use_num_logits_to_keep": True, "use_liger_loss": True,
}  # fmt: skip
# The field of today that has the meaning, and its value; a field that is renamed keeps the value.
MEANINGS = {
    "warmup_ratio": ("warmup_steps", 0.25),
    "group_by_length": ("train_sampling_strategy", "group_by_length"),
    "include_tokens_per_second": ("include_num_input_tokens_seen", "all"),
    "include_inputs_for_metrics": ("include_for_metrics", ["inputs"]),
    "push_to_hub_organization": ("hub_model_id", "o/unused"),
    "adafactor": ("optim", "adafactor"),
    "dispatch_batches": ("accelerator_config", {"dispatch_batches": False}),
    "split_batches": ("accelerator_config", {"split_batches": True}),
    "rpo_alpha": ("loss_weights", [1.0, 0.5]),
}
# What asks for something that no release of today has.
ASKING = {
    "save_safetensors": False, "fp16_opt_level": "O2", "fp16_backend": "apex", "half_precision_backend": "apex",
    "use_ipex": True, "past_index": 0, "jit_mode_eval": True, "torchdynamo": "inductor", "sharded_ddp": "simple",
    "fsdp_min_num_params": 1, "fsdp_transformer_layer_cls_to_wrap": "Layer", "xpu_backend": "ccl", "tpu_num_cores": 8,
    "tpu_metrics_debug": True, "mp_parameters": "x", "ray_scope": "all", "use_legacy_prediction_loop": True,
    "reference_free": True, "max_prompt_length": 8, "max_completion_length": 8, "max_target_length": 8,
    "label_pad_token_id": 0, "padding_value": 0, "is_encoder_decoder": True, "generate_during_eval": True,
    "tp_size": 2,
    "model_adapter_name": "a", "ref_adapter_name": "b", "force_use_ref_model": True, "base_model_attribute_name": "m",
    "ref_model_init_kwargs": {"dtype": "float32"}, "tools": [1],
}  # fmt: skip
# Fields that only DPOConfig had.
PREFERENCE = {
    name
    for name, field in OLDER_FIELDS.items()
    if field.left in ("trl 0.14", "trl 0.15", "trl 0.17", "trl 0.26", "trl 0.28", "trl 0.29")
}

SCRIPT = """
import importlib, json, os, sys
from enum import Enum

cases, names = json.load(open({cases!r}))
found, imported = {{}}, {{}}
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig

CLASSES = {{"TrainingArguments": TrainingArguments, "SFTConfig": SFTConfig, "DPOConfig": DPOConfig}}
for name, (cls, value, now) in cases.items():
    args = CLASSES[cls]("unused", **({{"use_cpu": True}} if name != "no_cuda" else {{}}), **{{name: value}})
    today = getattr(args, now) if now else None
    if hasattr(today, "dispatch_batches"):
        today = {{key: getattr(today, key) for key in ("dispatch_batches", "split_batches") if key == name}}
    read = getattr(args, name)
    found[name] = [getattr(item, "value", item) for item in (today, read)]
for name, home in names:
    imported[f"{{home}}.{{name}}"] = getattr(__import__(home, fromlist=[name]), name) is not None
print(json.dumps([found, imported]))
"""


def owner(name):
    if OLDER_FIELDS[name].left.startswith("transformers"):
        return "TrainingArguments"
    return "DPOConfig" if name in PREFERENCE else "SFTConfig"


def given(name):
    field = OLDER_FIELDS[name]
    return field.harmless[0] if isinstance(field, Gone) and field.harmless is not None else VALUES[name]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("ages")
    cases = {}
    for name, field in OLDER_FIELDS.items():
        now = field.now if isinstance(field, Renamed) else MEANINGS.get(name, (None,))[0]
        cases[name] = (owner(name), given(name), now)
    names = [(name, home) for name, older in OLDER.items() for home in older.homes]
    (root / "cases.json").write_text(json.dumps([cases, names]))
    (root / "script.py").write_text(SCRIPT.format(cases=str(root / "cases.json")))
    done = run_forked([*HF_MLX_RUN, root / "script.py"])
    fields, imported = json.loads(done.stdout)
    return fields, imported, done.stderr


@pytest.mark.parametrize("name", OLDER_FIELDS)
def test_a_field_means_what_it_meant_and_reads_as_it_was_written(name, run):
    today, read = run[0][name]
    if isinstance(OLDER_FIELDS[name], Renamed):
        assert today == given(name)
    elif name in MEANINGS:
        assert today == MEANINGS[name][1]
    assert read == given(name)
    assert sum(re.match(rf"hf-mlx run: {name}\b", line) is not None for line in run[2].splitlines()) == 1


@pytest.mark.parametrize(("name", "home"), [(name, home) for name, older in OLDER.items() for home in older.homes])
def test_a_name_is_imported_from_where_it_was(name, home, run):
    assert run[1][f"{home}.{name}"]
    said = f"hf-mlx run: {home}.{name} left in {OLDER[name].left}; its older meaning is kept"
    assert sum(line == said for line in run[2].splitlines()) == 1


@pytest.mark.parametrize("name", ASKING)
def test_what_no_release_of_today_has_is_refused_with_the_release_it_left_in(name):
    with pytest.raises(SettingError) as caught:
        translate_arguments({name: ASKING[name]})
    assert f"{name}={ASKING[name]!r}" in caught.value.received
    assert OLDER_FIELDS[name].left in caught.value.required


def test_every_entry_was_seen():
    gone = {name for name, field in OLDER_FIELDS.items() if isinstance(field, Gone) and field.harmless is not None}
    assert gone == set(ASKING)
    rewritten = {name for name, field in OLDER_FIELDS.items() if isinstance(field, Rewritten)}
    assert rewritten == {*MEANINGS, "logging_dir"}
    assert len(OLDER_FIELDS) >= 55 and len(OLDER) >= 30


KEYWORDS = [(trainer, name) for trainer, row in TRAINER_KEYWORDS.items() for name in row]


@pytest.mark.parametrize(("trainer", "name"), KEYWORDS)
def test_a_keyword_of_older_trainers_is_a_field_of_today(trainer, name):
    with pytest.warns(DeprecationWarning, match=name):
        fields, tokenizer = merge_trainer_keywords({}, {name: 7}, trainer)
    assert (tokenizer == 7 and fields == {}) or fields == {TRAINER_KEYWORDS[trainer][name]: 7}


def test_tokens_and_files_of_their_time(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "lines.txt").write_text("What is 3 plus 4?\n\nIt is 7.\nWhat is it?\n")
    script = tmp_path / "script.py"
    script.write_text(BEHAVIOURS.format(model=str(tmp_path / "model"), lines=str(tmp_path / "lines.txt")))
    done = run_forked([*HF_MLX_RUN, script])
    assert done.stdout.splitlines() == ["blocks [8, 8]", "lines 3 5", "token kept", "texts a: b", "written yes"]


BEHAVIOURS = """
from huggingface_hub import HfFolder
from transformers import AutoTokenizer, LineByLineTextDataset, TextDataset
from transformers.deepspeed import is_deepspeed_zero3_enabled
from transformers import is_torch_tpu_available
from transformers.utils import send_example_telemetry
from trl.core import set_seed
from trl.env_utils import strtobool
from trl.extras.dataset_formatting import instructions_formatting_function

tokenizer = AutoTokenizer.from_pretrained({model!r})
blocks = TextDataset(tokenizer, {lines!r}, 8)
print("blocks", [len(blocks[at]) for at in range(2)])
lines = LineByLineTextDataset(tokenizer, {lines!r}, 5)
print("lines", len(lines), max(len(row["input_ids"]) for row in lines))
HfFolder.save_token("kept")
print("token", HfFolder.get_token())
tokenizer.chat_template = "{{{{ messages[0].content }}}}: {{{{ messages[1].content }}}}"
write = instructions_formatting_function(tokenizer)
assert write({{"prompt": ["a"], "completion": ["b"]}}) == ["a: b"]
print("texts", write({{"prompt": "a", "completion": "b"}}))
set_seed(3), send_example_telemetry("run_clm", None)
assert not is_torch_tpu_available() and not is_deepspeed_zero3_enabled() and strtobool("no") == 0
print("written", "yes" if str(tokenizer._bos_token) == "<s>" and tokenizer._mask_token is None else "no")
"""
