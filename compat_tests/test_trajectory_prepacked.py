"""Rows that arrive packed, with their documents in ``seq_lengths``, and sets that are packed for evaluation alone."""

import pytest
import torch
import transformers
from datasets import Dataset
from pairs import SILENT, assert_same_log, rows_of, text_rows, tiny_model, tokenizer, untimed
from peft import LoraConfig
from sampling import sampled
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("uncompiled")]

# As in test_trajectory_families: the promise of the library in fp32.
RELATIVE = 1e-4
SETTINGS = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 1e-2,
    "max_steps": 3,
    "logging_steps": 1,
    "max_length": 24,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "train_sampling_strategy": "sequential",
}


def packed(*rows):
    made = []
    for sizes in rows:
        ids = [5 + (7 * place) % 200 for place in range(sum(sizes))]
        made.append({"input_ids": ids, "labels": [-100, *ids[1:]], "seq_lengths": list(sizes)})
    return made


ROWS = packed([3, 8, 2], [6], [10, 5, 4], [2, 2, 2, 2], [9, 9], [4, 1])
SKIPPED = {"dataset_kwargs": {"skip_prepare_dataset": True}}

# name: (training rows, evaluation rows, settings)
CASES = {
    "padded": (ROWS, ROWS, {}),
    "cut": (ROWS, ROWS, {"max_length": 12}),
    "cut at the start": (ROWS, ROWS, {"max_length": 12, "truncation_mode": "keep_end"}),
    "unlimited": (ROWS, ROWS, {"max_length": None}),
    "as they are": (ROWS, ROWS, SKIPPED),
    "padding-free": (ROWS, ROWS, {"max_length": None, "padding_free": True}),
    "packed again": (ROWS, ROWS, {"packing": True}),
    "packed by their owner": (ROWS, ROWS, {"packing": True, **SKIPPED}),
    "wrapped by their owner": (ROWS, ROWS, {"packing": True, "packing_strategy": "wrapped", **SKIPPED}),
    "accumulated": (ROWS, ROWS, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),
    "evaluation alone": (text_rows(6), ROWS, {}),
    "packed for evaluation": (text_rows(6), text_rows(9, seed=3), {"eval_packing": True, "max_length": 48}),
    "packed for evaluation, split": (
        text_rows(6),
        rows_of("prompt", 9, seed=3),
        {"eval_packing": True, "packing_strategy": "bfd_split"},
    ),
    "packed for training": (text_rows(6), text_rows(9, seed=3), {"packing": True, "eval_packing": False}),
    "a stream": (ROWS, ROWS, {"STREAM": True}),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("base"), hidden_size=32, intermediate_size=48)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    sizes = {"n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": len(tokenizer())}
    noise = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("gpt2", **sizes, **noise)
    folder = tmp_path_factory.mktemp("gpt2")
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def run(trainer, model, out, name):
    train, held_out, settings = CASES[name]
    stream = settings.get("STREAM", False)
    settings = {key: value for key, value in {**SILENT, **SETTINGS, **settings}.items() if key != "STREAM"}
    rows = Dataset.from_list(train)
    made = trainer(
        str(model),
        SFTConfig(output_dir=str(out), **settings),
        train_dataset=rows.to_iterable_dataset() if stream else rows,
        eval_dataset=Dataset.from_list(held_out),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    made.train()
    return untimed(made.state.log_history)


def compare(model, folder, name):
    theirs = run(SFTTrainer, model, folder / "theirs", name)
    ours = run(MLXSFTTrainer, model, folder / "ours", name)
    assert len(theirs) >= 5
    assert_same_log(theirs, ours, relative=RELATIVE)


FEW = (
    "padded", "cut at the start", "as they are", "padding-free", "packed again", "wrapped by their owner",
    "packed for evaluation, split", "a stream",
)  # fmt: skip


@pytest.mark.parametrize("name", sampled(CASES, *FEW))
def test_the_log_is_trl_s(name, llama, tmp_path):
    compare(llama, tmp_path, name)


@pytest.mark.parametrize(
    "name", sampled(["padded", "cut", "evaluation alone", "packed for evaluation"], "cut", "packed for evaluation")
)
def test_where_documents_cannot_be_kept_apart(name, gpt2, tmp_path):
    compare(gpt2, tmp_path, name)
