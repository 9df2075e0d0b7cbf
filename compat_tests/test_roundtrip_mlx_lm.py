"""Adapters to and from mlx-lm: its own loader reads what we write, we read what its tuner writes, with equal logits."""

import json

import mlx.core as mx
import numpy as np
import pytest
from adapter_pairs import (
    CLOSE,
    adapt_mlx,
    distance,
    load_mlx,
    load_torch,
    logits_mlx,
    logits_torch,
    make_base,
    quiet,
    tokens,
)
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model as load_with_mlx_lm
from mlx_lm.utils import save_config
from peft import PeftModel

from hf_mlx.adapters.export import export_adapter
from hf_mlx.adapters.mlx_lm_folder import write_mlx_lm
from hf_mlx.adapters.read import import_adapter
from hf_mlx.cli.main import main
from hf_mlx.errors import AdapterError

pytestmark = pytest.mark.usefixtures("uncompiled")

# What a LoraConfig can ask for that mlx-lm's one rank, scale and list of keys have to express.
SETTINGS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "dropout": {"r": 4, "lora_dropout": 0.3, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["down_proj"]},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "o_proj", "up_proj"]},
    "ranks": {
        "r": 4,
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.k_proj": 7},
        "alpha_pattern": {"v_proj": 31},
        "target_modules": "all-linear",
    },
    "dora_ranks": {"r": 4, "use_dora": True, "rank_pattern": {"q_proj": 2}, "target_modules": "all-linear"},
    "first_layer": {"r": 4, "layers_to_transform": [0], "target_modules": ["q_proj", "v_proj"]},
    "last_layer": {"r": 4, "layers_to_transform": [2], "target_modules": ["q_proj"]},
    "scattered": {"r": 4, "target_modules": ["layers.0.self_attn.q_proj", "layers.2.mlp.down_proj"]},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "head": {"r": 4, "target_modules": ["lm_head", "v_proj"]},
}
FAMILIES = ("qwen2", "qwen3", "olmo2", "cohere", "granite", "qwen3_moe")
# mlx-lm ignores what the tests' tiny configs set: windows of 8 tokens, two rotary bases.
DIFFERENT = ("gemma2", "mistral", "mixtral", "phi3")


def mlx_base(model_type, folder, **changes):
    """A base whose config.json also has what mlx-lm reads under the names of older checkpoints."""
    make_base(model_type, folder, **changes)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    ropes = config.get("rope_parameters") or {}
    config |= {"rope_theta": ropes["rope_theta"]} if "rope_theta" in ropes else {}
    config |= {"num_experts": config["num_local_experts"]} if "num_local_experts" in config else {}
    path.write_text(json.dumps(config))
    return folder


def run_in_mlx_lm(base, folder):
    """Logits of mlx-lm's own loader with an adapter folder, as ``mlx_lm.generate --adapter-path`` builds the model."""
    model, _ = load_with_mlx_lm(base)
    model = load_adapters(model, str(folder))
    model.eval()
    return logits_mlx(model)


def check_out(base, loaded, adapter, folder):
    theirs = run_in_mlx_lm(base, write_mlx_lm(adapter, folder))
    assert distance(logits_mlx(loaded.model), theirs) <= CLOSE
    plain, _ = load_with_mlx_lm(base)
    assert distance(logits_mlx(plain), theirs) > 1e-3  # the adapter does something


@pytest.mark.parametrize("name", SETTINGS)
def test_mlx_lm_computes_our_logits(name, tmp_path):
    base = mlx_base("llama", tmp_path / "base", tie_word_embeddings=False, num_hidden_layers=3)
    loaded = load_mlx(base)
    adapter = adapt_mlx(loaded, SETTINGS[name])
    check_out(base, loaded, adapter, tmp_path / "out")
    # Back in through our own reader, and out to PEFT.
    with quiet():
        again = import_adapter(tmp_path / "out", base)
    assert distance(logits_mlx(again.loaded.model), logits_mlx(loaded.model)) <= CLOSE
    export_adapter(again, tmp_path / "peft")
    with quiet():
        torch_model = PeftModel.from_pretrained(load_torch(base), tmp_path / "peft").eval()
    assert distance(logits_mlx(loaded.model), logits_torch(torch_model)) <= CLOSE


@pytest.mark.parametrize("model_type", FAMILIES)
def test_other_families(model_type, tmp_path):
    base = mlx_base(model_type, tmp_path / "base")
    loaded = load_mlx(base)
    mixture = ["q_proj", "o_proj", "gate", "gate_proj", "up_proj", "down_proj"]
    targets = mixture if model_type == "qwen3_moe" else "all-linear"
    adapter = adapt_mlx(loaded, {"r": 4, "target_modules": targets})
    check_out(base, loaded, adapter, tmp_path / "out")


@pytest.mark.parametrize("model_type", DIFFERENT)
def test_a_base_that_mlx_lm_reads_otherwise_is_refused(model_type, tmp_path):
    adapter = adapt_mlx(load_mlx(mlx_base(model_type, tmp_path / "base")), {"r": 4, "target_modules": ["o_proj"]})
    with pytest.raises(AdapterError, match="mlx-lm's logits with this adapter differ"):
        write_mlx_lm(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rotary_base_where_mlx_lm_does_not_look_is_refused(tmp_path):
    base = make_base("llama", tmp_path / "base")  # as transformers 5 writes it
    adapter = adapt_mlx(load_mlx(base), {"r": 4, "target_modules": ["q_proj"]})
    with pytest.raises(AdapterError, match="rope_theta"):
        write_mlx_lm(adapter, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype, tmp_path):
    base = mlx_base("llama", tmp_path / "base")
    from transformers import AutoModelForCausalLM

    with quiet():
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "config.json").write_text(
        json.dumps(json.loads((base / "config.json").read_text()) | {"dtype": dtype})
    )
    adapter = adapt_mlx(load_mlx(tmp_path / "half"), {"r": 4, "target_modules": "all-linear"})
    export_adapter(adapter, tmp_path / "adapter")
    with quiet():
        assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--format", "mlx-lm"]) == 0
    theirs = run_in_mlx_lm(tmp_path / "half", tmp_path / "out")
    ours = logits_mlx(import_adapter(tmp_path / "adapter", tmp_path / "half").loaded.model)
    assert distance(ours, theirs) <= 2e-2  # a rounding of 2^-8 a layer


def test_a_quantised_base_keeps_its_own_name(tmp_path):
    base = mlx_base("llama", tmp_path / "base", hidden_size=64, intermediate_size=128)
    model, config = load_with_mlx_lm(base)
    from mlx_lm.utils import quantize_model, save_model

    model, config = quantize_model(model, config, group_size=32, bits=4)
    save_model(tmp_path / "q4", model)
    save_config(config, tmp_path / "q4" / "config.json")
    loaded = load_mlx(tmp_path / "q4")
    adapter = adapt_mlx(loaded, {"r": 4, "target_modules": "all-linear"})
    check_out(tmp_path / "q4", loaded, adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["model"] == str(tmp_path / "q4")


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("keys", [None, ["self_attn.q_proj", "mlp.down_proj"]])
def test_what_mlx_lm_trained_goes_to_peft(keys, use_dora, tmp_path, capsys):
    base = mlx_base("llama", tmp_path / "base", tie_word_embeddings=False, num_hidden_layers=3)
    model, _ = load_with_mlx_lm(base)
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.1} | ({"keys": keys} if keys else {})
    mx.random.seed(5)
    model.freeze()
    linear_to_lora_layers(model, 2, parameters, use_dora=use_dora)
    moved = [(k, v + 0.05 * mx.random.normal(v.shape)) for k, v in tree_flatten(model.trainable_parameters())]
    model.load_weights(moved, strict=False)
    model.eval()
    source = tmp_path / "theirs"
    source.mkdir()
    # What mlx_lm.lora writes: its options, and the trainable arrays.
    kind = "dora" if use_dora else "lora"
    options = {"model": str(base), "fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters, "iters": 5}
    save_config(options, source / "adapter_config.json")
    mx.save_safetensors(str(source / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    with quiet():
        assert main(["export", str(source), str(tmp_path / "peft")]) == 0
        assert str(base) in capsys.readouterr().out
        torch_model = PeftModel.from_pretrained(load_torch(base), tmp_path / "peft").eval()
    assert distance(logits_mlx(model), logits_torch(torch_model)) <= CLOSE


def test_the_command_writes_a_folder_that_generates(tmp_path):
    base = mlx_base("llama", tmp_path / "base")
    adapter = adapt_mlx(load_mlx(base), {"r": 4, "target_modules": ["q_proj"]})
    export_adapter(adapter, tmp_path / "adapter")
    with quiet():
        assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--format", "mlx-lm"]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    # The usual case in the usual words, which other readers of this format know.
    assert config["lora_parameters"]["keys"] == ["self_attn.q_proj"]
    assert config["model"] == str(base)
    from mlx_lm.generate import generate_step

    model, _ = load_with_mlx_lm(base)
    model = load_adapters(model, str(tmp_path / "out"))
    model.eval()
    prompt = mx.array(tokens()[0])
    steps = [int(t) for t, _ in zip((t for t, _ in generate_step(prompt, model)), range(5), strict=False)]
    full = tokens()[0].tolist()
    for step in steps:
        logits = np.array(adapter.loaded.model(mx.array([full])))[0, -1]
        assert step == logits.argmax()
        full.append(step)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_what_mlx_lm_has_no_place_for_is_refused(settings, named, tmp_path):
    base = mlx_base("qwen2", tmp_path / "base", tie_word_embeddings=False)
    adapter = adapt_mlx(load_mlx(base), {"r": 4, "target_modules": ["q_proj"], **settings})
    with pytest.raises(AdapterError, match=named) as refused:
        write_mlx_lm(adapter, tmp_path / "out")
    assert "hf-mlx merge" in refused.value.remedy
    assert not (tmp_path / "out").exists()


def damaged(tmp_path, change_config=None, change_tensors=None):
    base = mlx_base("llama", tmp_path / "base")
    folder = write_mlx_lm(adapt_mlx(load_mlx(base), {"r": 4, "target_modules": ["q_proj"]}), tmp_path / "out")
    if change_config:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(change_config(json.loads(path.read_text()))))
    if change_tensors:
        path = folder / "adapters.safetensors"
        tensors = {k: mx.array(np.array(v)) for k, v in mx.load(str(path)).items()}
        mx.save_safetensors(str(path), change_tensors(tensors))
    return folder, base


def first(tensors, leaf="lora_b"):
    return next(key for key in tensors if key.endswith(leaf))


DAMAGES = {
    "full": (lambda c: c | {"fine_tune_type": "full"}, None, "fine_tune_type='full'"),
    "no_scale": (lambda c: c | {"lora_parameters": {"rank": 4}}, None, "lora_parameters"),
    "rank_true": (lambda c: c | {"lora_parameters": {"rank": True, "scale": 1.0}}, None, "lora_parameters"),
    "other_rank": (lambda c: c | {"lora_parameters": {"rank": 5, "scale": 1.0}}, None, "of shape"),
    "one_missing": (None, lambda t: {k: v for k, v in t.items() if k != first(t)}, "is not there"),
    "nan": (None, lambda t: t | {first(t): t[first(t)] * float("nan")}, "NaN"),
    "stranger": (None, lambda t: t | {"model.norm.weight": mx.ones((4,))}, r"model.norm.weight"),
    "elsewhere": (None, lambda t: t | {"model.layers.9.q.lora_a": mx.ones((4, 4))}, r"model.layers.9.q"),
    "magnitude": (None, lambda t: t | {first(t).replace("lora_b", "m"): mx.ones((64,))}, r"\.m among"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_changes_nothing(damage, tmp_path):
    config, tensors, message = DAMAGES[damage]
    folder, base = damaged(tmp_path, config, tensors)
    loaded = load_mlx(base)
    before = logits_mlx(loaded.model)
    with pytest.raises(AdapterError, match=message):
        import_adapter(folder, loaded)
    assert np.array_equal(before, logits_mlx(loaded.model))
