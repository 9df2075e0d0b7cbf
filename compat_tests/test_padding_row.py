"""torch trains no row of an embedding at ``padding_idx``: neither does MLX, whoever trains the embedding."""

import pytest
import torch
from architecture_zoo import MODEL_TYPES, VOCAB, builder, make_config
from lm_pairs import load, run, run_both, token_rows
from pairs import assert_same_log, tiny_model, tokenizer, untimed
from transformers import DataCollatorForLanguageModeling, Trainer

from hf_mlx import MLXTrainer
from hf_mlx.models.architectures import VERIFIED
from hf_mlx.models.config import interpret
from hf_mlx.models.padding_row import named_padding_row

RELATIVE = 1e-4
SETTINGS = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1}
# A token of the rows' own; what scripts mostly pad with is the end token.
PAD = 3


def keywords():
    rows = [{**row, "input_ids": [PAD, *row["input_ids"], PAD, *row["input_ids"]]} for row in token_rows(8)]
    rows = [{"input_ids": row["input_ids"]} for row in rows]
    return {"train_dataset": rows, "data_collator": DataCollatorForLanguageModeling(tokenizer(), mlm=False)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {tied: tmp_path_factory.mktemp(f"tied-{tied}") for tied in (False, True)}
    for tied, folder in made.items():
        tiny_model("llama", folder, pad_token_id=PAD, tie_word_embeddings=tied)
    return made


TRAINED = {
    "all weights": (False, None),
    "all weights, tied": (True, None),
    "LoRA on the embedding": (False, {"target_modules": ["embed_tokens", "q_proj"]}),
    "a whole embedding": (False, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "rows of the embedding": (False, {"target_modules": ["q_proj"], "trainable_token_indices": [PAD, 40, 41]}),
}


@pytest.mark.parametrize(
    "trained", [*list(TRAINED)[:3], *(pytest.param(name, marks=pytest.mark.wide) for name in list(TRAINED)[3:])]
)
def test_whatever_trains_the_embedding(folders, trained):
    tied, lora = TRAINED[trained]
    (theirs, _), (ours, _) = run_both(lambda: load(folders[tied], lora), SETTINGS, keywords)
    assert_same_log(untimed(theirs), untimed(ours), relative=RELATIVE)
    assert len(ours) == 5


def test_a_model_by_name_and_one_whose_row_the_script_changed(folders):
    """A name goes by its config, an object by what it holds."""
    logs = []
    for made in (str(folders[False]), load(folders[False]), load(folders[False])):
        if made is not None and not isinstance(made, str) and len(logs) == 2:
            made.get_input_embeddings().padding_idx = None
        logs.append(untimed(run(MLXTrainer, made, SETTINGS, **keywords())[0]))
    assert_same_log(logs[1], logs[0], relative=RELATIVE)
    changed = load(folders[False])
    changed.get_input_embeddings().padding_idx = None
    theirs, _ = run(Trainer, changed, SETTINGS, **keywords())
    assert_same_log(untimed(theirs), logs[2], relative=RELATIVE)
    assert abs(logs[2][0]["grad_norm"] / logs[1][0]["grad_norm"] - 1) > 1e-3


def test_the_row_of_each_known_type_is_that_of_its_class():
    """Of a model named by a string: its class's default, a token, and one counted from the end."""
    seen = 0
    for model_type in sorted(set(MODEL_TYPES) & set(VERIFIED)):
        for pad in ({}, {"pad_token_id": 5}, {"pad_token_id": -1}):
            config = make_config(model_type, **pad)
            with torch.device("meta"):
                theirs = builder(model_type)(config).get_input_embeddings().padding_idx
            ours = named_padding_row(interpret(config.to_dict()))
            assert (ours if ours is None else ours % VOCAB) == theirs, (model_type, pad)
            seen += 1
    assert seen == 3 * len(VERIFIED) >= 231
