"""What a release was tested with: said by the command, and once where something else is installed."""

import logging

import pytest

from hf_mlx import version
from hf_mlx.cli.main import main
from hf_mlx.version import TESTED, find_untested, warn_untested


def installed(monkeypatch, **others):
    versions = {name: high for name, (_, high) in TESTED.items()} | {"hf-mlx": "0.1.0"}
    versions |= {name.replace("_", "-"): value for name, value in others.items()}
    monkeypatch.setattr(version, "version", versions.__getitem__)
    monkeypatch.setattr(version._Once, "said", False)


def test_the_command_says_it(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert not end.value.code
    printed = capsys.readouterr().out
    assert printed.startswith("hf-mlx ") and all(f"{name} {low}" in printed for name, (low, _) in TESTED.items())


def test_what_the_tests_run_with_is_tested():
    assert find_untested() == []


@pytest.mark.parametrize(
    ("name", "here", "told"),
    [
        ("transformers", "5.25.0", True), ("transformers", "6.0.0", True), ("transformers", "5.24.3", False),
        ("transformers", "5.16.1", True), ("transformers", "5.20.0.dev0", False), ("mlx", "0.33.0", True),
        ("mlx", "0.32.9", False), ("mlx_lm", "0.31.3", True), ("trl", "1.17.0", True), ("peft", "0.22.0rc1", True),
    ],
)  # fmt: skip
def test_beyond_is_said_once_and_how_to_go_back(monkeypatch, caplog, name, here, told):
    installed(monkeypatch, **{name: here})
    with caplog.at_level(logging.WARNING):
        warn_untested()
        warn_untested()
    assert len(caplog.messages) == told
    for line in caplog.messages:
        assert f"{name.replace('_', '-')} {here}" in line
        assert 'pip install "transformers<=' in line and "hf-mlx doctor --self-test" in line


def test_what_is_not_installed_is_not_counted(monkeypatch):
    def absent(name):
        raise version.PackageNotFoundError(name)

    monkeypatch.setattr(version, "version", absent)
    assert find_untested() == []
