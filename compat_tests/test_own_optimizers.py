"""An optimizer and a schedule of the script's own, in torch: 20 steps beside trl's, every logged value and weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from own_runs import (
    CLOSE,
    CLOSE_WEIGHTS,
    STEPS,
    Case,
    build,
    largest_difference,
    ours,
    relative_norm,
    run,
    same_log,
    theirs,
)
from transformers import TrainerCallback
from trl import SFTTrainer

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import HFMLXError

# torch's own Muon makes matrices orthogonal in bfloat16, where the last bit of a gradient is 4e-3 of a step.
CLOSE_BF16 = 1e-3


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal, and plain momentum for the rest."""

    def __init__(self, params: Any, lr: float = 0.02, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = buffer
                if p.ndim == 2:
                    x = buffer / (buffer.norm() + 1e-7)
                    for _ in range(3):
                        x = 1.5 * x - 0.5 * x @ x.T @ x if x.shape[0] <= x.shape[1] else 1.5 * x - 0.5 * x @ (x.T @ x)
                    update = x
                p.add_(update, alpha=-group["lr"])


def groups(model: Any) -> list[dict[str, Any]]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    last = [p for name, p in named if "layers.1." in name]
    rest = [p for name, p in named if "layers.1." not in name]
    return [{"params": last, "lr": 5e-3, "weight_decay": 0.1}, {"params": rest, "lr": 1e-3}]


class Groups:
    """Two groups, each with its rate, and the schedule that the arguments name."""

    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = torch.optim.AdamW(groups(self.model), betas=(0.9, 0.95))
        return self.optimizer


class MuonLike:
    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = Muon([p for p in self.model.parameters() if p.requires_grad], lr=2e-3)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, lambda step: 1 / (1 + step))
        return self.lr_scheduler


class Halving:
    """The trainer's own optimizer with another schedule."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer or self.optimizer, 3, gamma=0.5)
        return self.lr_scheduler


def one_cycle(model: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS + 5)


def plateau(model: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.NAdam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1, threshold=1.0)


def some(model: Any) -> tuple[Any, Any]:
    """Half of what is trained, which the rest's gradients are clipped with; the rest stays."""
    return torch.optim.Adam([p for n, p in model.named_parameters() if "layers.1." in n], lr=1e-2), None


def restarts(model: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5)


def torch_muon(model: Any) -> tuple[Any, Any]:
    return torch.optim.Muon([p for p in model.parameters() if p.requires_grad and p.ndim == 2], lr=2e-3), None


BY_CLASS = (("optimizer_cls_and_kwargs", (torch.optim.SGD, (("lr", 0.05), ("momentum", 0.9)))),)
CASES = {
    "groups, LoRA by name": Case(True, mixin=Groups),
    "groups, full, an object": Case(False, False, mixin=Groups),
    "Muon, LoRA on an object": Case(True, False, mixin=MuonLike),
    "Muon, full by name": Case(False, mixin=MuonLike),
    "torch's Muon, LoRA": Case(True, False, optimizers=torch_muon),
    "torch's Muon, full": Case(False, False, optimizers=torch_muon),
    "OneCycle, LoRA on an object": Case(True, False, optimizers=one_cycle),
    "OneCycle, full, an object": Case(False, False, optimizers=one_cycle),
    "restarts, LoRA on an object": Case(True, False, optimizers=restarts),
    "restarts, full, an object": Case(False, False, optimizers=restarts),
    "plateau, LoRA on an object": Case(True, False, optimizers=plateau),
    "plateau, full, an object": Case(False, False, optimizers=plateau),
    "a schedule alone, LoRA by name": Case(True, mixin=Halving),
    "half of it, LoRA on an object": Case(True, False, optimizers=some),
    "by class, full by name": Case(False, keywords=BY_CLASS),
}
QUICK = ("groups, LoRA by name", "OneCycle, full, an object")
# Adam's kin divide each gradient by its own size.
DIVIDING = ("groups", "plateau", "a schedule", "half")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.wide) for c in CASES])
def test_twenty_steps_are_trls(case):
    a, b = theirs(CASES[case]), ours(CASES[case])
    rounded = case.startswith("torch's Muon")
    assert same_log(a.log, b.log, close=CLOSE_BF16 if rounded else CLOSE) >= 4 * STEPS
    assert a.rates == pytest.approx(b.rates, rel=1e-9)
    assert len(a.rates) == (2 if case.startswith(("groups", "a schedule", "by class")) else 1)
    difference = (relative_norm if case.startswith(DIVIDING) else largest_difference)(a, b)
    assert difference <= (10 * CLOSE_BF16 if rounded else CLOSE_WEIGHTS)


@pytest.mark.parametrize("case", ["groups, LoRA by name", "OneCycle, LoRA on an object"])
@pytest.mark.wide
@pytest.mark.parametrize("houses", [(SFTTrainer, MLXSFTTrainer), (MLXSFTTrainer, SFTTrainer), (MLXSFTTrainer,) * 2])
def test_a_run_resumes_in_both_directions(case, houses, tmp_path):
    first, second = houses
    asked = CASES[case].asking(max_steps=8, save_strategy="steps", save_steps=4, eval_strategy="no")
    whole = theirs(asked)
    run(first, asked, tmp_path / "first")
    resumed = run(second, asked, tmp_path / "second", resume=str(tmp_path / "first" / "checkpoint-4"))
    for a, b in zip(whole.log[4:8], resumed.log[4:8], strict=True):
        assert abs(a["loss"] - b["loss"]) <= CLOSE
        assert abs(a["grad_norm"] - b["grad_norm"]) <= CLOSE
        assert a["learning_rate"] == pytest.approx(b["learning_rate"], rel=1e-9)


class Torchs:
    """torch's own optimizer for the arguments, in the place of the compiled one."""

    def create_optimizer(self, model: Any = None) -> Any:
        return super().create_optimizer(model)


class Changes(TrainerCallback):
    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == 2:
            for number, group in enumerate(optimizer.param_groups):
                group["weight_decay"], group["betas"], group["lr"] = 0.5 * number, (0.5, 0.9), 0.01 * (1 + number)


def test_groups_of_torchs_own_optimizer_may_change_at_any_time():
    # Beside 1e-8 the rounding of a gradient of 2e-7 changes its element's first step by some parts of 1e4.
    asked = Case(True, False, mixin=Torchs).asking(max_steps=5, eval_strategy="no", adam_epsilon=1e-4)
    a, b = (run(house, asked, callbacks=[Changes()]) for house in (SFTTrainer, MLXSFTTrainer))
    assert same_log(a.log, b.log) >= 4 * 5
    assert relative_norm(a, b) <= CLOSE_WEIGHTS


class Both:
    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, 0.5)


@pytest.mark.filterwarnings("ignore")
def test_what_transformers_no_longer_calls_is_called_and_said(tmp_path, caplog):
    trainer = build(MLXSFTTrainer, Case(False, mixin=Both).asking(max_steps=1, eval_strategy="no"), tmp_path)
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 0.25
    assert sum("create_optimizer_and_scheduler" in record.message for record in caplog.records) == 1
    assert sum("all weights, so this is slow" in record.message for record in caplog.records) == 1


@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_assigned_before_train_takes_the_steps(tmp_path):
    trainer = build(MLXSFTTrainer, Case(True).asking(max_steps=1, eval_strategy="no"), tmp_path)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.optimizer = torch.optim.SGD(trained, lr=0.125)
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 0.125


def test_an_optimizer_over_frozen_weights_is_refused(tmp_path):
    def frozen(model: Any) -> tuple[Any, Any]:
        return torch.optim.SGD([p for p in model.parameters() if not p.requires_grad], lr=0.1), None

    asked = Case(True, False, optimizers=frozen).asking(max_steps=1, eval_strategy="no")
    trainer = build(MLXSFTTrainer, asked, tmp_path)
    with pytest.raises(HFMLXError, match="frozen parameters alone"):
        trainer.train()
