"""`hf-mlx explain` on files, and the tables that the documentation is made of."""

import json

import pytest

from hf_mlx.cli.explain import main
from hf_mlx.settings.tables import CLASSES, markdown_summary, markdown_table


@pytest.fixture
def settings_file(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        return str(path)

    return write


def test_a_file_that_can_be_honoured_ends_with_status_0(settings_file, capsys):
    assert main(["explain", settings_file("args.json", {"learning_rate": 2e-4, "bf16": False})]) == 0
    assert "learning_rate" in capsys.readouterr().out


def test_a_refused_field_ends_with_status_1_and_the_line_to_write(settings_file, capsys):
    assert main(["explain", settings_file("args.json", {"fp16": True})]) == 1
    assert "write fp16=False, bf16=True" in capsys.readouterr().out


def test_strict_turns_an_adapted_optimizer_into_a_refusal(settings_file):
    path = settings_file("args.json", {"optim": "adamw_8bit"})
    assert (main(["explain", path]), main(["explain", path, "--strict"])) == (0, 1)


def test_the_yaml_of_trl_sft_is_understood(settings_file, capsys):
    path = settings_file(
        "sft.yaml",
        "model_name_or_path: tiny\ndataset_name: rows\nlearning_rate: 2e-4\nwarmup_ratio: 0.1\n"
        "use_peft: true\nlora_r: 16\nuse_dora: true\nload_in_4bit: true\n",
    )
    assert main(["explain", path, "--json"]) == 0
    printed = capsys.readouterr()
    rows = {row["field"]: row for row in map(json.loads, printed.out.splitlines())}
    assert rows["learning_rate"]["value"] == "0.0002"
    assert rows["r"]["value"] == "16"
    assert rows["model_init_kwargs"]["verdict"] == "ADAPT"
    assert "warmup_ratio=0.1 is now warmup_steps=0.1" in printed.err


def test_all_lists_the_defaults_too(settings_file, capsys):
    main(["explain", settings_file("args.json", {}), "--all", "--json"])
    assert len(capsys.readouterr().out.splitlines()) == 135


@pytest.mark.parametrize("text", ["[1, 2]", "{", ""])
def test_a_file_that_holds_no_settings_is_said_to(settings_file, capsys, text):
    assert main(["explain", settings_file("args.json", text)]) == 1
    assert "remedy:" in capsys.readouterr().out


def test_a_missing_file_is_said_to_be_missing(tmp_path, capsys):
    assert main(["explain", str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().out


def test_the_documentation_has_a_row_for_every_field():
    seen = 0
    for name, rules in CLASSES.items():
        table = markdown_table(name)
        widths = {line.replace("\\|", "").count("|") for line in table.splitlines()}
        assert widths == {6}
        for rule in rules:
            assert f"| `{rule.field}` |" in table
            seen += 1
    assert seen == 222


def test_the_summary_counts_every_field_once():
    rows = [[int(cell) for cell in line.split("|")[2:-1]] for line in markdown_summary().splitlines()[2:]]
    assert [row[0] for row in rows] == [114, 21, 31, 14, 42]
    assert all(row[0] == sum(row[1:]) for row in rows)
