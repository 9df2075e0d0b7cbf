"""What the README and the guides tell people to type exists, parses and agrees with the code."""

import re
import tomllib

import pytest
from pages import ROOT, blocks, swapped_script

import hf_mlx
from hf_mlx.settings.tables import markdown_summary

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))]


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "console") for line in block.splitlines()]
    return [line.removeprefix("$ ").split("#")[0].strip() for line in lines if line.startswith("$ ")]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_python_blocks_compile():
    sources = [(page, block) for page in PAGES for block in blocks(page, "python")]
    sources.append(("README.md", swapped_script()))
    for page, source in sources:
        compile(source, page, "exec")
    assert len(sources) >= 6


def test_imported_names_are_public():
    sources = [block for page in PAGES for block in blocks(page, "python")] + [swapped_script()]
    names = {
        name for source in sources for name in re.findall(r"^from hf_mlx import (\w+)", source, flags=re.MULTILINE)
    }
    assert names >= {"MLXSFTTrainer", "explain", "verify_adapter"}
    assert names <= set(hf_mlx.__all__)


def test_the_swap_touches_only_imports():
    (diff,) = blocks("README.md", "diff")
    changed = [line[1:] for line in diff.splitlines() if line.startswith(("+", "-"))]
    assert len(changed) == 3
    assert all(line.startswith("from ") for line in changed)


def test_installing_comes_first_and_the_clone_second():
    readme = [line for line in commands() if line.startswith(("pip install", "make "))]
    assert readme[:3] == [f'pip install "hf-mlx[{extras}]"' for extras in ("hf", "cpu,hf", "cuda,hf")]
    assert readme.index("make demo") + 1 == readme.index("make test")


def test_each_claim_of_the_readme_names_a_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text.split("## Each claim")[1].split("```")[0], flags=re.MULTILINE)
    claims = [proof for claim, proof in rows if claim not in ("claim", "---")]
    assert len(claims) >= 5
    assert all(re.search(r"`(make \w+|hf-mlx [-\w]+)", proof) for proof in claims)


def test_make_commands_are_targets():
    asked = {word for line in commands() for word in re.findall(r"make ([a-z]+)", line)}
    for page in PAGES:
        asked |= set(re.findall(r"`make ([a-z]+)", (ROOT / page).read_text(encoding="utf-8")))
    assert {"demo", "test", "check", "compat", "bench", "docs", "format"} <= asked <= targets()


def test_pip_commands_name_real_extras():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    asked = {
        extra
        for line in commands()
        for group in re.findall(r'(?:\.|hf-mlx)\[([\w,]+)\]"', line)
        for extra in group.split(",")
    }
    assert {"hf", "cpu", "cuda"} <= asked <= extras


def test_hf_mlx_commands_exist():
    from hf_mlx.cli.main import build_parser

    asked = [line.split()[1:] for line in commands() if line.startswith("hf-mlx ")]
    for words in asked:
        assert build_parser().parse_args(words).command == words[0]
    assert len(asked) >= 1


def test_the_honoured_table_is_the_ledgers():
    assert markdown_summary() in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_version_is_in_the_changelog():
    assert f"## {hf_mlx.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    names = {re.split(r"[\[><=]", line)[0].lower() for line in wanted}
    pins = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert len(names) >= 20
    assert names <= set(pins)


def test_examples_stay_few_flat_and_short():
    examples = sorted(ROOT.glob("examples/*.py"))
    assert 3 <= len(examples) <= 6
    assert {
        path.name: len(path.read_text().splitlines()) for path in examples if len(path.read_text().splitlines()) > 60
    } == {}
