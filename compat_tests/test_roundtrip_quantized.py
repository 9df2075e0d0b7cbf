"""QLoRA: quantised bases train, and their adapters name a base that transformers loads."""

from __future__ import annotations

import json
import logging

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from mlx_lm.utils import save
from pairs import rows_of
from training_checks import adapter_keys, load_class, make_base, quiet, train_mlx
from transformers import AutoTokenizer, BitsAndBytesConfig

from hf_mlx import export_adapter, import_adapter
from hf_mlx.adapters.merge import merge_adapter
from hf_mlx.errors import AdapterError, ModelError
from hf_mlx.models.load import load_model
from hf_mlx.models.save import write_model
from hf_mlx.settings.plan import ModelPlan

pytestmark = pytest.mark.usefixtures("uncompiled")

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
# One batch over and over: the loss must fall by more than any noise of quantisation.
SETTINGS = {"max_steps": 12, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_length": 32}
ROWS = Dataset.from_list(rows_of("text", 2))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(
        "llama", tmp_path_factory.mktemp("base") / "model", tie_word_embeddings=False, intermediate_size=128
    )


def convert(base, folder, bits, card: str | None = None):
    """A folder as ``mlx_lm.convert -q`` writes it, with or without a model card."""
    with quiet():
        loaded = load_model(base, ModelPlan())
        nn.quantize(loaded.model, group_size=32, bits=bits)
        config = json.loads((base / "config.json").read_text())
        config["quantization"] = config["quantization_config"] = {"group_size": 32, "bits": bits}
        save(folder, base, loaded.model, AutoTokenizer.from_pretrained(base), config)
    (folder / "README.md").unlink(missing_ok=True)
    if card:
        (folder / "README.md").write_text(card)
    return folder


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_converted_folder_trains_and_its_adapter_names_the_original(base, bits, tmp_path, caplog):
    card = f"---\nlibrary_name: mlx\nbase_model: owner/original-{bits}\n---\n"
    folder = convert(base, tmp_path / "mlx", bits, card)

    with caplog.at_level(logging.WARNING, "hf_mlx"):
        trainer = train_mlx(folder, tmp_path / "ours", LORA, settings=SETTINGS, train_dataset=ROWS)

    curve = losses(trainer)
    assert len(curve) == 12
    assert curve[-1] < 0.8 * curve[0]
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"owner/original-{bits}"
    assert len([n for n in trainer.session.loaded.notes if f"{bits} bits" in n and "bf16" in n]) == 1
    assert {v.dtype for v in trainer.adapter.trainable().values()} == {mx.float32}


def test_a_converted_folder_without_a_card_is_refused_before_training(base, tmp_path):
    folder = convert(base, tmp_path / "mlx", 4)

    with pytest.raises(AdapterError, match="does not name the model it was made from") as refused:
        train_mlx(folder, tmp_path / "ours", LORA)

    assert "base_model: owner/original-model" in refused.value.remedy
    assert not (tmp_path / "ours").exists() or not list((tmp_path / "ours").glob("adapter*"))


@pytest.mark.parametrize(
    ("request_", "bits"),
    [
        (BitsAndBytesConfig(load_in_4bit=True), 4),
        ({"load_in_4bit": True}, 4),
        ({"load_in_8bit": True}, 8),
    ],
    ids=["BitsAndBytesConfig, 4 bits", "dict, 4 bits", "dict, 8 bits"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_quantised_on_request_trains_and_names_itself(base, request_, bits, dtype, tmp_path):
    settings = {**SETTINGS, "model_init_kwargs": {"dtype": dtype}}

    trainer = train_mlx(
        base, tmp_path / "ours", LORA, settings=settings, train_dataset=ROWS, quantization_config=request_
    )

    curve = losses(trainer)
    assert curve[-1] < 0.8 * curve[0]
    quantised = [m for m in trainer.session.loaded.model.modules() if "scales" in m]
    assert len(quantised) == 4 * 7
    assert {m.bits for m in quantised} == {bits}
    assert [line for line in trainer.ledger.notices() if "adapter stays in fp32" in line]
    # CUDA loads that folder, in floating point or through bitsandbytes, under the same names.
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    with quiet():
        model = peft.PeftModel.from_pretrained(load_class(base).from_pretrained(base), tmp_path / "ours")
        assert set(peft.get_peft_model_state_dict(model)) == adapter_keys(tmp_path / "ours")


def test_a_quantised_base_is_saved_dequantised_or_not_at_all(base, tmp_path):
    folder = convert(base, tmp_path / "mlx", 4, "---\nbase_model: owner/original\n---\n")
    trainer = train_mlx(folder, tmp_path / "ours", LORA, settings=SETTINGS, train_dataset=ROWS)
    ids = mx.array([[5, 9, 17, 30, 2, 77]])

    with pytest.raises(ModelError, match="quantised parameter") as refused:
        write_model(trainer.session.loaded, tmp_path / "whole")
    assert "hf-mlx merge --dequantize" in refused.value.remedy
    with pytest.raises(AdapterError, match="a quantised base"):
        merge_adapter(trainer.adapter, tmp_path / "merged")
    with quiet():
        merge_adapter(trainer.adapter, tmp_path / "merged", dequantize=True)
        merged = load_class(tmp_path / "merged").from_pretrained(tmp_path / "merged").eval()
        with torch.no_grad():
            theirs = merged(torch.tensor(np.array(ids))).logits.numpy()
    ours = np.array(trainer.session.loaded.model(ids).astype(mx.float32))
    # fp32 on both sides; the quantised matmul sums in another order.
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-5


def test_an_adapter_goes_on_over_the_same_quantised_base(base, tmp_path):
    folder = convert(base, tmp_path / "mlx", 4, "---\nbase_model: owner/original\n---\n")
    trainer = train_mlx(folder, tmp_path / "ours", LORA, settings=SETTINGS, train_dataset=ROWS)
    export_adapter(trainer, tmp_path / "again", base="owner/another-name")

    with quiet():
        adapter = import_adapter(tmp_path / "again", load_model(folder, ModelPlan()))

    ids = mx.array([[5, 9, 17, 30, 2, 77]])
    trainer.session.loaded.model.eval()
    assert mx.array_equal(adapter.loaded.model(ids), trainer.session.loaded.model(ids))


def test_experts_of_a_quantised_mixture_train(tmp_path):
    base = make_base("qwen3_moe", tmp_path / "base", hidden_size=64, moe_intermediate_size=64)

    trainer = train_mlx(
        base,
        tmp_path / "ours",
        {"r": 4, "target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]},
        settings=SETTINGS,
        train_dataset=ROWS,
        quantization_config={"load_in_4bit": True},
    )

    curve = losses(trainer)
    assert curve[-1] < 0.9 * curve[0]
    # Two parameters a layer, as torch stacks gate and up.
    assert len([target for target in trainer.adapter.targets if target.kind == "experts"]) == 8
