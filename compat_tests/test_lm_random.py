"""Random scripts of transformers.Trainer, drawn from a printed seed: every log entry of MLXTrainer is the same.

``HF_MLX_SEED=7 pytest compat_tests/test_lm_random.py`` draws other ones.
"""

import os
from typing import Any

import pytest
from draws import numbered
from lm_draws import draw, with_own_loss
from lm_pairs import load, run
from pairs import assert_same_log, tiny_model, untimed
from transformers import Trainer

from hf_mlx import MLXTrainer

# PEFT warns of some of what is drawn.
pytestmark = pytest.mark.filterwarnings("ignore")

# The promise of the library in fp32.
RELATIVE = 1e-4
SEED = int(os.environ.get("HF_MLX_SEED", "20260"))
SAMPLE, ALL = 2, 64


def check(index: int, folder: Any) -> None:
    script = draw(f"{SEED}-{index}")
    print(f"HF_MLX_SEED={SEED} #{index}: {script}")
    tiny_model(script.family, folder, seed=index, **script.model)
    logs = []
    for cls in (Trainer, MLXTrainer):
        kind = with_own_loss(cls) if script.loss == "compute_loss" else cls
        log, _ = run(kind, load(folder, script.lora), script.settings, **script.keywords())
        logs.append(untimed(log))
    # A batch without labels has a loss of NaN, which metrics see.
    assert_same_log(*logs, relative=RELATIVE, nan_ok=True)
    assert len(logs[1]) >= 2


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("index", numbered(SAMPLE, ALL))
def test_a_drawn_script_logs_what_transformers_logs(index, tmp_path):
    check(index, tmp_path)
