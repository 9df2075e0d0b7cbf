"""Whatever is wrong is said before any training: what was received, what is required, and what to write instead."""

import json
import shutil
import struct
import warnings

import pytest
from pairs import SILENT, rows_of, tiny_model
from peft import LoraConfig
from trl import SFTConfig

from hf_mlx import HFMLXError, MLXSFTTrainer
from hf_mlx.errors import AdapterError, CheckpointError, DataError, ModelError, SettingError

ROWS = rows_of("prompt", 6)
NOTHING = object()


def _edit_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _remove(*patterns):
    def change(folder):
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return change


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _garble(folder):
    (folder / "model.safetensors").write_bytes(b"not a safetensors file at all")


def _huge_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


def _pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _broken_json(folder):
    (folder / "config.json").write_text("{ nobody closed this")


# name: (error, words of the message, settings, LoRA options, rows, change to the model folder)
CASES = {
    "empty dataset": (DataError, ["train dataset is empty"], {}, {}, [], None),
    "no dataset": (DataError, ["train dataset", "NoneType"], {}, {}, None, None),
    "missing column": (DataError, ["text"], {}, {}, [{"body": "hello"}] * 4, None),
    "missing completion": (DataError, ["completion"], {}, {}, [{"prompt": "hello"}] * 4, None),
    "nothing to train on": (
        DataError,
        ["-100"],
        {},
        {},
        [{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}] * 4,
        None,
    ),
    "all rows cut": (DataError, ["max_length"], {"max_length": 2}, {}, ROWS, None),
    "None in a row": (DataError, ["row 1"], {}, {}, [{"text": "a b c"}, {"text": None}], None),
    "unknown model type": (ModelError, ["martian"], {}, {}, ROWS, _edit_config(model_type="martian")),
    "no config": (ModelError, ["config.json"], {}, {}, ROWS, _remove("config.json")),
    "config is no JSON": (ModelError, ["config.json"], {}, {}, ROWS, _broken_json),
    "no weights": (ModelError, ["safetensors"], {}, {}, ROWS, _remove("*.safetensors")),
    "pickled weights": (ModelError, ["safetensors"], {}, {}, ROWS, _pickled),
    "truncated weights": (ModelError, ["model.safetensors"], {}, {}, ROWS, _truncate),
    "unreadable weights": (ModelError, ["model.safetensors"], {}, {}, ROWS, _garble),
    "a header that lies": (ModelError, ["model.safetensors"], {}, {}, ROWS, _huge_header),
    "another architecture's weights": (ModelError, [], {}, {}, ROWS, _edit_config(hidden_size=128)),
    "no tokenizer": (ModelError, ["tokenizer"], {}, {}, ROWS, _remove("tokenizer*", "*.jinja", "special*", "vocab*")),
    "no such model": (ModelError, ["nowhere"], {}, {}, ROWS, NOTHING),
    "r = 0": (SettingError, ["r=0"], {}, {"r": 0}, ROWS, None),
    "target_modules match nothing": (
        AdapterError,
        ["no_such_proj", "q_proj"],
        {},
        {"target_modules": ["no_such_proj"]},
        ROWS,
        None,
    ),
    "learning_rate NaN": (SettingError, ["learning_rate=nan"], {"learning_rate": float("nan")}, {}, ROWS, None),
    "learning_rate < 0": (SettingError, ["learning_rate=-0.1"], {"learning_rate": -0.1}, {}, ROWS, None),
    "max_grad_norm NaN": (SettingError, ["max_grad_norm=nan"], {"max_grad_norm": float("nan")}, {}, ROWS, None),
    "max_grad_norm < 0": (SettingError, ["max_grad_norm=-1"], {"max_grad_norm": -1}, {}, ROWS, None),
    "unknown optimizer": (SettingError, ["optim", "galore_adamw"], {"optim": "galore_adamw"}, {}, ROWS, None),
    "a refused argument": (SettingError, ["include_for_metrics"], {"include_for_metrics": ["x"]}, {}, ROWS, None),
    "a refused LoRA option": (SettingError, ["eva"], {}, {"init_lora_weights": "eva"}, ROWS, None),
    "an output_dir that is a file": (CheckpointError, ["output_dir"], {"output_dir": "FILE"}, {}, ROWS, None),
    "an output_dir below a file": (CheckpointError, ["output_dir"], {"output_dir": "FILE/run"}, {}, ROWS, None),
    "eval without a dataset": (SettingError, ["eval_dataset"], {"eval_strategy": "epoch"}, {}, ROWS, None),
    "eos token not in the vocabulary": (SettingError, ["<nope>"], {"eos_token": "<nope>"}, {}, ROWS, None),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_model("llama", tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, base, tmp_path):
    error, words, settings, lora, rows, change = CASES[name]
    model = tmp_path / "model"
    if change is not NOTHING:
        shutil.copytree(base, model)
        if change is not None:
            change(model)
    else:
        model = tmp_path / "nowhere"
    (tmp_path / "file").write_text("occupied")
    output = settings.get("output_dir", str(tmp_path / "out")).replace("FILE", str(tmp_path / "file"))
    options = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **lora}
    with pytest.raises(HFMLXError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        MLXSFTTrainer(
            str(model),
            SFTConfig(**{**SILENT, "max_steps": 1, **settings, "output_dir": output}),
            train_dataset=rows,
            peft_config=LoraConfig(**options),
        )
    assert isinstance(caught.value, error), f"{type(caught.value).__name__}: {caught.value}"
    message = str(caught.value)
    for word in words:
        assert word in message
    assert message.index("received") < message.index("required") < message.index("remedy")
    assert caught.value.received and caught.value.required and caught.value.remedy


def test_the_table_is_wide_enough():
    assert len(CASES) >= 25
