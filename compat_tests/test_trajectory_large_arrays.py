"""TRL's curve where trained arrays are so large that an update lets each old one go: full training, by optimizer."""

import mlx.core as mx
import numpy as np
import pytest
from datasets import Dataset
from pairs import SILENT, assert_same_curve, rows_of, run_both, tiny_model, tokenizer
from transformers import TrainerCallback
from trl import SFTConfig

from hf_mlx import MLXSFTTrainer

# 20,000 x 64 numbers: above what is kept end to end.
VOCABULARY = 20_000
SETTINGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "max_length": 24,
    "gradient_checkpointing": False,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
}
CASES = {
    "adamw": {},
    "accumulated": {"gradient_accumulation_steps": 3, "learning_rate": 2e-4},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true", "learning_rate": 1e-2},
    "rmsprop": {"optim": "rmsprop", "optim_args": "momentum=0.5,centered=true,eps=0.01"},
    "adafactor": {"optim": "adafactor"},
    "no clip": {"max_grad_norm": 0.0},
    "in pieces": {"auto_find_batch_size": True},
}
ROWS = rows_of("prompt", 12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(tied):
        if tied not in made:
            folder = tmp_path_factory.mktemp("large")
            made[tied] = tiny_model("llama", folder, vocab_size=VOCABULARY, tie_word_embeddings=tied)
        return made[tied]

    return get


@pytest.mark.parametrize(
    "name", [name if name in ("accumulated", "sgd") else pytest.param(name, marks=pytest.mark.wide) for name in CASES]
)
def test_the_curve_is_trls(name, folders):
    tied = name in ("sgd", "in pieces")
    theirs, ours = run_both(str(folders(tied)), {**SETTINGS, **CASES[name]}, ROWS, None)
    assert assert_same_curve(theirs, ours, relative=1e-4, weights=2e-5) >= 28
    assert max(array.size for array in ours.weights.values()) == VOCABULARY * 64


def test_callbacks_see_gradients_and_the_step_is_the_same(folders, tmp_path):
    norms = []

    class Sees(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            norms.append(sum(float((p.grad**2).sum()) for p in model.parameters()) ** 0.5)

    def train(*callbacks):
        args = SFTConfig(output_dir=str(tmp_path), **{**SILENT, **SETTINGS, "max_grad_norm": 0.0})
        rows = Dataset.from_list(ROWS)
        trainer = MLXSFTTrainer(str(folders(False)), args, train_dataset=rows, callbacks=list(callbacks))
        trainer.train()
        return trainer

    plain, seen = train(), train(Sees())
    logged = [entry["grad_norm"] for entry in plain.state.log_history if "grad_norm" in entry]
    assert norms == pytest.approx(logged, rel=1e-5) and len(logged) == 4
    for name, array in plain.session.step.params.items():
        assert mx.abs(array - seen.session.step.params[name]).max().item() <= 1e-6, name


def test_what_fails_in_a_step_leaves_the_weights_of_the_last(folders, tmp_path):
    class Breaks(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise ValueError("stop here")

    args = SFTConfig(output_dir=str(tmp_path), **{**SILENT, **SETTINGS})
    made = []
    for steps, callbacks in ((2, []), (4, [Breaks()])):
        args.max_steps = steps
        args.lr_scheduler_type = "constant"
        trainer = MLXSFTTrainer(
            str(folders(False)), args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer(),
            callbacks=callbacks,
        )  # fmt: skip
        if callbacks:
            with pytest.raises(ValueError, match="stop here"):
                trainer.train()
        else:
            trainer.train()
        made.append({name: np.array(array) for name, array in trainer.session.step.params.items()})
    assert all(np.array_equal(made[0][name], made[1][name]) for name in made[0])
