"""The ablation as a table and two figures per problem: error over time, and error against updates."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ctrl_diffusion.runs.files import write_atomic

from ..figures import FONT, png
from .variants import BY_NAME, PANELS, VARIANTS, Panel, mean, optimum

Result = Mapping[str, Any]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito
GREY = "#8a8a8a"


def relative_errors(result: Result, which: str) -> np.ndarray:
    """Root mean square error over time and states, over that of the best constant of every time, `[S, e]`.

    `sqrt(int E (V - exact)^2 dt / int Var(exact) dt)` by the trapezoidal rule, less the squared errors of estimated values.
    """
    t = np.asarray(result["t"])
    square = np.asarray(result[f"square_{which}"]) - np.asarray(result[f"noise_{which}"])
    return np.sqrt(np.maximum(np.trapezoid(square, t), 0) / np.trapezoid(result[f"variance_{which}"], t))


def summary(result: Result) -> dict[str, Any]:
    """What `metrics.json` holds of a unit: relative errors at the end and after an eighth of the updates, over seeds."""
    row: dict[str, Any] = {name: result[name] for name in ("problem", "variant", "seconds")}
    row["updates"] = result["updates"][-1]
    for which in ("own", "soft"):
        errors = relative_errors(result, which)
        row[f"error_{which}"], row[f"error_{which}_se"] = _over_seeds(errors[:, -1])
        early = int(np.searchsorted(result["updates"], result["updates"][-1] / 8))
        row[f"early_error_{which}"], row[f"early_error_{which}_se"] = _over_seeds(errors[:, early])
    noise = np.trapezoid(result["noise_own"], result["t"]) / np.trapezoid(result["variance_own"], result["t"])
    known = result["square_at_optimum"] is not None
    at_optimum = _over_seeds(relative_errors(result, "at_optimum")[:, -1]) if known else (None, None)
    row["error_at_optimum"], row["error_at_optimum_se"] = at_optimum
    return row | {"seeds": len(errors), "estimate_error": float(np.sqrt(noise))}


def _over_seeds(values: np.ndarray) -> tuple[float, float | None]:
    """Mean and its standard error, which a single seed does not have."""
    se = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(np.mean(values)), se


def table(results: Sequence[Result]) -> str:
    """One row per problem and variant, in the order of the panels."""
    rows = [summary(result) for result in results]
    lines = [
        f"Errors in % of the best constant's, over states and time; means over {rows[0]['seeds']} seeds ± standard error.",
        "",
        "| problem | variant | states | converges to | error to that | after 1/8 of updates | error to V* | at optimal states | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        variant = BY_NAME[row["variant"]]
        of = "optimum" if variant.law is optimum else "reference"
        target = "E[r given x]" if variant.converges_to is mean else "V*"
        cells = (
            row["problem"], row["variant"], of, target, _percent(row, "error_own"), _percent(row, "early_error_own"),
            _percent(row, "error_soft"), _percent(row, "error_at_optimum"), f"{row['seconds']:.0f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _percent(row: Mapping[str, Any], name: str) -> str:
    if row[name] is None:
        return "–"
    se = row[f"{name}_se"]
    return f"{100 * row[name]:.1f}" + ("" if se is None else f" ± {100 * se:.1f}")


def write_report(out: Path, results: Sequence[Result]) -> None:
    """`table.md`, and per problem `errors-*.png` and `curves-*.png`."""
    write_atomic(out / "table.md", table(results))
    for problem in dict.fromkeys(result["problem"] for result in results):
        found = {result["variant"]: result for result in results if result["problem"] == problem}
        write_atomic(out / f"errors-{problem}.png", png(_figure(found, _errors, "control time t", "rms error (reward)"), 96))
        write_atomic(out / f"curves-{problem}.png", png(_figure(found, _curves, "updates", "error (% of constant's)"), 96))


Draw = Callable[[Axes, Panel, Mapping[str, Result]], None]


def _figure(found: Mapping[str, Result], draw: Draw, x: str, y: str) -> Figure:
    """The panels that have at least two variants, three in a row."""
    panels = [panel for panel in PANELS if sum(name in found for name in panel.names) > 1]
    rows = -(-len(panels) // 3) or 1
    figure = Figure(figsize=(3.9 * min(3, max(1, len(panels))), 3.0 * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, min(3, max(1, len(panels))), squeeze=False)
    for axes, panel in zip(grid.flat, panels):
        axes.set_title(panel.title, loc="left", fontsize=FONT, fontweight="bold")
        axes.tick_params(labelsize=FONT - 2, color="#666666")
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, panel, found)
        axes.set_xlabel(x, fontsize=FONT - 1.5)
    for axes in grid[:, 0]:
        axes.set_ylabel(y, fontsize=FONT - 1.5)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    return figure


def _lines(panel: Panel, found: Mapping[str, Result]) -> list[tuple[str, str, Result]]:
    """Label, colour and result of the variants of a panel."""
    labels = {v.name: v.label for v in VARIANTS} | dict(panel.labels)
    return [(labels[n], COLOURS[i], found[n]) for i, n in enumerate(panel.names) if n in found]


def _errors(axes: Axes, panel: Panel, found: Mapping[str, Result]) -> None:
    """Root mean square error to what each variant converges to, over control time, at the end of training."""
    lines = _lines(panel, found)
    constant = lines[0][2]
    axes.plot(constant["t"], np.sqrt(constant["variance_own"]), color=GREY, linestyle=":", linewidth=1.2, label="best constant")
    for label, colour, result in lines:
        square = np.mean(np.asarray(result["square_own"])[:, -1], axis=0) - np.asarray(result["noise_own"])
        axes.plot(result["t"], np.sqrt(np.maximum(square, 1e-12)), color=colour, linewidth=1.5, label=label)
    axes.set_yscale("log")
    axes.set_ylim(0.005, 5.0)
    axes.yaxis.set_major_formatter("{x:g}")
    style = {"frameon": False, "labelcolor": "linecolor", "handlelength": 1.0, "handletextpad": 0.5, "borderpad": 0}
    axes.legend(fontsize=FONT - 2, loc="center left", bbox_to_anchor=(1.01, 0.5), **style)


def _curves(axes: Axes, panel: Panel, found: Mapping[str, Result]) -> None:
    """Relative error to what each variant converges to, mean over seeds with standard error, against updates."""
    ends = []
    for label, colour, result in _lines(panel, found):
        errors = 100 * relative_errors(result, "own")
        centre = errors.mean(axis=0)
        if len(centre) == 1:
            axes.axhline(centre[0], color=colour, linewidth=1.2, linestyle="--")
        else:
            spread = errors.std(axis=0, ddof=1) / np.sqrt(len(errors)) if len(errors) > 1 else 0 * centre
            axes.errorbar(result["updates"], centre, spread, color=colour, linewidth=1.5, capsize=2)
        ends.append((float(centre[-1]), label, colour))
    axes.set_yscale("log")
    axes.set_ylim(1.0, 300.0)
    axes.yaxis.set_major_formatter("{x:g}")
    _label(axes, ends)


def _label(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Labels right of the lines' ends, moved apart where they would overlap."""
    low, high = np.log(axes.get_ylim())
    ends = sorted(ends)
    wanted = np.clip([(np.log(max(value, 1e-9)) - low) / (high - low) for value, _, _ in ends], 0, 1)
    steps = 0.085 * np.arange(len(ends))
    apart = np.maximum.accumulate(wanted - steps) + steps
    apart -= np.mean(apart - wanted)
    for place, (_, label, colour) in zip(apart, ends):
        axes.text(1.02, place, label, color=colour, transform=axes.transAxes, fontsize=FONT - 2, va="center")
