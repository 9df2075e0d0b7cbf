"""The pages that people look at, in a real browser: what is drawn, in light and dark, on a wide and a narrow screen."""

import json
from pathlib import Path

import pytest
from browser import missing, open_browser
from datasets import Dataset
from pairs import SILENT, tiny_model
from peft import LoraConfig
from trl import SFTConfig

from hf_mlx import MLXSFTTrainer
from hf_mlx.cli.main import main

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

ROWS = [{"prompt": f"add {n} <b>", "completion": f" is {2 * n} & more"} for n in range(12)]
PAGES = ("report", "preview", "old report")
SCHEMES = ("light", "dark")

# Of every element with text of its own: the text, its box, and the contrast to what is behind it (WCAG 2.1).
TEXTS = """
const light = c => { const v = c.map(x => (x /= 255) <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
const rgb = s => s.match(/[\\d.]+/g).map(Number);
const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
  if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
return [...document.body.querySelectorAll('*')].filter(e => [...e.childNodes].some(n => n.nodeType === 3 &&
  n.textContent.trim()) && !e.closest('title')).map(e => {
  const s = getComputedStyle(e), box = e.getBoundingClientRect();
  const [a, b] = [light(rgb(e.closest('svg') ? s.fill : s.color).slice(0, 3)), light(behind(e))];
  return {text: e.textContent.trim().slice(0, 40), width: box.width, height: box.height, right: box.right,
          contrast: (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)}; });
"""
CHARTS = """
return [...document.querySelectorAll('svg')].map(s => { const box = s.getBoundingClientRect();
  const lines = [...s.querySelectorAll('polyline')], dots = [...s.querySelectorAll('circle')];
  return {label: s.getAttribute('aria-label'), width: box.width, height: box.height,
    dots: dots.length, filled: lines.filter(l => getComputedStyle(l).fill !== 'none').length,
    colours: lines.map(l => getComputedStyle(l).stroke),
    outside: dots.filter(d => { const b = d.getBoundingClientRect(); return b.left < box.left - 1
      || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1; }).length}; });
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    model = tiny_model("llama", folder / "model")
    settings = {**SILENT, "save_strategy": "steps", "save_steps": 6, "max_steps": 6, "logging_steps": 1}
    MLXSFTTrainer(
        str(model),
        SFTConfig(output_dir=str(folder / "out"), eval_strategy="steps", eval_steps=3, **settings),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:4]),
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    ).train()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["preview", str(folder / "rows.jsonl"), "--model", str(model), "--html", str(folder / "rows.html")]
    assert main(words) == 0
    assert main(["report", str(folder / "out"), "--html", str(folder / "old.html")]) == 0
    return {
        "report": folder / "out" / "report.html",
        "preview": folder / "rows.html",
        "old report": folder / "old.html",
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def test_every_text_can_be_read_in_light_and_dark(pages, page):
    seen = 0
    for name in PAGES:
        page.open(pages[name])
        backgrounds = []
        for scheme in SCHEMES:
            page.prefer(scheme)
            texts = page.run(TEXTS)
            seen += len(texts)
            assert len(texts) > 10, name
            # WCAG's AA for text of this size.
            assert [one for one in texts if one["contrast"] < 4.5 and one["width"]] == [], (name, scheme)
            backgrounds.append(page.run("return getComputedStyle(document.body).backgroundColor"))
        assert backgrounds[0] != backgrounds[1], name
    assert seen > 200


def test_nothing_is_fetched_and_nothing_hangs_over_the_screen(pages, page):
    for name in PAGES:
        for width in (1200, 390):
            page.resize(width)
            page.open(pages[name])
            assert page.run("return performance.getEntriesByType('resource').map(e => e.name)") == [], name
            assert page.run("return document.scripts.length") == 0
            assert page.run("return document.documentElement.scrollWidth") <= width, (name, width)
    page.resize(1200)


def test_the_reports_charts_show_what_was_logged(pages, page):
    page.open(pages["report"])
    charts = {chart["label"]: chart for chart in page.run(CHARTS)}
    assert {"loss by step", "learning_rate by step", "grad_norm by step", "tokens/s by step"} <= set(charts)
    assert charts["loss by step"]["dots"] == 8  # six steps and two evaluations
    assert len(set(charts["loss by step"]["colours"])) == 2
    for label, chart in charts.items():
        assert chart["width"] > 200 and chart["height"] > 80 and chart["dots"] >= 2, label
        assert chart["outside"] == chart["filled"] == 0, label
    assert "per_device_train_batch_size" not in page.run("return document.querySelector('.facts').innerText")
    assert "max_steps" in page.run("return document.querySelector('.rulings').innerText")


@pytest.mark.parametrize("name", ["report", "preview"])
def test_rows_show_what_is_trained(pages, page, name):
    page.open(pages[name])
    marked, row = {"report": ("mark", "pre"), "preview": (".t", "pre")}[name]
    texts = page.run(f"return [...document.querySelectorAll('{row}')].map(e => e.textContent)")
    trained = page.run(
        f"return [...document.querySelectorAll('{row}')].map(p => "
        f"[...p.querySelectorAll('{marked}')].map(e => e.textContent).join(''))"
    )
    assert len(texts) == len(trained) == 3
    for number in range(3):
        assert f"add {number} <b>" in texts[number] and f"is {2 * number} & more" in texts[number]
        assert "add" not in trained[number] and f"is {2 * number} & more" in trained[number]
    colours = page.run(
        f"const p = document.querySelector('{row}'); return [getComputedStyle(p).color, "
        f"getComputedStyle(p.querySelector('{marked}')).color]"
    )
    assert colours[0] != colours[1]
