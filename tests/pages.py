"""What the README and the guides show, taken out of their blocks."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def swapped_script() -> str:
    """The README's diff, applied."""
    (diff,) = blocks("README.md", "diff")
    return "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
