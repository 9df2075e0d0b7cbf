"""Scripts in processes of their own that have torch, transformers and trl before they begin.

Importing these takes several times as long as a short script's training. A server imports them once, and every script
runs in a fork of it: with its own ``__main__``, arguments, working folder and output, as ``python script.py`` has.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

_LIBRARIES = (
    "torch", "datasets", "accelerate", "transformers.trainer", "transformers.models.llama.modeling_llama", "peft",
    "trl.trainer.sft_trainer",
)  # fmt: skip
HF_MLX_RUN = ("-m", "hf_mlx.cli.main", "run")


def start_forked(
    words: Sequence[object],
    stdout: Path,
    stderr: Path,
    environ: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
) -> Any:
    """A process that does what ``python WORDS…`` does, its libraries imported already, with its output in two files."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_LIBRARIES))
    arguments = ([str(word) for word in words], str(stdout), str(stderr), dict(environ or {}), cwd or os.getcwd())
    process = context.Process(target=_run, args=arguments)
    process.start()
    return process


def run_forked(
    words: Sequence[object],
    *,
    status: int = 0,
    timeout: float = 600,
    environ: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
) -> CompletedProcess:
    """What ``python WORDS…`` does, its libraries imported already.

    Args:
        words: A script and its arguments, or ``-m`` with a module and its own.
        status: How it is to end.
        timeout: Seconds until it is ended.
        environ: Variables of its own; None takes one away.
        cwd: Its working folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = start_forked(words, *outputs, environ, cwd)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        done = CompletedProcess(words, process.exitcode, *(path.read_text() for path in outputs))
    assert done.returncode == status, done.stderr[-3000:]
    return done


def _run(words: list[str], stdout: str, stderr: str, environ: dict[str, str | None], cwd: str | Path) -> None:
    import torch

    os.chdir(cwd)
    for name, value in environ.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        with open(path, "a") as file:
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(1)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path[0] = os.getcwd()
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path[0] = str(Path(words[0]).parent)
            runpy.run_path(words[0], run_name="__main__")
    except Exception as error:
        # As the interpreter ends: the error is printed, and known to what is registered with atexit.
        sys.excepthook(type(error), error, error.__traceback__)
        sys.last_value = error
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
