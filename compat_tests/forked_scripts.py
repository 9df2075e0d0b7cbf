"""Scripts in processes of their own that have torch, transformers and trl before they begin.

Importing these takes several times as long as a short script's training. A server imports them once, and every script
runs in a fork of it: with its own ``__main__``, arguments, working folder and output, as ``python script.py`` has.
"""

from __future__ import annotations

import atexit
import importlib
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, CompletedProcess
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


@contextmanager
def forking(environ: Mapping[str, str]) -> Iterator[Callable[..., CompletedProcess]]:
    """:func:`run_forked` from a process of its own, whose libraries read ``environ`` when they were imported."""
    command = [sys.executable, "-c", "import forked_scripts; forked_scripts._fork_each()"]
    with (
        subprocess.Popen(
            command, cwd=Path(__file__).parent, env={**os.environ, **environ}, stdin=PIPE, stdout=PIPE, text=True
        ) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        assert server.stdin is not None and server.stdout is not None

        def run(words: Sequence[object]) -> CompletedProcess:
            outputs = [Path(tempfile.mkdtemp(dir=folder), name) for name in ("stdout", "stderr")]
            print(
                json.dumps([list(map(str, words)), *map(str, outputs), {}, os.getcwd()]), file=server.stdin, flush=True
            )
            done = CompletedProcess(words, int(server.stdout.readline()), *(path.read_text() for path in outputs))
            assert done.returncode == 0, done.stderr[-3000:]
            return done

        yield run
        server.stdin.close()


def _fork_each() -> None:
    """Fork for each line of JSON that is read, and print how the fork ended."""
    for name in _LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _run(*json.loads(line))
                status = 0
            except SystemExit as ended:
                status = ended.code or 0
            finally:
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


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
