"""The facade of an MLX model: generation, counts, saving and merging."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from tiny_checkpoints import write_llama

from hf_mlx.adapters.attach import attach
from hf_mlx.errors import AdapterError, SettingError
from hf_mlx.models.load import load_model
from hf_mlx.settings.plan import LoraPlan, ModelPlan
from hf_mlx.surface.accelerator import Accelerator
from hf_mlx.surface.facade import MLXCausalLM
from hf_mlx.surface.hub import write_card

SFT_CARD = {"trainer_tags": ("sft", "trl"), "method": "SFT"}
PROMPT = np.array([[5, 6, 7, 8]])


@pytest.fixture
def model(tmp_path):
    return MLXCausalLM(load_model(write_llama(tmp_path / "base"), ModelPlan()))


@pytest.fixture
def adapted(tmp_path):
    loaded = load_model(write_llama(tmp_path / "base"), ModelPlan())
    adapter = attach(loaded, LoraPlan(r=2, target_modules=("q_proj", "v_proj"), init_lora_weights=False), seed=0)
    return MLXCausalLM(loaded, adapter)


def _choose(model, ids, count):
    for _ in range(count):
        ids = np.concatenate([ids, model(ids).logits[:, -1].argmax(-1)[:, None]], axis=1)
    return ids


def test_greedy_decoding_takes_the_likeliest_token(model):
    assert (model.generate(PROMPT, max_new_tokens=6) == _choose(model, PROMPT, 6)).all()


def test_decoding_stops_at_eos_and_pads_shorter_answers(model):
    long = model.generate(PROMPT, max_new_tokens=6, eos_token_id=99)
    stop = int(long[0, 6])
    both = model.generate([[5, 6, 7, 8], [9, 9, 9, 9]], max_new_tokens=6, eos_token_id=stop, pad_token_id=63)
    first = int(np.argmax(long[0] == stop))
    assert (both[0, : first + 1] == long[0, : first + 1]).all()
    assert (both[0, first + 1 :] == 63).all()


def test_padding_changes_no_answer(model):
    alone = model.generate([[7, 8]], max_new_tokens=5, eos_token_id=99)
    padded = model.generate(
        [[0, 0, 7, 8], [5, 6, 7, 8]], attention_mask=[[0, 0, 1, 1], [1, 1, 1, 1]], max_new_tokens=5, eos_token_id=99
    )
    assert (padded[0, 4:] == alone[0, 2:]).all()
    # Rounding order differs with the shape of the batch.
    left = model([[0, 0, 7, 8]], attention_mask=[[0, 0, 1, 1]]).logits[:, 2:]
    assert np.abs(left - model([[7, 8]]).logits).max() < 1e-5


def test_sampling_repeats_with_mlxs_seed_and_stays_in_top_k(model):
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 3, "num_return_sequences": 20, "eos_token_id": 99}
    mx.random.seed(3)
    first = model.generate(PROMPT, **options)
    mx.random.seed(3)
    assert (model.generate(PROMPT, **options) == first).all()
    allowed = set(np.argsort(model(PROMPT).logits[0, -1])[-3:])
    assert len(set(first[:, 4])) > 1
    assert set(first[:, 4]) <= allowed


@pytest.mark.parametrize("option", ["num_beams", "stop_strings", "max_tokens"])
def test_options_that_are_not_honoured_are_named(option, model):
    with pytest.raises(SettingError, match=option):
        model.generate(PROMPT, **{option: 2})


def test_no_room_for_an_answer_is_said(model):
    with pytest.raises(SettingError, match="max_new_tokens"):
        model.generate(PROMPT, max_length=4)


def test_the_count_line_is_pefts(adapted, capsys):
    adapted.print_trainable_parameters()
    trained = 2 * 2 * (2 * 32 + 32 + 16)
    whole = 64 * 32 * 2 + 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32) + trained
    share = f"{100 * trained / whole:.4f}"
    expected = f"trainable params: {trained:,d} || all params: {whole:,d} || trainable%: {share}\n"
    assert capsys.readouterr().out == expected


def test_a_quantised_model_counts_what_it_stands_for(tmp_path):
    base = write_llama(tmp_path / "base", hidden_size=64, intermediate_size=64)
    plain = MLXCausalLM(load_model(base, ModelPlan()))
    packed = MLXCausalLM(load_model(base, ModelPlan(quantization_bits=4)))
    assert packed.num_parameters() == plain.num_parameters()


def test_merging_keeps_the_logits_and_saves_a_whole_model(adapted, tmp_path):
    before = adapted(PROMPT).logits
    merged = adapted.merge_and_unload()
    # One rounding of each merged weight in fp32.
    assert np.abs(merged(PROMPT).logits - before).max() < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    again = MLXCausalLM(load_model(tmp_path / "merged", ModelPlan()))
    assert (again(PROMPT).logits == merged(PROMPT).logits).all()
    with pytest.raises(AdapterError, match="without an adapter"):
        merged.merge_and_unload()


def test_the_config_is_transformers_own(model):
    assert model.config.hidden_size == 32
    assert '"num_hidden_layers": 2' in model.config.to_json_string()
    assert model.config._name_or_path == str(model.loaded.path)
    assert not hasattr(model, "peft_config")


def test_save_pretrained_refuses_what_it_would_ignore(model, tmp_path):
    with pytest.raises(SettingError, match="max_shard_size"):
        model.save_pretrained(tmp_path / "out", max_shard_size="1KB")
    with pytest.raises(SettingError, match="safetensors"):
        model.save_pretrained(tmp_path / "out", safe_serialization=False)
    assert not (tmp_path / "out").exists()


def test_the_device_and_accelerator_speak_for_one_process(model, capsys):
    accelerator = Accelerator(mixed_precision="bf16")
    accelerator.print("once", 1)
    accelerator.wait_for_everyone()
    assert capsys.readouterr().out == "once 1\n"
    assert accelerator.is_main_process
    assert (accelerator.num_processes, accelerator.process_index) == (1, 0)
    assert accelerator.unwrap_model(model) is model
    assert (str(model.device), model.device.type, accelerator.device.type) == ("cpu", "cpu", "cpu")


def test_a_card_says_how_to_load_what_is_beside_it(tmp_path):
    card = write_card(
        tmp_path, **SFT_CARD, model_name="tiny", base_model="owner/base", hub_model_id="me/tiny", adapter=True
    )
    text = card.read_text()
    assert 'base_model: "owner/base"' in text
    assert "PeftModel.from_pretrained(model, 'me/tiny')" in text
    whole = write_card(
        tmp_path, **SFT_CARD, model_name="tiny", base_model=None, hub_model_id=None, extra={"license": "mit"}
    )
    assert 'license: "mit"' in whole.read_text()
