"""Sphinx settings. The field tables and the commands' help are written from the code when a build begins."""

import argparse
from importlib.metadata import version as installed_version
from pathlib import Path

from sphinx.application import Sphinx

from hf_mlx.backends import markdown_measures
from hf_mlx.cli.main import build_parser
from hf_mlx.settings.tables import CLASSES, markdown_summary, markdown_table

project = "hf-mlx"
author = "the hf-mlx authors"
copyright = "the hf-mlx authors"
release = version = installed_version("hf-mlx")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_generated"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
html_theme = "furo"
html_title = "hf-mlx"
html_theme_options = {"navigation_with_keys": True}


def write_generated_pages(app: Sphinx) -> None:
    """Write what other pages include into ``_generated``: a table for each class, and the commands' help."""
    folder = Path(app.srcdir, "_generated")
    folder.mkdir(exist_ok=True)
    pages = {name: markdown_table(name) for name in CLASSES}
    pages |= {"summary": markdown_summary(), "commands": commands_help(), "backends": markdown_measures()}
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def commands_help() -> str:
    """A section for each command of ``hf-mlx`` with its help."""
    parser = build_parser()
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return "\n".join(
        f"## {name}\n\n```text\n{command.format_help()}```\n" for name, command in commands.choices.items()
    )


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", write_generated_pages)
