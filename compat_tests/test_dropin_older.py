"""Names, flags and fields of older releases under ``hf-mlx run``."""

import re

import pytest
from forked_scripts import HF_MLX_RUN, run_forked

from hf_mlx.errors import SettingError
from hf_mlx.stand_in.older import OLDER
from hf_mlx.stand_in.parsers import translate_flags

CHECKS = """
import torch
from datasets import Dataset
from peft import prepare_model_for_int8_training
from transformers import AdamW, PreTrainedTokenizerFast, TrainingArguments
from trl import ModelConfig, get_kbit_device_map
from trl.commands.cli_utils import SFTScriptArguments, TrlParser, init_zero_verbose
from trl.extras.dataset_formatting import get_formatting_func_from_dataset
from trl.trainer.utils import ConstantLengthDataset, DataCollatorForCompletionOnlyLM, get_peft_config
import trl

try:
    from trl import NeverThere
except ImportError as error:
    print("missing", error.name or "trl")
assert trl.get_peft_config is get_peft_config and trl.TrlParser is TrlParser
assert get_kbit_device_map() is None

tokenizer = PreTrainedTokenizerFast.from_pretrained({model!r})
question, answer = tokenizer.encode("Q:"), tokenizer.encode("A:")
collator = DataCollatorForCompletionOnlyLM(answer, question, tokenizer=tokenizer)
rows = [question + [9, 10] + answer + [11, 12] + question + [13] + answer + [14], question + [9] + answer + [10]]
batch = collator([{{"input_ids": row, "labels": row}} for row in rows])
print("labels", [[int(label) for label in row if label != -100] for row in batch["labels"]])
last = DataCollatorForCompletionOnlyLM(answer, tokenizer=tokenizer)([{{"input_ids": row}} for row in rows])
print("last", [[int(label) for label in row if label != -100] for row in last["labels"]])

texts = Dataset.from_list([{{"text": "What is 3 plus 3? " * 3}}] * 8)
packed = list(ConstantLengthDataset(tokenizer, texts, dataset_text_field="text", seq_length=16))
print("pieces", {{len(row["input_ids"]) for row in packed}}, len(packed) > 3)

config = ModelConfig(torch_dtype="bfloat16", trust_remote_code=True)
print("config", config.dtype, config.torch_dtype, config.trust_remote_code, ModelConfig().trust_remote_code)
parser = TrlParser((SFTScriptArguments, TrainingArguments, ModelConfig))
script, arguments, config = parser.parse_args_and_config(
    ["--output_dir", "unused", "--evaluation_strategy=no", "--torch_dtype", "auto", "--config", {yaml!r}]
)
print("parsed", script.dataset_name, arguments.warmup_steps, arguments.train_sampling_strategy, config.torch_dtype)
weight = torch.nn.Parameter(torch.ones(2))
weight.sum().backward()
AdamW([weight], lr=0.1, no_deprecation_warning=True).step()
print("stepped", round(float(weight[0].detach()), 4))
"""


def test_names_that_left_mean_what_they_meant(tmp_path):
    from dropin_models import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path / "model")
    yaml = tmp_path / "config.yaml"
    yaml.write_text("dataset_name: rows\nwarmup_ratio: 0.25\ngroup_by_length: true\noverwrite_output_dir: true\n")
    script = tmp_path / "older.py"
    script.write_text(CHECKS.format(model=str(tmp_path / "model"), yaml=str(yaml)))
    done = run_forked([*HF_MLX_RUN, script])
    assert done.stdout.splitlines() == [
        "missing trl",
        "labels [[11, 12, 14], [10]]",
        "last [[14], [10]]",
        "pieces {16} True",
        "config bfloat16 bfloat16 True False",
        "parsed rows 0.25 group_by_length auto",
        "stepped 0.9",
    ]
    for name, left in (
        ("trl.trainer.utils.ConstantLengthDataset", "trl 0.20"),
        ("transformers.AdamW", "transformers 4.50"),
    ):
        assert done.stderr.count(f"hf-mlx run: {name} left in {left}; its older meaning is kept\n") == 1


def test_every_name_says_when_it_left():
    assert len(OLDER) >= 30
    for name, older in OLDER.items():
        assert re.fullmatch(r"(trl|transformers|peft|huggingface_hub) \d+\.\d+", older.left), name


@pytest.mark.parametrize(
    ("words", "current"),
    [
        ("--max_seq_length 512 --lr 1", "--max_length 512 --lr 1"),
        ("--evaluation-strategy=steps", "--eval_strategy steps"),
        ("--overwrite_output_dir --output_dir x", "--output_dir x"),
        ("--warmup_ratio 0.1", "--warmup_steps 0.1"),
        ("--group_by_length --max_steps 2", "--train_sampling_strategy group_by_length --max_steps 2"),
        ("--mine 3 --max_seq_length=4 -- x", "--mine 3 --max_length 4 -- x"),
        ("--logging_dir runs/1", ""),
        ("--use_flash_attention_2 --lr 1", "--lr 1"),
    ],
)
def test_flags_are_todays(words, current, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")  # which --logging_dir would set, for later tests too
    assert " ".join(translate_flags(words.split(), {})[0]) == current


def test_a_flag_that_the_parser_has_stays_and_one_that_asks_for_something_gone_is_refused():
    assert translate_flags(["--max_seq_length", "512"], {"--max_seq_length"}) == (["--max_seq_length", "512"], [])
    with pytest.raises(SettingError, match="save_safetensors=False"):
        translate_flags(["--save_safetensors", "false"], {})
