"""The losses of preference training beside trl's own code, on the same log-probabilities."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")
dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")

from hf_mlx.settings.plan import PairLossPlan  # noqa: E402
from hf_mlx.training.pair_losses import LOSSES, Pairs, pair_loss  # noqa: E402

FIVE = 5
WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
CASES = [
    *[{"losses": ((name, 1.0),), "label_smoothing": 0.1} for name in LOSSES],
    *[
        {"losses": ((name, 1.0),), "label_smoothing": 0.05, "f_divergence_type": kind, "beta": 0.3}
        for name in WITH_DIVERGENCE
        for kind in ("forward_kl", "js_divergence", "alpha_divergence")
    ],
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 60.0},
    {"losses": (("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0))},
    {"losses": (("aot", 0.5), ("aot_unpaired", 2.0)), "beta": 0.5},
]


def test_every_loss_of_trl_is_here():
    config = dpo_trainer.DPOConfig.__dataclass_fields__["loss_type"]
    assert all(f"'{name}'" in config.metadata["help"] for name in LOSSES)
    assert config.metadata["help"].count("`'") == len(LOSSES) == 15


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradient_equal_trls(case):
    plan = PairLossPlan(**case)
    rng = np.random.default_rng(len(str(case)))
    # A micro-batch as trl lays it out: all chosen rows, then all rejected ones; the mask's first position has no logp.
    width = 9
    mask = np.zeros((2 * FIVE, width), np.int64)
    for row in mask:
        row[rng.integers(0, 4) : rng.integers(5, width + 1)] = 1
    by_token = (rng.normal(-1.2, 0.8, (2 * FIVE, width - 1)) * mask[:, 1:]).astype(np.float32)
    reference = (by_token.sum(1) + rng.normal(0, 2, 2 * FIVE)).astype(np.float32)
    loss, gradient = run_trl(plan, by_token, mask, reference)

    def ours(by_token):
        logps = by_token.sum(axis=1).reshape(2, FIVE).T
        chosen = mask[:FIVE, 1:].sum()
        pairs = Pairs(
            logps,
            mx.array(reference.reshape(2, FIVE).T),
            mx.array(mask.sum(1).reshape(2, FIVE).T.astype(np.float32)),
            -logps[:, 0] * (FIVE / float(chosen)),
            plan,
        )
        return pair_loss(pairs).mean()

    value, grad = mx.value_and_grad(ours)(mx.array(by_token))
    assert value.item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(np.array(grad) * mask[:, 1:], gradient * mask[:, 1:], rtol=2e-4, atol=1e-6)


def run_trl(plan: PairLossPlan, by_token, mask, reference):
    """``DPOTrainer._compute_loss`` behind a model that answers with these log-probabilities."""
    logps = torch.tensor(by_token, requires_grad=True)
    zeros = torch.zeros_like(logps)
    output = SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
        args=SimpleNamespace(discopop_tau=plan.discopop_tau),
        loss_types=[name for name, _ in plan.losses],
        loss_weights=[weight for _, weight in plan.losses],
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        ld_alpha=None,
        use_weighting=False,
        beta=plan.beta,
        label_smoothing=plan.label_smoothing,
        f_divergence_type=plan.f_divergence_type,
        f_alpha_divergence_coef=plan.f_alpha_divergence_coef,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros(mask.shape, dtype=torch.long),
        "attention_mask": torch.ones(mask.shape, dtype=torch.long),
        "completion_mask": torch.tensor(mask),
        "ref_chosen_logps": torch.tensor(reference[:FIVE]),
        "ref_rejected_logps": torch.tensor(reference[FIVE:]),
    }
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, lambda **_: output, inputs, False)
    loss.backward()
    return loss.item(), logps.grad.numpy()
