"""Scripts as people wrote them for CUDA and older releases: under ``hf-mlx run`` they train as TRL of today does.

Each file of ``scripts/styles`` holds the script and, for plain TRL on a CPU, the same run in today's names. One
process runs all scripts and one all references, for the libraries' imports take longer than the runs.
"""

import json

import pytest
from dropin_models import write_model, write_rows
from forked_scripts import HF_MLX_RUN, run_forked
from test_dropin_scripts import LOSS, SCRIPTS

STYLES = (
    "qlora", "completion_only", "chat_format", "parser", "alpaca", "model_config", "device", "old_keywords",
    "constant_length", "seq2seq", "alpaca_lora", "handbook", "batches", "surroundings", "text_file", "json_file",
)  # fmt: skip
STEPS = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("styles")
    write_model(root / "model")
    write_rows(root / "rows.jsonl")
    driver = SCRIPTS / "styles" / "driver.py"

    def run(side, *command):
        words = [driver, side, root / "model", root / "rows.jsonl", root / side, *STYLES]
        return root / side, run_forked([*command, *words])

    return {"reference": run("reference"), "script": run("script", *HF_MLX_RUN)}


@pytest.mark.parametrize("style", STYLES)
def test_a_script_of_its_time_trains_as_trl_of_today(style, runs):
    expected, found = (json.loads((runs[side][0] / style / "losses.json").read_text()) for side in runs)
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=LOSS)


def test_what_scripts_print_around_training(runs):
    folder = runs["script"][0]
    qlora = (folder / "qlora" / "printed.txt").read_text().splitlines()
    for line in ("before (1, 7)", "memory True 8", "after (1, 7)", "pipeline True", "merged torch.float32"):
        assert line in qlora
    printed = [(runs[side][0] / "device" / "printed.txt").read_text().splitlines() for side in runs]
    kept = [[line for line in lines if line.startswith(("before", "own", "logits", "after"))] for lines in printed]
    assert len(kept[0]) == 4
    assert kept[1] == kept[0]


def test_what_scripts_read_besides_training(runs):
    printed = {
        (side, style): (runs[side][0] / style / "printed.txt").read_text().splitlines()
        for side in runs
        for style in ("surroundings", "json_file")
    }
    surroundings = printed["script", "surroundings"]
    for line in (
        "refused True flash_attn xformers", "noise True [1.0]", "type torch.float16", "run '' 0 0.001", "chat True",
        "ids True", "True",
    ):  # fmt: skip
        assert line in surroundings
    assert any(line.startswith("trainable params: ") for line in surroundings)
    assert "read (40, 0.1, False, 'logs') True True" in printed["script", "json_file"]
    answers = [[line for line in printed[side, "json_file"] if line.startswith("answers")] for side in runs]
    assert len(answers[0]) == 1 and answers[1] == answers[0]
    assert (runs["script"][0] / "json_file" / "kept" / "config.json").exists()


def test_each_answer_is_said_once(runs):
    said = [line for line in runs["script"][1].stderr.splitlines() if line.startswith("hf-mlx run: ")]
    assert len(said) == len(set(said)) > 10
    [summary] = [line for line in said if "CUDA as the script found it" in line]
    for answer in ("is_available() True", "get_device_capability() (8, 0)", 'device "cuda" is '):
        assert summary.count(answer) == 1
    for name in (
        "trl.setup_chat_format left in trl 0.26",
        "trl.DataCollatorForCompletionOnlyLM left in trl 0.20",
        "trl.trainer.ConstantLengthDataset left in trl 0.20",
        "peft.prepare_model_for_int8_training left in peft 0.10",
        "evaluation_strategy is now eval_strategy",
        "hf-mlx run: torch_dtype is now dtype",
        "ModelConfig's torch_dtype is now dtype",
        "wandb is not installed: what the script sends to it goes nowhere",
        "report_to='tensorboard': it is not installed",
        "deepspeed needs CUDA and is not here",
        "formatting_func returns lists",
        "dataset_text_field='text': that column alone is trained",
        "peft_config beside a PeftModel",
        "OptimizedModule: the model inside is trained",
        "bitsandbytes.optim.PagedAdamW8bit is torch.optim.AdamW",
        "transformers.TextDataset left in transformers 5.0",
        "huggingface_hub.notebook_login(): nobody is logged in",
    ):
        assert sum(name in line for line in said) == 1
