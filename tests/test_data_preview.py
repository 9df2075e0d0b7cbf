"""The preview shows each row's text once, with what trains told apart."""

import io
import json
import re
from html import unescape

import pytest
from byte_tokenizer import byte_tokenizer

from hf_mlx.cli.main import main
from hf_mlx.data.preview import preview
from hf_mlx.settings.plan import DataPlan

ROWS = [{"prompt": "1 < 2 é ", "completion": "yes 🤗\x1b[2J"}, {"prompt": "b ", "completion": "no"}]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(rows, file, **settings):
    html = settings.pop("html", None)
    return preview(rows, byte_tokenizer(), DataPlan(**settings), rows=1, html=html, file=file)


def test_plain_output_brackets_what_trains():
    out = io.StringIO()
    prepared = show(ROWS, out)
    assert prepared.report.describe() in out.getvalue()
    assert "1 < 2 é [[yes 🤗␛[2J</s>]]" in out.getvalue()
    assert "row 0: 22 tokens, 13 trained" in out.getvalue()
    assert "row 1" not in out.getvalue()


def test_a_terminal_gets_colours_and_no_escapes_of_the_rows(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    show(ROWS, out)
    assert "\x1b[2m1 < 2 é \x1b[0m\x1b[1;32myes 🤗" in out.getvalue()
    assert "\x1b[2J" not in out.getvalue()


def test_the_page_needs_nothing_else_and_holds_the_text(tmp_path):
    page = tmp_path / "rows.html"
    show(ROWS, io.StringIO(), html=page)
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link|src=", text)
    spans = re.findall(r'<span class="([tm])" title="id \d+ at \d+">(.*?)</span>', text)
    assert len(spans) == 22
    assert unescape("".join(words for kind, words in spans if kind == "m")) == "1 < 2 é "


def test_packed_documents_are_set_apart():
    out = io.StringIO()
    show([{"text": "one"}, {"text": "two"}], out, packing=True, max_length=16)
    assert "next document" in out.getvalue()


def test_the_command_shows_a_file(tmp_path, capsys):
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS))
    settings = tmp_path / "sft.json"
    settings.write_text(json.dumps({"completion_only_loss": False}))
    page = tmp_path / "rows.html"
    words = ["preview", str(rows), "--model", str(tmp_path / "model"), "--config", str(settings), "--html", str(page)]
    assert main([*words, "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "[[b no</s>]]" in out
    assert page.exists()


def run_on(rows, folder, *words, **settings):
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "args.json").write_text(json.dumps(settings))
    given = ["preview", folder / "rows.jsonl", "--model", folder / "model", "--config", folder / "args.json", *words]
    return main([str(word) for word in given])


def test_pairs_show_both_answers_as_the_collator_cuts_them(tmp_path, capsys):
    pairs = [{"prompt": "2+2=", "chosen": "4", "rejected": "five"}, {"chosen": "ab c", "rejected": "ab d"}]
    words = ["--trainer", "DPOTrainer", "--html", tmp_path / "rows.html"]
    assert run_on(pairs[:1], tmp_path, *words, max_length=7) == 0
    out = capsys.readouterr().out
    assert "row 0, chosen: 6 tokens, 2 trained\n2+2=[[4</s>]]" in out
    assert "row 0, rejected: 7 tokens, 3 trained\n2+2=[[fiv]]" in out
    assert "row 0, rejected" in (tmp_path / "rows.html").read_text()
    # The prompt is the front that both share.
    assert run_on(pairs[1:], tmp_path, "--trainer", "DPOTrainer") == 0
    assert "ab[[ c</s>]]" in capsys.readouterr().out


def test_scored_rows_show_the_token_that_is_scored(tmp_path, capsys):
    # The padding token is the one that ends a text, so transformers reads the score before it.
    rows = [{"prompt": "2+2=", "chosen": "4", "rejected": "five", "margin": 0.5}, {"chosen": "ab", "rejected": "c"}]
    words = ["--trainer", "RewardTrainer", "--html", tmp_path / "rows.html"]
    assert run_on(rows[:1], tmp_path, *words) == 0
    out = capsys.readouterr().out
    assert "row 0, chosen, by 0.5 at least: 6 tokens, 1 scored\n2+2=[[4]]</s>" in out
    assert "row 0, rejected: 9 tokens, 1 scored\n2+2=fiv[[e]]</s>" in out
    assert "scored</span>" in (tmp_path / "rows.html").read_text()
    # A pair that is longer than max_length is left out, and a prompt is not needed.
    assert run_on([{"chosen": "abcdefgh", "rejected": "c"}, rows[1]], tmp_path, *words, max_length=7) == 0
    out = capsys.readouterr().out
    assert "a[[b]]</s>" in out and "abcdefgh" not in out
    assert run_on([{"text": "abcd"}], tmp_path, *words) == 2


def test_tokenized_rows_are_shown_as_they_are(tmp_path, capsys):
    ids = byte_tokenizer()("abcd")["input_ids"]
    rows = [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]}, {"input_ids": ids}]
    assert run_on(rows[:1], tmp_path, "--trainer", "Trainer") == 0
    assert "ab[[cd]]" in capsys.readouterr().out
    assert run_on(rows[1:], tmp_path, "--trainer", "Trainer") == 0
    assert "[[abcd]]" in capsys.readouterr().out
    assert run_on([{"text": "abcd"}], tmp_path, "--trainer", "Trainer") == 2
    assert "tokenizes nothing" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["rows", "model"])
def test_the_command_names_what_cannot_be_read(missing, tmp_path, capsys):
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}')
    names = {"rows": str(tmp_path / "rows.jsonl"), "model": str(tmp_path / "model")}
    names[missing] = str(tmp_path / "gone")
    assert main(["preview", names["rows"], "--model", names["model"]]) == 2
    assert "gone" in capsys.readouterr().err
