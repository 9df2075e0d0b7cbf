"""Sets of versions that are tested: each is an overlay of a few packages over the environment that runs the tests.

The lowest is what ``pyproject.toml`` asks for; the highest is what there was when it was last raised. Run as a program
with a set's name, it makes the overlay and prints its folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from materials import _built

SETS: dict[str, dict[str, str]] = {
    "lowest": {
        "transformers": "5.17.0", "trl": "1.16.0", "peft": "0.21.0", "mlx": "0.32.0", "mlx-cpu": "0.32.0",
        "mlx-lm": "0.32.0", "huggingface-hub": "1.31.0", "httpx": "0.28.1", "httpcore": "1.0.9", "h11": "0.16.0",
    },
    "between": {
        "transformers": "5.20.2", "trl": "1.16.0", "peft": "0.21.1", "mlx": "0.32.2", "mlx-cpu": "0.32.2",
        "mlx-lm": "0.32.1",
    },
    "highest": {
        "transformers": "5.24.0", "trl": "1.16.0", "peft": "0.21.2", "mlx": "0.32.4", "mlx-cpu": "0.32.4",
        "mlx-lm": "0.32.2",
    },
}  # fmt: skip


def packages(name: str) -> dict[str, str]:
    """The versions of a set on this system: only Linux has MLX's CPU backend in a package of its own."""
    return {package: version for package, version in SETS[name].items() if _is_needed(package)}


def overlay(name: str) -> Path:
    """The folder of a set, made once: put it before everything else on PYTHONPATH."""
    key = "-".join([name, *(f"{package}{version}" for package, version in packages(name).items())])
    return _built(f"versions-{key}", lambda folder: _install(packages(name), folder))


def _is_needed(package: str) -> bool:
    return package != "mlx-cpu" or sys.platform == "linux"


def _install(wanted: dict[str, str], folder: Path) -> None:
    # Without dependencies: everything else, torch above all, is the environment's own.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    names = [f"{package}=={version}" for package, version in wanted.items()]
    # A constraints file of the environment would stand against what is asked for.
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    subprocess.run([*pip, *names], check=True, stdin=subprocess.DEVNULL, env=environment)


if __name__ == "__main__":
    print(overlay(sys.argv[1]))
