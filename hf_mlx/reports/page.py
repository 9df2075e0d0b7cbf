"""``report.html``: one file that needs nothing else, on paper white or in the dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from .run import Run, Sample, Series
from .svg import PANEL, WIDE, draw

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --faint: #59636e; --rule: #d0d7de;
  --s0: #0969da; --s1: #bc4c00; --s2: #1a7f37; --s3: #8250df; --good: #d7f5dd; --good-ink: #0a5c23; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --faint: #9198a1; --rule: #30363d;
  --s0: #58a6ff; --s1: #f0883e; --s2: #56d364; --s3: #bc8cff; --good: #12391f; --good-ink: #7ee2a0; --bad: #ff7b72 } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 66rem; padding: 0 1rem;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.3rem; overflow-wrap: anywhere } h2 { font-size: 1rem; margin: 2rem 0 .5rem }
h3 { font-size: .85rem; margin: 0; font-weight: 600 }
.big { font-size: 1.1rem } .bad { color: var(--bad) } .panels { display: grid; gap: 1.2rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)) } .panels > :first-child { grid-column: 1 / -1 }
svg { width: 100%; height: auto; display: block } svg text { font-size: 12px; fill: var(--faint) }
.grid { stroke: var(--rule) } polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round }
polyline.s0 { stroke: var(--s0) } polyline.s1 { stroke: var(--s1) } polyline.s2 { stroke: var(--s2) }
polyline.s3 { stroke: var(--s3) } .s0 { fill: var(--s0); color: var(--s0) } .s1 { fill: var(--s1); color: var(--s1) }
.s2 { fill: var(--s2); color: var(--s2) } .s3 { fill: var(--s3); color: var(--s3) } polyline { fill: none !important }
table { border-collapse: collapse; font-size: .9rem } th, td { text-align: left; vertical-align: top;
  padding: .15rem .8rem .15rem 0; overflow-wrap: anywhere } th { font-weight: 600 } td + td { min-width: 4rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--rule); border-radius: 6px;
  padding: .8rem; font: 13px/1.5 ui-monospace, Menlo, monospace }
pre { color: var(--faint) } mark { background: var(--good); color: var(--good-ink) }
"""


def render(run: Run) -> str:
    """The page of a run: no script, and nothing that is fetched.

    Returns:
        HTML whose every text from the run is escaped.
    """
    state = f'<p class="big bad">stopped early: {escape(run.failure)}</p>' if run.failure else ""
    parts = [
        f"<h1>{escape(run.title)}</h1>{state}",
        f'<p class="big">{escape(run.describe_loss())}</p>',
        _facts(run),
        f'<h2>Curves</h2><div class="panels">{"".join(_panels(run))}</div>',
    ]
    if run.rulings:
        parts.append("<h2>Settings that were set, or are done another way</h2>" + _rulings(run.rulings))
    if run.notes:
        parts.append("<h2>Said once</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in run.notes) + "</ul>")
    if run.samples:
        parts.append("<h2>Training rows</h2><p><mark>trained</mark> and masked tokens of the first rows</p>")
        parts += [_sample(sample) for sample in run.samples]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.title)}</title><style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body>"
        "</html>\n"
    )


def _facts(run: Run) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in run.facts.items())
    return f'<table class="facts">{rows}</table>'


def _panels(run: Run) -> Iterable[str]:
    yield _panel(run.losses, "loss", WIDE) or "<div><h3>loss</h3><p>nothing was logged</p></div>"
    for one in run.others:
        yield _panel((one,), one.name)


def _panel(series: Sequence[Series], name: str, size: tuple[int, int] = PANEL) -> str:
    drawing = draw(series, f"{name} by step", size)
    if not drawing:
        return ""
    legend = " ".join(
        f'<span class="s{number % 4}">● {escape(one.name)}</span>'
        for number, one in enumerate(one for one in series if one.finite)
    )
    lost = sum(len(one.points) - len(one.finite) for one in series)
    note = f' <span class="bad">{lost} value(s) not finite</span>' if lost else ""
    return f"<div><h3>{escape(name)} {legend if len(series) > 1 else ''}{note}</h3>{drawing}</div>"


def _rulings(rulings: Iterable[tuple[str, str, str, str]]) -> str:
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rulings)
    return (
        '<table class="rulings"><tr><th>field</th><th>value</th><th>verdict</th><th>what happens</th></tr>'
        f"{rows}</table>"
    )


def _sample(sample: Sample) -> str:
    text = "".join(f"<mark>{escape(text)}</mark>" if trained else escape(text) for text, trained in sample.stretches)
    return f"<h3>{escape(sample.title)}</h3><pre>{text}</pre>"
