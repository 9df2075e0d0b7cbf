"""An optimizer and a schedule of the script's own, in torch: 20 steps beside trl's, every logged value and weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pairs
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_own_losses import CLOSE, LORA, ROWS, SETTINGS, STEPS, same
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import HFMLXError


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
    optimizer = torch.optim.NAdam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1, threshold=1.0)


def some(model: Any) -> tuple[Any, Any]:
    """Half of what is trained, which the rest's gradients are clipped with; the rest stays."""
    return torch.optim.Adam([p for n, p in model.named_parameters() if "layers.1." in n], lr=1e-2), None


BY_CLASS = {"optimizer_cls_and_kwargs": (torch.optim.RAdam, {"lr": 3e-3})}
CASES = {
    "groups, LoRA by name": (Groups, True, True),
    "groups, full, an object": (Groups, False, False),
    "Muon, LoRA on an object": (MuonLike, True, False),
    "Muon, full by name": (MuonLike, False, True),
    "OneCycle, LoRA on an object": (one_cycle, True, False),
    "OneCycle, full, an object": (one_cycle, False, False),
    "plateau, LoRA on an object": (plateau, True, False),
    "a schedule alone, LoRA by name": (Halving, True, True),
    "half of it, LoRA on an object": (some, True, False),
    "by class, full by name": (BY_CLASS, False, True),
}

QUICK = ("groups, LoRA by name", "OneCycle, full, an object")


def build(house: type, model: Any, folder: Any, own: Any, *, lora: bool, by_name: bool, **more: Any) -> Any:
    cls, keywords, settings = house, {}, {**pairs.SILENT, **SETTINGS, **more}
    peft_config = LoraConfig(**LORA) if lora else None
    model = str(model) if by_name else transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    if isinstance(own, type):
        cls = type(own.__name__, (own, house), {})
    elif isinstance(own, dict):
        keywords |= own
    else:
        if lora:
            torch.manual_seed(3)
            model, peft_config = get_peft_model(model, peft_config), None
        keywords["optimizers"] = own(model)
        settings["metric_for_best_model"] = "loss"
    return cls(
        model,
        SFTConfig(output_dir=str(folder / house.__name__), **settings),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:7]),
        processing_class=pairs.tokenizer(),
        peft_config=peft_config,
        **keywords,
    )


def run_case(house: type, model: Any, folder: Any, case: str, **more: Any) -> Any:
    own, lora, by_name = CASES[case]
    trainer = build(house, model, folder, own, lora=lora, by_name=by_name, **more)
    trainer.train()
    return trainer


def weights(trainer: Any) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pairs.tiny_model("llama", tmp_path_factory.mktemp("own") / "base", hidden_size=32, intermediate_size=48)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.wide) for case in CASES]
)
def test_twenty_steps_are_trls(case, model, tmp_path):
    theirs, ours = (run_case(house, model, tmp_path, case) for house in (SFTTrainer, MLXSFTTrainer))
    assert same(theirs, ours) >= 4 * STEPS
    found, wanted = weights(ours), weights(theirs)
    assert found.keys() == wanted.keys()
    assert len(found) > 0
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=CLOSE, err_msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["groups, LoRA by name", "OneCycle, LoRA on an object"])
@pytest.mark.wide
@pytest.mark.parametrize("houses", [(SFTTrainer, MLXSFTTrainer), (MLXSFTTrainer, SFTTrainer), (MLXSFTTrainer,) * 2])
def test_a_run_resumes_in_both_directions(case, houses, model, tmp_path):
    first, second = houses
    settings = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "no"}
    whole = run_case(SFTTrainer, model, tmp_path / "whole", case, max_steps=8, **settings)
    run_case(first, model, tmp_path / "first", case, max_steps=8, **settings)
    own, lora, by_name = CASES[case]
    trainer = build(second, model, tmp_path / "second", own, lora=lora, by_name=by_name, max_steps=8, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "first" / first.__name__ / "checkpoint-4"))
    for a, b in zip(whole.state.log_history[4:8], trainer.state.log_history[4:8], strict=True):
        assert abs(a["loss"] - b["loss"]) <= CLOSE
        assert abs(a["grad_norm"] - b["grad_norm"]) <= CLOSE
        assert a["learning_rate"] == pytest.approx(b["learning_rate"], rel=1e-9)


class Both:
    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, 0.5)


@pytest.mark.filterwarnings("ignore")
def test_what_transformers_no_longer_calls_is_called_and_said(model, tmp_path, caplog):
    trainer = build(MLXSFTTrainer, model, tmp_path, Both, lora=False, by_name=True, max_steps=1, eval_strategy="no")
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 0.25
    assert sum("create_optimizer_and_scheduler" in record.message for record in caplog.records) == 1
    assert sum("all weights, so this is slow" in record.message for record in caplog.records) == 1


@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_assigned_before_train_takes_the_steps(model, tmp_path):
    case = {"optimizer_cls_and_kwargs": None}
    trainer = build(MLXSFTTrainer, model, tmp_path, case, lora=True, by_name=True, max_steps=1, eval_strategy="no")
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.optimizer = torch.optim.SGD(trained, lr=0.125)
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 0.125


def test_an_optimizer_over_frozen_weights_is_refused(model, tmp_path):
    def frozen(model: Any) -> tuple[Any, Any]:
        return torch.optim.SGD([p for p in model.parameters() if not p.requires_grad], lr=0.1), None

    trainer = build(MLXSFTTrainer, model, tmp_path, frozen, lora=True, by_name=False, max_steps=1, eval_strategy="no")
    with pytest.raises(HFMLXError, match="frozen parameters alone"):
        trainer.train()
