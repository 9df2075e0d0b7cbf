"""HF's metric files and tables: what scripts do with ``train_result.metrics``."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from ..atomic import disk_errors, replaced
from ..errors import CheckpointError
from ..intake import LARGE, Intake, lies
from ..processes.world import World
from ..settings.plan import TrainPlan

_FILES = Intake(CheckpointError, "move the file elsewhere, and the metrics are written into a new one")


def format_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics for people: memory in MB, runtimes as h:mm:ss, FLOPs in GF, floats to four digits."""
    formatted: dict[str, Any] = {}
    for key, value in metrics.items():
        if "_mem_" in key:
            formatted[key] = f"{int(value) >> 20}MB"
        elif "_runtime" in key:
            formatted[key] = (
                str(datetime.timedelta(seconds=round(float(value), 2)))[:-4]
                if value % 1
                else str(datetime.timedelta(seconds=int(value)))
            )
        elif key == "total_flos":
            formatted[key] = f"{int(value) >> 30}GF"
        elif isinstance(value, float):
            formatted[key] = round(value, 4)
        else:
            formatted[key] = value
    return formatted


def set_log_level(args: Any, world: World) -> None:
    """Set transformers' verbosity as ``Trainer.__init__`` does.

    By ``args.log_level``, and by ``args.log_level_replica`` on all processes but the first; "passive" leaves it alone
    (transformers 5.23 ``TrainingArguments.get_process_log_level``).
    """
    from transformers.utils import logging

    is_first = world.is_local_main if args.log_on_each_node else world.is_main
    name = args.log_level if is_first else args.log_level_replica
    if name != "passive":
        logging.set_verbosity(logging.log_levels[name])


def print_metrics(split: str, metrics: dict[str, Any]) -> None:
    """Print ``metrics`` as a two-column table headed by ``split``."""
    formatted = {key: str(value) for key, value in sorted(format_metrics(metrics).items())}
    keys, values = max(map(len, formatted), default=0), max(map(len, formatted.values()), default=0)
    print(f"***** {split} metrics *****")
    for key, value in formatted.items():
        print(f"  {key:<{keys}} = {value:>{values}}")


def write_metrics(output_dir: str, split: str, metrics: dict[str, Any], *, combined: bool = True) -> None:
    """Write ``{split}_results.json`` and, when ``combined``, merge it into ``all_results.json``."""
    folder = Path(output_dir)
    with disk_errors(folder, CheckpointError):
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / f"{split}_results.json", metrics)
    if combined:
        path = folder / "all_results.json"
        merged = _FILES.read_json(path, limit=LARGE) if lies(path) else {}
        with disk_errors(folder, CheckpointError):
            _write_json(path, {**merged, **metrics})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(content, indent=4, sort_keys=True), encoding="utf-8")


def describe_plan(plan: TrainPlan) -> dict[str, Any]:
    """The hyperparameters that a model card lists."""
    settings: dict[str, Any] = {
        "learning_rate": plan.optim.learning_rate,
        "optimizer": plan.optim.name,
        "lr_scheduler_type": plan.schedule.name,
        "train_batch_size": plan.batch.train_batch_size,
        "gradient_accumulation_steps": plan.batch.gradient_accumulation_steps,
        "seed": plan.batch.seed,
        "gradient clipping": plan.clip.describe(),
        "precision": f"{plan.model.precision.dtype}, autocast {plan.model.precision.autocast or 'off'}",
    }
    if plan.batch.max_steps > 0:
        settings["max_steps"] = plan.batch.max_steps
    else:
        settings["num_train_epochs"] = plan.batch.num_train_epochs
    if plan.lora is not None:
        settings["lora"] = f"r={plan.lora.r}, lora_alpha={plan.lora.lora_alpha}"
    return settings
