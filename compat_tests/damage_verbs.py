"""What is done with a folder that may be broken: every way in, and the numbers that come out of it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_runs import make_trainer, timeless

TOKENS = [[5, 17, 99, 3, 42, 7, 64, 120]]


def run_lines(folder: Path, *arguments: Any) -> str:
    """``hf-mlx`` in this process; its refusals come out as the error itself."""
    from hf_mlx.cli.main import build_parser

    options = build_parser().parse_args([str(argument) for argument in arguments])
    status = options.run(options)
    return f"status {status or 0}"


def digest(folder: Path, *patterns: str) -> str:
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    assert files
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def train(base: Path, adapter: Path, folder: Path, out: Path) -> Any:
    trainer = make_trainer(base, out, rows=6, max_steps=2, save_strategy="no", eval_strategy="no", logging_steps=1)
    trainer.train()
    return timeless(trainer.state.log_history)


def import_(base: Path, adapter: Path, folder: Path, out: Path) -> Any:
    import mlx.core as mx

    from hf_mlx import import_adapter

    return np.array(import_adapter(adapter, base).loaded.model(mx.array(TOKENS))).tolist()


def merge(base: Path, adapter: Path, folder: Path, out: Path) -> Any:
    run_lines(folder, "merge", adapter, out / "merged", "--base", base)
    return digest(out / "merged", "*.safetensors")


def export(base: Path, adapter: Path, folder: Path, out: Path) -> Any:
    run_lines(folder, "export", adapter, out / "exported", "--base", base, "--base-name", "owner/name")
    config = json.loads((out / "exported" / "adapter_config.json").read_text())
    # null and an empty list say the same.
    return digest(out / "exported", "*.safetensors"), {key: value for key, value in config.items() if value}


def verify(base: Path, adapter: Path, folder: Path, out: Path) -> Any:
    from hf_mlx import verify_adapter

    report = verify_adapter(adapter, base)
    (adapter / "verification.json").unlink()
    return report.largest_difference, report.adapter_effect, report.ok


def doctor(base: Path, adapter: Path, folder: Path, out: Path) -> Any:
    from hf_mlx.models.doctor import diagnose

    found = diagnose(base)
    return found.logits, found.gradient


def resume(base: Path, adapter: Path, folder: Path, out: Path) -> Any:
    trainer = make_trainer(base, out, max_steps=6, save_strategy="no", eval_strategy="no")
    trainer.train(resume_from_checkpoint=str(folder))
    values = {name: np.array(value).tolist() for name, value in trainer.session.step.params.items()}
    return timeless(trainer.state.log_history), values


def convert(base: Path, adapter: Path, folder: Path, out: Path) -> Any:
    to_torch = (folder / "optimizer.json").exists()
    run_lines(folder, "checkpoint", "to-torch" if to_torch else "from-torch", folder)
    # A zip file holds the clock.
    return "converted" if to_torch else digest(folder, "optimizer.safetensors", "optimizer.json", "scheduler.json")


VERBS: dict[str, Callable[[Path, Path, Path, Path], Any]] = {
    "train": train,
    "import": import_,
    "merge": merge,
    "export": export,
    "verify": verify,
    "doctor": doctor,
    "resume": resume,
    "convert": convert,
}


def perform(verb: str, base: Path, adapter: Path, folder: Path, scratch: Path) -> tuple[str, Any]:
    """Do it: ("done", numbers), ("refused", message of a named error) or ("raw", traceback)."""
    from hf_mlx import HFMLXError

    out = Path(tempfile.mkdtemp(dir=scratch))
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return "done", VERBS[verb](base, adapter, folder, out)
    except HFMLXError as error:
        return "refused", str(error)
    except BaseException:
        return "raw", traceback.format_exc()
    finally:
        shutil.rmtree(out, ignore_errors=True)


def serve(connection: Any) -> None:
    """A process that performs what it is sent, with its peak memory in MiB."""
    from hf_mlx.blas import load_openblas

    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    load_openblas()
    while (work := connection.recv()) is not None:
        outcome = perform(*work)
        unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
        connection.send((*outcome, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit))


def same(found: Any, expected: Any) -> bool:
    """Equal to the last bit; NaN is equal to nothing, as it never is right here."""
    return re.sub(r"\bnan\b", "NaN!", repr(found)) == repr(expected)
