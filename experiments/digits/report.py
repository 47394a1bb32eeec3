"""The report of a run: three figures and one self-contained page that somebody who knows nothing of the run understands.

    python -m experiments.report runs/digits

reads `config.json`, `metrics.json`, `history.jsonl` and `samples.npz` and writes `samples.png`, `curves.png`, `classes.png` and
`report.html` beside them.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ctrl_diffusion.runs.files import write_atomic

from ..figures import Panel, class_panel, curve_panels, diagnostic_panels, figure, png, sample_panels
from ..pages import image, page, settings
from .glossary import GLOSSARY
from .narrative import HELD_OUT, commands, goal, headline, introduction, meanings, warnings
from .results import Run, load_run, quantity


def write_report(directory: Path) -> Path:
    """Draws the figures of the finished run in `directory` and writes `report.html` there; returns its path."""
    run = load_run(Path(directory))
    target = run.config.get("digit") if run.config.get("reward") == "digit" else None
    grids = sample_panels(run.samples, run.unit)
    same_scale, kl_budget = target is not None, run.config.get("kl_budget")
    curves = curve_panels(run.history, run.metrics, run.unit, same_scale=same_scale, kl_budget=kl_budget)
    classes = class_panel(run.samples, target)
    write_atomic(run.directory / "samples.png", png(figure(grids, 3.5, 4.0)))
    if curves:
        write_atomic(run.directory / "curves.png", png(figure(curves)))
    if classes:
        write_atomic(run.directory / "classes.png", png(figure([classes], 7.5, 3.7)))
    report = run.directory / "report.html"
    write_atomic(report, _page(run, grids, curves, classes))
    return report


def pictures(panels: Sequence[Panel], caption: str, width: float = 4.3, height: float = 3.7) -> str:
    """The panels as separate embedded images that sit side by side where there is room."""
    images = ""
    for panel in panels:
        images += image(png(figure([panel], width, height)), panel.alt) + "\n"
    return f'<figure><div class="panels">\n{images}</div><figcaption>{caption}</figcaption></figure>'


def metrics_table(run: Run) -> str:
    """Every metric with its meaning, value and unit; those without a description come last, under their names."""
    m, rows, seen = run.metrics, "", set()
    groups = {**GLOSSARY, "Other": {}}
    for group, entries in groups.items():
        if group == "Other":
            entries = {name: ("", "") for name in m if name not in seen and not name.endswith("_se")}
        body = ""
        for name, (unit, meaning) in entries.items():
            seen.add(name)
            if name in m:
                value = quantity(m, name, run.unit if unit == "reward" else unit)
                body += f"<tr><td><code>{escape(name)}</code><br>{escape(meaning)}</td><td>{escape(value)}</td></tr>\n"
        if body:
            rows += f'<tbody><tr><th colspan="2" scope="rowgroup">{group}</th></tr>\n{body}</tbody>\n'
    head = "<thead><tr><th>Metric and what it means</th><th>Value ± standard error</th></tr></thead>"
    return f"<table>{head}\n{rows}</table>"


def _page(run: Run, grids: Sequence[Panel], curves: Sequence[Panel], classes: Panel | None) -> str:
    title = f"Fine-tuning a diffusion model for {goal(run)}"
    notes = "".join(f'<aside role="note"><strong>{escape(t)}</strong> {escape(text)}</aside>\n' for t, text in warnings(run))
    terms = "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(value)}</b>{escape(text)}</dd></div>\n"
        for name, value, text in meanings(run)
    )
    again, redraw, load = map(escape, commands(run))
    optimum = "; at the optimum: samples of the reference, drawn again with weights exp(reward / λ)" if len(grids) > 2 else ""
    parts = [
        f"<h1>{escape(title)}</h1>\n<p class=lead>{escape(headline(run))}</p>\n{notes}",
        "<h2>What was done</h2>\n" + "".join(f"<p>{escape(text)}</p>\n" for text in introduction(run)),
        f"<h2>What came out</h2>\n<dl>\n{terms}</dl>",
        "<h2>Samples</h2>\n"
        + pictures(
            grids,
            "Samples are not selected; the mean is over those shown. Before and after start from the same noise, so images in "
            f"the same place can be compared{optimum}.",
            3.5,
            4.0,
        ),
    ]
    if curves:
        text = (
            "Progress against the time spent fine-tuning, evaluations excluded; the first iteration includes compilation. "
            "Dashed: the optimum. Dotted: the reference. "
        )
        if any(row.get("held_out_reward") is not None for row in run.history):
            text += HELD_OUT
        parts.append(f"<h2>Progress</h2>\n{pictures(curves, escape(text))}")
    if classes:
        text = (
            "What a classifier that took no part in the training takes the samples for. Lines: the frequencies at the optimum."
        )
        parts.append(f"<h2>Classes</h2>\n{pictures([classes], text, 5.6, 3.7)}")
    parts.append(f"<h2>All metrics</h2>\n{metrics_table(run)}")
    diagnostics = diagnostic_panels(run.history)
    if diagnostics:
        text = "How the training itself went: loss of pre-training, how well the value network predicts, size of each update."
        parts.append(f"<details><summary>Diagnostics</summary>\n{pictures(diagnostics, text)}</details>")
    parts.append(settings(run.config))
    parts.append(
        "<h2>Use it, repeat it</h2>\n"
        f"<p>Draw 16 images from the fine-tuned model:</p>\n<pre><code>{load}</code></pre>\n"
        "<p>Repeat the run. The same command resumes an interrupted run and leaves a finished one alone; another "
        f"<code>--out</code> starts afresh:</p>\n<pre><code>{again}</code></pre>\n"
        f"<p>Draw this report again:</p>\n<pre><code>{redraw}</code></pre>"
    )
    return page(title, parts)
