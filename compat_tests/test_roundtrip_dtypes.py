"""The four dtype rows: what PEFT computes under autocast and on bf16 bases, and that masters stay fp32."""

import contextlib

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from adapter_pairs import adapt_mlx, load_mlx, load_torch, make_base, quiet

from hf_mlx.adapters.export import export_adapter
from hf_mlx.models.precision import apply_autocast
from hf_mlx.settings.plan import PrecisionPlan

ROWS = {
    "fp32": ("float32", None),
    "fp32 under bf16 autocast": ("float32", "bfloat16"),
    "bf16 under bf16 autocast": ("bfloat16", "bfloat16"),
    "bf16": ("bfloat16", None),
}
# Relative to the largest output. fp32: another order of summation. bf16 keeps 8 bits, and such sums fall on
# either side of a rounding now and then: one unit in the last place.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base("llama", tmp_path_factory.mktemp("base"), tie_word_embeddings=False)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("row", ROWS)
def test_a_layer_computes_in_pefts_dtypes(base, tmp_path, row, use_dora):
    dtype, autocast = ROWS[row]
    loaded = load_mlx(base, precision=PrecisionPlan(dtype=dtype, autocast=autocast))
    if autocast:
        apply_autocast(loaded.model, getattr(mx, autocast))
    compute = getattr(mx, autocast) if autocast else mx.float32
    adapter = adapt_mlx(loaded, {"r": 4, "use_dora": use_dora, "target_modules": ["q_proj"]}, compute_dtype=compute)
    assert {value.dtype for value in adapter.trainable().values()} == {mx.float32}
    export_adapter(adapter, tmp_path / "adapter")
    with quiet():
        model = load_torch(base, dtype=getattr(torch, dtype))
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    layer = theirs.base_model.model.model.layers[1].self_attn.q_proj
    x = np.random.RandomState(1).standard_normal((3, 7, 64)).astype(np.float32)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.no_grad(), context:
        expected = layer(torch.tensor(x).to(getattr(torch, dtype)))
    got = loaded.model.layers[1].self_attn.q_proj(mx.array(x).astype(getattr(mx, dtype)))
    assert str(got.dtype).rsplit(".", 1)[-1] == str(expected.dtype).rsplit(".", 1)[-1]
    difference = np.abs(np.array(got.astype(mx.float32)) - expected.float().numpy())
    assert difference.max() / np.abs(expected.float().numpy()).max() <= TOLERANCE[autocast or dtype]
    # One-sided rounding would show in the mean long before it shows in the maximum.
    assert abs((np.array(got.astype(mx.float32)) - expected.float().numpy()).mean()) <= 1e-3


def test_modules_trained_in_full_keep_the_bases_dtype(base):
    loaded = load_mlx(base, precision=PrecisionPlan(dtype="bfloat16"))
    adapter = adapt_mlx(loaded, {"modules_to_save": ["lm_head"]}, moved=False)
    with quiet():
        model = load_torch(base, dtype=torch.bfloat16)
        theirs = peft.get_peft_model(model, peft.LoraConfig(modules_to_save=["lm_head"]))
    expected = [str(p.dtype).rsplit(".", 1)[-1] for p in theirs.parameters() if p.requires_grad]
    ours = [str(v.dtype).rsplit(".", 1)[-1] for v in adapter.trainable().values()]
    assert ours == expected
    assert set(ours) == {"float32", "bfloat16"}
