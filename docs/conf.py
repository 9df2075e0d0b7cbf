"""Sphinx settings. The field tables and the commands' help are written from the code when a build begins."""

import argparse
from importlib.metadata import version as installed_version
from pathlib import Path

from sphinx.application import Sphinx

from hf_mlx.backends import markdown_measures
from hf_mlx.cli.main import build_parser
from hf_mlx.settings.legacy import OLDER_FIELDS, Gone, Renamed
from hf_mlx.settings.tables import CLASSES, markdown_summary, markdown_table
from hf_mlx.stand_in.older import OLDER

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
    pages["older"] = older_names()
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def commands_help() -> str:
    """A section for each command of ``hf-mlx`` with its help."""
    parser = build_parser()
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return "\n".join(
        f"## {name}\n\n```text\n{command.format_help()}```\n" for name, command in commands.choices.items()
    )


def older_names() -> str:
    """A row for each name and field of older releases."""
    rows = []
    for name, older in OLDER.items():
        where, _, now = older.now.partition(":")
        meaning = "its older meaning" if where.startswith("hf_mlx.") else f"`{where}.{now}`"
        rows.append((f"`{name}` of {', '.join(f'`{home}`' for home in older.homes)}", older.left, meaning))
    for name, field in OLDER_FIELDS.items():
        if isinstance(field, Renamed):
            meaning = f"`{field.now}`"
        elif isinstance(field, Gone):
            asked = "" if field.harmless is None else f"; where it asks for something it is refused: {field.remedy}"
            meaning = f"nothing to do{asked}"
        else:
            meaning = "said in today's fields"
        rows.append((f"`{name}=`", field.left, meaning))
    lines = ["| name | left in | here |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", write_generated_pages)
