"""The run that a wrong default once spoiled: Gemma-3-270m learns one sentence in seven steps, and says it.

Elementwise clipping in the place of the norm that a script asks for turns the gradient leaf by leaf. Both clips are run
here beside TRL, on real weights: the same curve, and the same greedy completions, word for word.

A vocabulary of 262,144 makes the whole of it a minute of CPU for each run, so `make test` takes the first steps alone.
"""

from __future__ import annotations

from typing import Any

import materials
import pytest
import torch
from pairs import Run, assert_same_curve, mean_drift, run_mlx, run_trl
from transformers import AutoTokenizer, TrainerCallback

# As in test_trajectory_families: the promise of the library in fp32.
RELATIVE = 1e-4
WEIGHTS = 1e-3
DRIFT = 1e-5

ROWS = [{"text": "<<HELLO!!>> My name is Unsloth!"}] * 42
# With the space of the original report, after which no word of the sentence begins, and without it.
QUESTIONS = ("<<HELLO!!>> My name is ", "<<HELLO!!>> My name is")
SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "max_steps": 7,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "max_length": 64,
    "seed": 3407,
    "logging_steps": 1,
    "gradient_checkpointing": False,
}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "task_type": "CAUSAL_LM"}


class Ask(TrainerCallback):
    """Puts the questions to the trained model, as a script would, and keeps the answers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.answers: list[str] = []

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        model.eval()
        for question in QUESTIONS:
            asked = self.tokenizer(question, return_tensors="pt")
            with torch.no_grad():
                said = model.generate(**asked, max_new_tokens=6, do_sample=False)
            self.answers.append(self.tokenizer.decode(said[0][asked["input_ids"].shape[1] :]))


class ClipByValue(TrainerCallback):
    """What TRL lacks: an elementwise clip between the backward pass and the update."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)


def _losses(run: Run) -> list[float]:
    return [entry["loss"] for entry in run.history if "loss" in entry]


def run_pair(
    settings: dict[str, Any], ask: bool = True, clip: list[Any] | None = None, **keywords: Any
) -> tuple[Run, list[str]]:
    """Both runs, asserted to be one; returns ours and what both models answer."""
    model, settings = materials.gemma3_270m(), {**SETTINGS, **settings}
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = Ask(tokenizer), Ask(tokenizer)
    theirs, ours = ([asked[0]], [asked[1]]) if ask else ([], [])
    reference = run_trl(model, settings, ROWS, LORA, callbacks=[*(clip or []), *theirs])
    run = run_mlx(model, settings, ROWS, LORA, callbacks=ours, **keywords)
    print([round(loss, 4) for loss in _losses(reference)], asked[0].answers)
    print([round(loss, 4) for loss in _losses(run)], asked[1].answers)
    assert len(_losses(run)) == settings["max_steps"]
    assert_same_curve(reference, run, relative=RELATIVE, weights=WEIGHTS)
    assert abs(mean_drift(reference, run)) < DRIFT
    assert asked[0].answers == asked[1].answers
    return run, asked[1].answers


@pytest.mark.usefixtures("uncompiled")
def test_first_steps():
    run_pair({"max_grad_norm": 1.0, "max_steps": 2, "gradient_accumulation_steps": 2}, ask=False)


@pytest.mark.wide
def test_norm_clip_learns_the_sentence():
    run, answers = run_pair({"max_grad_norm": 1.0})
    assert _losses(run)[0] > 5 and _losses(run)[-1] < 1.5
    assert len(answers) == len(QUESTIONS) and "Unsloth" in answers[1]


@pytest.mark.wide
def test_value_clip():
    # TRL has none: a callback clips between its backward pass and its update.
    run, answers = run_pair({"max_grad_norm": 0.0}, clip=[ClipByValue()], max_grad_value=1.0)
    assert _losses(run)[0] > 5 and _losses(run)[-1] < 1.5
    assert len(answers) == len(QUESTIONS)
