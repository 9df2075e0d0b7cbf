"""The optimizers beside torch's and transformers' own: 50 compiled steps on random tensors."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from transformers.optimization import Adafactor
from transformers.trainer_optimizer import _parse_optim_args

from hf_mlx.settings.plan import OptimPlan
from hf_mlx.training.optim import decay_names, make_optimizer

STEPS = 50
# Largest difference over the largest parameter. float32 rounds at 6e-8 and 50 steps add up in a random walk.
FLOAT32 = 1e-6
# One unit in the last place of bfloat16, relative to the value.
BFLOAT16 = 2**-7
SHAPES = {"matrix": (8, 64), "vector": (64,), "conv": (3, 4, 8, 8), "exempt": (8, 16)}
BETAS = {"betas": (0.9, 0.95), "eps": 1e-6}
ADAMW = OptimPlan("adamw", weight_decay=0.1, adam_beta2=0.95, adam_epsilon=1e-6)


def _plan(name: str, **options) -> OptimPlan:
    return OptimPlan(name, weight_decay=0.1, options=options)


CASES: dict[str, tuple[OptimPlan, Callable]] = {
    "adamw_torch": (ADAMW, lambda groups: torch.optim.AdamW(groups, lr=1, foreach=False, **BETAS)),
    "adamw_torch_fused": (ADAMW, lambda groups: torch.optim.AdamW(groups, lr=1, fused=True, **BETAS)),
    "adafactor": (_plan("adafactor"), lambda groups: Adafactor(groups, 1, scale_parameter=False, relative_step=False)),
}
for _name, _class, _all_options in (
    ("sgd", torch.optim.SGD, ({}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3})),
    ("sgd", torch.optim.SGD, ({"momentum": 0.8, "nesterov": True},)),
    ("adagrad", torch.optim.Adagrad, ({}, {"lr_decay": 0.1, "eps": 1e-8})),
    ("rmsprop", torch.optim.RMSprop, ({}, {"momentum": 0.9}, {"centered": True})),
    ("rmsprop", torch.optim.RMSprop, ({"momentum": 0.5, "alpha": 0.9, "eps": 1e-6, "centered": True},)),
):
    for _options in _all_options:
        CASES[f"{_name}-{','.join(_options)}"] = (
            _plan(_name, **_options),
            lambda groups, made=_class, options=_options: made(groups, lr=1, **options),
        )


def _run(plan: OptimPlan, make: Callable, dtype: str = "float32", scale: float | None = 0.37):
    """Both sides over the same gradients; returns (parameters, state) of ours and the torch pair."""
    draw = np.random.default_rng(0)
    start = {name: draw.standard_normal(shape).astype(np.float32) * 0.1 for name, shape in SHAPES.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(value).to(getattr(torch, dtype))) for name, value in start.items()}
    groups = [
        {"params": [theirs[name] for name in SHAPES if name != "exempt"], "weight_decay": plan.weight_decay},
        {"params": [theirs["exempt"]], "weight_decay": 0.0},
    ]
    reference = make(groups)
    optimizer = make_optimizer(plan, frozenset(SHAPES) - {"exempt"})
    params = {name: mx.array(value).astype(getattr(mx, dtype)) for name, value in start.items()}
    state = optimizer.init(params)
    update = mx.compile(optimizer.update)
    for step in range(1, STEPS + 1):
        lr = 1e-2 * (1 - (step - 1) / STEPS) if step > 1 else 0.0  # a warmup's first step
        scales = 10 ** draw.uniform(-4, 0)
        values = {name: (draw.standard_normal(shape) * scales).astype(np.float32) for name, shape in SHAPES.items()}
        for group in reference.param_groups:
            group["lr"] = lr
        for name, value in values.items():
            grad = torch.tensor(value).to(theirs[name].dtype)
            theirs[name].grad = grad if scale is None else grad * scale
        reference.step()
        grads = {name: mx.array(value).astype(getattr(mx, dtype)) for name, value in values.items()}
        hyper = {name: mx.array(value, mx.float32) for name, value in optimizer.hyper(step, lr).items()}
        params, state = update(params, grads, state, hyper, None if scale is None else mx.array(scale))
    return params, state, theirs, reference


def _difference(ours: mx.array, theirs: torch.Tensor) -> float:
    """Largest absolute difference over the largest value."""
    theirs = theirs.detach().float().numpy()
    return float(np.abs(np.array(ours.astype(mx.float32)) - theirs).max() / np.abs(theirs).max())


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("case", CASES)
def test_float32_trajectory_and_state_equal_torch(case):
    plan, make = CASES[case]
    params, state, theirs, reference = _run(plan, make)
    assert {name: _difference(params[name], theirs[name]) for name in SHAPES} == pytest.approx(
        dict.fromkeys(SHAPES, 0), abs=FLOAT32
    )
    compared = 0
    for slot, arrays in state.items():
        for name, array in arrays.items():
            assert _difference(array, reference.state[theirs[name]][slot]) <= FLOAT32, (slot, name)
            compared += 1
    # Every tensor of torch's state is here under torch's name, but for counters.
    counters = {"step", "RMS"}
    assert compared == sum(len(reference.state[p].keys() - counters) for p in theirs.values() if p in reference.state)


@pytest.mark.parametrize("scale", [None, 0.37], ids=["unclipped", "clipped"])
def test_bfloat16_adamw_equals_the_fused_kernel(scale):
    params, state, theirs, _ = _run(ADAMW, CASES["adamw_torch_fused"][1], "bfloat16", scale)
    assert {array.dtype for array in state["exp_avg"].values()} == {mx.bfloat16}
    unequal = elements = 0
    for name in SHAPES:
        ours, torchs = np.array(params[name].astype(mx.float32)), theirs[name].detach().float().numpy()
        assert np.allclose(ours, torchs, rtol=BFLOAT16, atol=0), name
        unequal, elements = unequal + int((ours != torchs).sum()), elements + ours.size
    assert elements == 1472
    # The float32 sums differ in the last bit, which now and then falls on the edge between two bfloat16 values.
    assert unequal <= elements * 0.002


def test_bfloat16_adafactor_keeps_float32_state():
    params, state, theirs, _ = _run(_plan("adafactor"), CASES["adafactor"][1], "bfloat16")
    assert {array.dtype for arrays in state.values() for array in arrays.values()} == {mx.float32}
    # A mean taken in another order may round a parameter to the bfloat16 next to it.
    for name in SHAPES:
        assert _difference(params[name], theirs[name]) <= BFLOAT16, name


class Names(torch.nn.Module):
    """Modules with the names and classes that real models have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(4, 4)
        self.ln_1 = torch.nn.LayerNorm(4)
        self.input_layernorm = torch.nn.RMSNorm(4)
        self.q_norm = torch.nn.RMSNorm(4)
        self.norm = torch.nn.RMSNorm(4)
        self.normalizer = torch.nn.Linear(4, 4)
        self.Norm = torch.nn.Linear(4, 4)
        self.final_norm_2 = torch.nn.RMSNorm(4)
        self.lora_magnitude_vector = torch.nn.ParameterDict({"default": torch.nn.Parameter(torch.ones(4))})
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4, bias=True)])


def test_decay_applies_to_the_names_that_the_trainer_chooses(tmp_path):
    model = torch.nn.ModuleDict({"base": Names(), "lora_A": torch.nn.Linear(4, 2), "lnf": torch.nn.LayerNorm(2)})
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    chosen = transformers.Trainer(model, args).get_decay_parameter_names(model)
    names = [name for name, _ in model.named_parameters()]
    norms = [name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)]
    assert decay_names(names, norms) == set(chosen)
    assert 0 < len(chosen) < len(names) == 18


def test_the_options_are_those_that_the_trainer_reads(tmp_path):
    read = {
        "sgd": "momentum=0.9,dampening=0.1",
        "adagrad": "lr_decay=0.1,eps=1e-8",
        "rmsprop": "momentum=0.9,alpha=0.9,eps=1e-6,centered=true",
    }
    for name, text in read.items():
        args = transformers.TrainingArguments(str(tmp_path), optim=name, optim_args=text, use_cpu=True)
        _, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args)
        options = {key: kwargs[key] for key in _parse_optim_args(text)}
        assert make_optimizer(OptimPlan(name, options=options), frozenset()).options.items() >= options.items()
    assert len(read) == 3
