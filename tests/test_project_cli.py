"""The ``hf-mlx`` command: found commands, complete help, errors without a traceback."""

import argparse
from importlib.metadata import entry_points

import pytest

from hf_mlx.cli import main as cli
from hf_mlx.errors import SettingError


def commands() -> dict[str, argparse.ArgumentParser]:
    parser = cli.build_parser()
    (subparsers,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(subparsers.choices)


def test_every_command_and_option_has_help():
    parser = cli.build_parser()
    (subparsers,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    helped = {choice.dest: choice.help for choice in subparsers._choices_actions}
    missing = [name for name in subparsers.choices if not helped.get(name)]
    options = 0
    for name, command in subparsers.choices.items():
        for action in command._actions:
            options += 1
            if not action.help:
                missing.append(f"{name} {'/'.join(action.option_strings) or action.dest}")
    assert missing == []
    assert options >= len(subparsers.choices) >= 1


def test_every_command_says_what_it_runs():
    found = commands()
    assert "explain" in found
    assert [name for name, command in found.items() if not callable(command.get_default("run"))] == []


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in commands())])
def test_help_prints(argv, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    assert left.value.code == 0
    assert "usage: hf-mlx" in capsys.readouterr().out


def test_version_prints(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("hf-mlx ")


@pytest.mark.parametrize("argv", [[], ["no-such-command"]])
def test_a_wrong_command_is_a_usage_error(argv, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    assert left.value.code == 2
    assert "usage: hf-mlx" in capsys.readouterr().err


def test_a_deliberate_error_prints_its_three_parts_and_no_traceback(monkeypatch, capsys):
    def refuse(arguments):
        raise SettingError("optim='x'", "an optimizer that exists", "optim='adamw_torch'")

    parser = argparse.ArgumentParser()
    parser.set_defaults(command="explain", run=refuse)
    monkeypatch.setattr(cli, "build_parser", lambda *_: parser)
    assert cli.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    for part in ("SettingError", "received: optim='x'", "required: an optimizer", "remedy: optim='adamw_torch'"):
        assert part in printed.err
    assert "Traceback" not in printed.err


def test_the_installed_command_is_this_one():
    (entry,) = [entry for entry in entry_points(group="console_scripts") if entry.name == "hf-mlx"]
    assert entry.load() is cli.main
