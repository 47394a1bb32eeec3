"""The report of a run: three figures and one self-contained page that somebody who knows nothing of the run understands."""

from collections.abc import Sequence
from pathlib import Path

from ctrl_diffusion.runs.files import write_atomic

from ..figures import Panel, class_panel, curve_panels, diagnostic_panels, figure, png, sample_panels
from ..pages import Picture, page
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


def pictures(panels: Sequence[Panel], width: float = 4.3, height: float = 3.7) -> list[Picture]:
    """The panels, each as an image of its own: they sit side by side where there is room."""
    return [Picture(png(figure([panel], width, height)), panel.alt) for panel in panels]


def metrics_by_group(run: Run) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Every metric as `(name, meaning, value with unit)`; those without a description come last, under their names."""
    described = {name for entries in GLOSSARY.values() for name in entries}
    other = {name: ("", "") for name in run.metrics if name not in described and not name.endswith("_se")}
    groups = [
        (
            group,
            [
                (name, meaning, quantity(run.metrics, name, run.unit if unit == "reward" else unit))
                for name, (unit, meaning) in entries.items()
                if name in run.metrics
            ],
        )
        for group, entries in [*GLOSSARY.items(), ("Other", other)]
    ]
    return [(group, rows) for group, rows in groups if rows]


def _page(run: Run, grids: Sequence[Panel], curves: Sequence[Panel], classes: Panel | None) -> str:
    again, redraw, load = commands(run)
    return page(
        "digits/report.html",
        title=f"Fine-tuning a diffusion model for {goal(run)}",
        headline=headline(run),
        warnings=warnings(run),
        introduction=introduction(run),
        meanings=meanings(run),
        samples=pictures(grids, 3.5, 4.0),
        has_optimum=len(grids) > 2,
        curves=pictures(curves),
        has_held_out=any(row.get("held_out_reward") is not None for row in run.history),
        held_out=HELD_OUT,
        classes=pictures([classes], 5.6) if classes else [],
        metrics=metrics_by_group(run),
        diagnostics=pictures(diagnostic_panels(run.history)),
        config=run.config,
        again=again,
        redraw=redraw,
        load=load,
    )
