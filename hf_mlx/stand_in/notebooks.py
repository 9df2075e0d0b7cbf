"""Notebooks as scripts: ``.ipynb`` files, and the lines that only a notebook understands.

Installers are not run: what is installed here is used. Other shell commands run as a notebook runs them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

from ..errors import SettingError
from .talk import Talk

_LINE = re.compile(
    r"(?P<indent>\s*)(?P<target>[\w, ]+=\s*)?(?P<mark>!!?|%%?|\?)(?P<command>.*)"
    r"|(?P<bare>\s*)(?P<installer>(pip3?|conda)\s.*)"
)
_INSTALLERS = re.compile(
    r"\s*(sudo\s+)?(python3?\s+-m\s+)?(uv\s+)?(pip3?|conda|mamba|apt(-get)?|npm|git\s+lfs|nvidia-smi|nvcc|"
    r"huggingface-cli\s+login|hf\s+auth\s+login|wandb\s+login)\b"
)
# Magics whose argument is Python of the notebook's own.
_TIMERS = ("time", "timeit", "prun", "capture", "memit")


def compile_script(path: Path) -> tuple[CodeType, bool]:
    """A script, or a notebook, as code.

    Returns:
        The code, and whether it asks for ``get_ipython``.

    Raises:
        SettingError: The file is a notebook of another language, or no notebook.
        SyntaxError: It is no Python, even without a notebook's lines.
    """
    if path.suffix == ".ipynb":
        text = _read_notebook(path)
    else:
        source = path.read_bytes()
        try:
            # Not inheriting: this library's own __future__ imports are not the script's.
            return compile(source, str(path), "exec", dont_inherit=True), b"get_ipython" in source
        except SyntaxError as error:
            if _magic_at(source.decode(errors="replace").splitlines(), error) is None:
                raise
            text = source.decode()
    lines = text.split("\n")
    while True:
        try:
            return compile("\n".join(lines), str(path), "exec", dont_inherit=True), True
        except SyntaxError as error:
            found = _magic_at(lines, error)
            if found is None:
                raise
            _translate(lines, *found)


class Shell:
    """What ``get_ipython()`` returns to a script.

    Args:
        talk: Says what is not run.
        names: The script's variables.
    """

    def __init__(self, talk: Talk, names: dict[str, Any]) -> None:
        self.user_ns = names
        self.config: dict = {}
        self._talk = talk

    def system(self, command: str) -> None:
        """Run a shell command, unless it installs something."""
        self.getoutput(command, show=True)

    def getoutput(self, command: str, show: bool = False) -> list[str]:
        """The lines that a shell command prints."""
        if _INSTALLERS.match(command):
            self._talk.once(f"not run: {' '.join(command.split())}; what is installed here is used")
            return []
        done = subprocess.run(command, shell=True, text=True, stdout=None if show else subprocess.PIPE, check=False)
        return (done.stdout or "").splitlines()

    def run_line_magic(self, name: str, line: str = "", *more: Any) -> Any:
        """A magic of one line."""
        if name in ("pip", "pip3", "conda", "mamba", "uv"):
            return self.system(f"{name} {line}")
        if name in ("sx", "system", "sh"):
            return self.getoutput(line)
        if name == "cd":
            os.chdir(os.path.expanduser(line.strip() or "~"))
        elif name in ("env", "set_env"):
            key, _, value = line.replace("=", " ", 1).partition(" ")
            os.environ[key.strip()] = value.strip()
        elif name in _TIMERS:
            exec(compile(line, "<notebook>", "exec", dont_inherit=True), self.user_ns)
        else:
            self._talk.once(f"not run: %{name} {line}".rstrip())
        return None

    magic = run_line_magic

    def run_cell_magic(self, name: str, line: str = "", cell: str = "") -> None:
        """A magic of a whole cell."""
        if name in _TIMERS:
            exec(compile(cell, "<notebook>", "exec", dont_inherit=True), self.user_ns)
        elif name in ("bash", "sh", "script"):
            self.system(f"bash -c {shlex.quote(cell)}")
        elif name == "writefile":
            Path(line.split()[-1]).write_text(cell, encoding="utf-8")
        else:
            self._talk.once(f"not run: %%{name} {line}".rstrip())


def _read_notebook(path: Path) -> str:
    try:
        cells = json.loads(path.read_bytes())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    except (ValueError, KeyError, TypeError) as error:
        raise SettingError(f"SCRIPT {path}", "a Jupyter notebook", "hf-mlx run train.py") from error
    return "\n".join(map(_cell, code))


def _cell(text: str) -> str:
    head = re.match(r"\s*%%(\w+)(.*)", text)
    if head is None:
        return text
    body = text[head.end() :].lstrip("\n")
    if head[1] in _TIMERS:
        return body
    return f"get_ipython().run_cell_magic({head[1]!r}, {head[2].strip()!r}, {body!r})"


def _magic_at(lines: list[str], error: SyntaxError) -> tuple[int, re.Match] | None:
    at = (error.lineno or 0) - 1
    if not 0 <= at < len(lines):
        return None
    found = _LINE.fullmatch(lines[at])
    return None if found is None else (at, found)


def _translate(lines: list[str], at: int, found: re.Match) -> None:
    """Put Python in a magic's place; the lines keep their numbers."""
    end = at
    while lines[end].rstrip().endswith("\\") and end + 1 < len(lines):
        end += 1
    text = " ".join(line.rstrip().removesuffix("\\") for line in lines[at : end + 1]).strip()
    lines[at + 1 : end + 1] = [""] * (end - at)
    if found["installer"] is not None:
        lines[at] = f"{found['bare']}get_ipython().system({text!r})"
        return
    indent, target, mark = found["indent"], found["target"] or "", found["mark"]
    command = text.removeprefix(target.strip()).lstrip().lstrip("!%?").strip()
    name, _, rest = command.partition(" ")
    calls: dict[str, Callable[[], str]] = {
        "!": lambda: f"get_ipython().{'getoutput' if target else 'system'}({command!r})",
        "%": lambda: rest or "pass" if name in _TIMERS else f"get_ipython().run_line_magic({name!r}, {rest!r})",
        "?": lambda: "pass",
    }
    lines[at] = indent + target + (calls[mark[0]]() if mark != "%%" or name not in _TIMERS else "pass")
