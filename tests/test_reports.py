"""What a report is made of: series out of a log, charts of them, and a page that needs nothing else."""

import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from hf_mlx.cli.main import main
from hf_mlx.reports.axes import thin, ticks
from hf_mlx.reports.page import render
from hf_mlx.reports.picture import write_picture
from hf_mlx.reports.place import choose_place
from hf_mlx.reports.run import Mark, Run, Sample, Series, read_series
from hf_mlx.reports.svg import draw
from hf_mlx.reports.terminal import draw_text

HISTORY = [
    {"loss": 4.0, "grad_norm": 1.0, "learning_rate": 0.1, "num_tokens": 100, "epoch": 0.5, "step": 10},
    {"eval_loss": 3.5, "eval_runtime": 5.0, "eval_samples_per_second": 3.0, "epoch": 0.5, "step": 10},
    {"loss": 2.0, "grad_norm": 0.5, "learning_rate": 0.05, "num_tokens": 300, "rewards/margins": 0.2, "step": 20},
    {"train_runtime": 9.0, "train_loss": 3.0, "total_flos": 1e9, "step": 20},
]


def named(series):
    return {one.name: one.points for one in series}


def test_series_are_the_logs_numbers_losses_first():
    series = read_series(HISTORY)
    assert [one.name for one in series] == ["loss", "eval_loss", "learning_rate", "grad_norm", "rewards/margins"]
    assert named(series)["loss"] == ((10, 4.0), (20, 2.0))
    assert named(series)["eval_loss"] == ((10, 3.5),)


def test_an_evaluations_time_counts_for_no_token():
    marks = {
        -1: Mark(0, 50, 0), 0: Mark(2, 150, 2**30), 1: Mark(7, 150, 2**30), 2: Mark(8, 350, 2**31), 3: Mark(9, 350, 0)
    }  # fmt: skip
    found = named(read_series(HISTORY, marks))
    assert found["tokens/s"] == ((10, 50.0), (20, 200.0))
    assert found["memory (GiB)"] == ((10, 1.0), (20, 2.0))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (3.2, 3.9), (-5, 5), (1e-9, 5e-9), (2, 2), (0, 0), (-1e6, 1e7), (0.999999, 1.000001)]
)
def test_ticks_are_round_and_span_the_values(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 12 and found == sorted(set(found))
    assert found[0] <= low + 1e-9 * abs(low) and found[-1] >= high - 1e-9 * abs(high)


def test_a_long_run_keeps_its_peaks():
    points = [(float(n), math.sin(n / 50)) for n in range(20_000)]
    points[7_003] = (7_003.0, 99.0)
    kept = thin(points)
    assert len(kept) <= 400 and (7_003.0, 99.0) in kept and kept == sorted(kept)
    assert len(draw([Series("loss", tuple(points))], "loss")) < 100_000


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0], [1.0, math.nan, 2.0], [math.inf, 3.0, 1.0]], ids=str)
def test_a_chart_shows_every_finite_number_and_is_xml(values):
    series = [Series("a<b & c", tuple((float(n), value) for n, value in enumerate(values)))]
    root = ET.fromstring(draw(series, "a<b & c"))
    dots = [one for one in root.iter() if one.tag.endswith("circle")]
    assert len(dots) == sum(map(math.isfinite, values))
    _, _, width, height = map(float, root.get("viewBox").split())
    assert all(0 <= float(dot.get("cx")) <= width and 0 <= float(dot.get("cy")) <= height for dot in dots)


def test_no_number_is_no_chart():
    empty = [Series("loss", ((1.0, math.nan),))]
    assert draw(empty, "loss") == ""
    assert draw_text(empty) == draw_text([]) == "no finite loss was logged"


class Reader(HTMLParser):
    """Tags, what they would fetch, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.fetched, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.text += data


HOSTILE = '</pre><script>alert(1)</script><img src=x onerror=alert(1)> & "quoted"'


def test_a_page_fetches_nothing_and_runs_nothing():
    run = Run(
        HOSTILE, {HOSTILE: HOSTILE}, [Series(HOSTILE, ((1.0, 2.0),)), *read_series(HISTORY)],
        rulings=[(HOSTILE,) * 4], notes=[HOSTILE], samples=[Sample(HOSTILE, ((HOSTILE, True), (HOSTILE, False)))],
        failure=HOSTILE,
    )  # fmt: skip
    page = render(run)
    reader = Reader(page)
    assert not {"script", "img", "link", "iframe", "object"} & set(reader.tags)
    assert reader.fetched == [] and "@import" not in page and "url(" not in page
    assert reader.text.count(HOSTILE) >= 10
    assert reader.tags.count("svg") == 5 and "prefers-color-scheme: dark" in page


def test_a_page_without_a_single_log_entry():
    assert "no loss was logged" in render(Run("nothing", {}, []))


@pytest.mark.parametrize("unicode", [True, False])
def test_the_terminals_chart_falls_as_the_loss_does(unicode):
    series = [Series("loss", tuple((float(n), 5 - n / 10) for n in range(40)))]
    lines = draw_text(series, width=60, height=10, unicode=unicode).splitlines()
    mark = "●" if unicode else "*"
    rows = [
        number for column in range(60) for number, line in enumerate(lines[:10]) if line[column : column + 1] == mark
    ]
    assert len(lines) == 12 and max(map(len, lines)) <= 60
    assert len(rows) >= 30 and rows == sorted(rows) and rows[0] <= 1 and rows[-1] >= 7
    assert unicode or "\n".join(lines).isascii()


def test_a_picture_is_a_png(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = write_picture(read_series(HISTORY)[:2], tmp_path / "deep" / "loss.png")
    assert path.read_bytes().startswith(b"\x89PNG") and [one.name for one in path.parent.iterdir()] == ["loss.png"]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(None, "out/report.html"), ("1", "out/report.html"), ("0", None), ("OFF", None), ("a/b.html", "a/b.html")],
)
def test_the_environment_says_where(monkeypatch, asked, expected):
    monkeypatch.delenv("HF_MLX_REPORT", raising=False)
    if asked is not None:
        monkeypatch.setenv("HF_MLX_REPORT", asked)
    place = choose_place("out")
    assert (None if place is None else place.as_posix()) == expected


def test_the_command_draws_what_any_trainer_logged(tmp_path, capsys):
    state = (
        '{"global_step": 20, "max_steps": 20, "log_history": [{"loss": 4.0, "step": 10}, {"loss": 1.5, "step": 20}]}'
    )
    (tmp_path / "out" / "checkpoint-20").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-20" / "trainer_state.json").write_text(state)
    words = ["report", str(tmp_path / "out"), "--html", str(tmp_path / "run.html"), "--png", str(tmp_path / "run.png")]
    assert main(words) == 0
    assert re.search(r"loss 4 at step 10 (→|->) 1.5 at step 20", capsys.readouterr().out)
    assert "<svg" in (tmp_path / "run.html").read_text() and (tmp_path / "run.png").stat().st_size > 1000
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "trainer.save_state()" in capsys.readouterr().err
