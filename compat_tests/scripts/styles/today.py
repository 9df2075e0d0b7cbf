"""What the references share: the same run, as TRL of today writes it for a CPU."""

import json
from pathlib import Path

from trl import SFTConfig

QUIET = {"report_to": "none", "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3, "disable_tqdm": True}
STEPS = {"max_steps": 3, "per_device_train_batch_size": 2}


def settings(output, **more):
    """Today's configuration in fp32 on a CPU."""
    return SFTConfig(output, bf16=False, use_cpu=True, **QUIET | STEPS | more)


def record(trainer, output):
    """Keep the losses where the test reads them."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    Path(output, "losses.json").write_text(json.dumps(losses))
