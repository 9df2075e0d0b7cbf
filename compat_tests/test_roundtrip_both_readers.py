"""A merged folder means the same to transformers and to mlx-lm, whose own loader reads other keys of its config."""

import json

import numpy as np
import pytest
import torch
from adapter_pairs import adapt_mlx, load_mlx, make_base
from architecture_zoo import make_ids
from transformers import AutoConfig, AutoModelForCausalLM

from hf_mlx.adapters.merge import merge_adapter
from hf_mlx.models.config import interpret, read_config
from hf_mlx.models.spelling import spell_out

# Each at values off mlx-lm's defaults, so that a key it does not find would show.
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3_moe": {},
    "stablelm": {"partial_rotary_factor": 0.5},
}
# Where mlx-lm has one activation whatever the config says, the base has it too.
WIDE = {
    "olmo2": {}, "granite": {}, "cohere": {}, "smollm3": {}, "qwen3": {},
    "starcoder2": {"sliding_window": None, "hidden_act": "gelu"}, "gpt_neox": {"hidden_act": "gelu_fast"},
    "phi3": {"sliding_window": None}, "glm4": {}, "phi": {}, "nemotron": {}, "seed_oss": {},
    "mixtral": {"sliding_window": None}, "olmoe": {}, "qwen2_moe": {}, "helium": {},
}  # fmt: skip


def merged(model_type, options, folder):
    base = make_base(model_type, folder / "base", **options)
    names = ["v_proj", "query_key_value", "qkv_proj"]
    adapter = adapt_mlx(load_mlx(base), {"r": 2, "target_modules": names})
    return merge_adapter(adapter, folder / "merged")


def check(model_type, options, tmp_path):
    import mlx.core as mx
    from mlx_lm.utils import load_model

    folder = merged(model_type, options, tmp_path)
    ids = make_ids()
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        wanted = theirs(ids).logits.float().numpy()
    model, _ = load_model(folder)
    model.eval()
    found = np.array(model(mx.array(ids.numpy())).astype(mx.float32))
    # fp32 on both sides, sums in another order.
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    # transformers reads what it reads without the added keys.
    before, after = (AutoConfig.from_pretrained(path).to_dict() for path in (tmp_path / "base", folder))
    told = {"_name_or_path", "architectures", "dtype", "transformers_version"}
    assert {k: v for k, v in after.items() if k in before and k not in told} == {
        k: v for k, v in before.items() if k not in told
    }
    written, original = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "base"))
    assert {k: written[k] for k in original if k not in told} == {k: original[k] for k in original if k not in told}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_are_equal_in_transformers_and_in_mlx_lm(model_type, tmp_path):
    check(model_type, FAMILIES[model_type], tmp_path)


@pytest.mark.wide
@pytest.mark.parametrize("model_type", WIDE)
def test_other_families(model_type, tmp_path):
    check(model_type, WIDE[model_type], tmp_path)


def test_a_size_under_another_name_is_there_for_mlx_lm(tmp_path):
    from mlx_lm.models.gpt2 import ModelArgs

    # Its tensors' names are another matter: mlx-lm reads those of the hub's own files alone.
    plain = read_config(make_base("gpt2", tmp_path / "base"))
    with pytest.raises(TypeError, match="n_ctx"):
        ModelArgs.from_dict(plain)
    assert ModelArgs.from_dict(spell_out(plain)).n_ctx == plain["n_positions"]


def test_what_is_missing_is_what_made_the_difference(tmp_path):
    base = make_base("llama", tmp_path / "base")
    plain = read_config(base)
    spelled = spell_out(plain)
    assert "rope_theta" not in plain and spelled["rope_theta"] == plain["rope_parameters"]["rope_theta"] != 10_000
    assert interpret(spelled).items() >= interpret(plain).items()
    assert spell_out(spelled) == spelled
