"""What float32 rounds: no operation is systematically further from float64 than torch's own float32 is."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from datasets import Dataset
from pairs import SILENT, tiny_model
from peft import LoraConfig, get_peft_model
from record_ranks import Doubled
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_mlx import MLXTrainer
from hf_mlx.models.cpu_norms import layer_norm, rms_norm
from hf_mlx.models.load import load_model
from hf_mlx.settings.plan import ModelPlan

# How much further than torch, which adds in another order. MLX's own RMSNorm is 3 times as far at 60 features (its
# weight's gradient) and 4 times at 1,024.
OPERATION = 1.4
# The geometric mean over all arrays and draws; 1.10 at this size before norms and frequencies were torch's.
GRADIENTS = 1.05
# Of a turned number of some 1, float32: sines and cosines of the same angle, and one sum.
TURNED = 1e-6
EPS = 1e-6


def distance(found: Any, exact: torch.Tensor) -> float:
    """Root mean square, relative to that of ``exact``."""
    values = exact.detach().double().numpy()
    return float(np.sqrt(np.square(np.asarray(found, np.float64) - values).mean() / np.square(values).mean()))


@pytest.mark.parametrize("features", [300, 1024])
@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_norms_and_their_gradients_round_as_torch(kind: str, features: int) -> None:
    draw = np.random.default_rng(features)
    weights = [draw.normal(1, 0.1, features), draw.normal(0, 0.1, features)][: 1 if kind == "rms_norm" else 2]
    given = [array.astype(np.float32) for array in (draw.normal(0.1, 1, (407, features)), *weights)]
    slope = draw.normal(0, 1, (407, features)).astype(np.float32)

    def upstream(dtype: torch.dtype) -> list[torch.Tensor]:
        x, *weights = [torch.tensor(array, dtype=dtype, requires_grad=True) for array in given]
        if kind == "rms_norm":
            made = weights[0] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))
        else:
            made = torch.nn.functional.layer_norm(x, (features,), weights[0], weights[1], EPS)
        return [made, *torch.autograd.grad(made, [x, *weights], torch.tensor(slope, dtype=dtype))]

    norm: Any = {"rms_norm": rms_norm, "layer_norm": layer_norm}[kind]
    (made,), grads = mx.vjp(lambda *args: norm(*args, EPS), [mx.array(array) for array in given], [mx.array(slope)])
    theirs, exact = upstream(torch.float32), upstream(torch.float64)
    ours = [made, *grads]
    assert len(ours) == len(exact) == 2 + len(weights)
    for found, upstreams, value in zip(ours, theirs, exact, strict=True):
        assert distance(found, value) <= OPERATION * distance(upstreams.detach(), value)


@pytest.mark.parametrize(("theta", "head"), [(1e4, 64), (5e5, 128), (1e6, 128)])
def test_heads_turn_as_in_transformers_far_into_a_row(theta: float, head: int, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": theta}
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "head_dim": head,
        "num_hidden_layers": 1,
        "max_position_embeddings": 8192,
    }
    folder = tiny_model("llama", tmp_path / "model", rope_parameters=rope, **sizes)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours: Any = load_model(folder, ModelPlan()).model
    heads = torch.randn(1, 2, 8192, head, generator=torch.Generator().manual_seed(1))
    cosines, sines = theirs.model.rotary_emb(heads, torch.arange(8192)[None])
    turned, _ = apply_rotary_pos_emb(heads, heads, cosines, sines)
    found = ours.layers[0].self_attn.rope(mx.array(heads.numpy()))
    assert found.shape == (1, 2, 8192, head)
    assert np.abs(np.array(found) - turned.numpy()).max() <= TURNED * float(heads.abs().max())


def test_gradients_are_as_far_from_float64_as_torchs(tmp_path: Path) -> None:
    """Adapters whose B is not 0, so that every array has a gradient; the same weights on all sides."""
    folder = tiny_model("llama", tmp_path / "model", hidden_size=256, intermediate_size=256)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    draw, generator = np.random.default_rng(3), torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    lora: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02, generator=generator)
    doubled = copy.deepcopy(lora).double()
    rows = [{"input_ids": (ids := draw.integers(0, 250, 120).tolist()), "labels": ids} for _ in range(8)]
    seen: list[dict[str, np.ndarray]] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            seen.append({name: grad.numpy().copy() for name, grad in named.items()})

    tokenizer = AutoTokenizer.from_pretrained(folder)
    still = {"per_device_train_batch_size": 2, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 1e-30}
    logging.disable(logging.WARNING)
    trainer = MLXTrainer(
        lora,
        TrainingArguments(
            str(tmp_path / "out"), num_train_epochs=1, train_sampling_strategy="sequential", **{**SILENT, **still}
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[Look()],
    )
    trainer.train()
    logging.disable(logging.NOTSET)
    ratios = []
    for step, found in enumerate(seen):
        ids = torch.tensor([row["input_ids"] for row in rows[2 * step : 2 * step + 2]])
        lora.zero_grad()
        doubled.zero_grad()
        lora(input_ids=ids, labels=ids).loss.backward()
        with Doubled():
            doubled(input_ids=ids, labels=ids).loss.backward()
        theirs = {name: p.grad for name, p in lora.named_parameters() if p.grad is not None}
        exact = {name: p.grad for name, p in doubled.named_parameters() if p.grad is not None}
        assert found.keys() == theirs.keys() == exact.keys() and len(found) == 28
        ratios += [distance(found[name], exact[name]) / distance(theirs[name], exact[name]) for name in found]
    assert len(ratios) == 4 * 28
    assert np.exp(np.log(ratios).mean()) <= GRADIENTS
