"""The figure of `experiments.benchmark`: images and update samples per second of every side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ctrl_diffusion.runs.files import write_atomic

from ..figures import AFTER, BEFORE, FONT, HELD_OUT, Panel, figure, png

COLORS = (AFTER, BEFORE, HELD_OUT, "#e69f00")


TITLES = {"rollout": "Sampling, images/s", "update": "Policy update, samples/s"}


def write_figure(path: Path, metrics: Mapping[str, Any], kinds: Sequence[str] = ("rollout", "update")) -> None:
    """Bars are medians, whiskers quartiles; where there is no bar, the reason stands."""
    write_atomic(path, png(figure([panel(metrics, kind) for kind in kinds], 5.6, 2.9)))


def panel(metrics: Mapping[str, Any], kind: str) -> Panel:
    """One set of bars, with the two ratios below."""
    rows, title, over_torch = metrics["sides"], TITLES[kind], metrics[f"{kind}_speedup_over_torch"]
    below = f"{metrics[f'{kind}_ratio_to_scan']:.3f}x the scan's time"
    if over_torch is not None:
        below += f"; {over_torch:.2f}x as fast as {metrics[f'{kind}_faster_torch']}"
    where = f"{metrics['device']}, batch {metrics['batch']}, {metrics['steps']} steps"
    if kind == "update" and metrics.get("scan_minibatches"):
        where += "; minibatches scanned"

    def draw(axes: Axes) -> None:
        for i, (row, color) in enumerate(zip(rows, COLORS)):
            found = row[f"{kind}_samples_per_second"]
            if found is None:
                axes.text(
                    0.01, i, row["reason"], transform=axes.get_yaxis_transform(), fontsize=FONT - 2.5, va="center", wrap=True
                )
                continue
            median, low, high = found
            axes.barh(i, median, color=color, xerr=[[median - low], [high - median]], height=0.65, capsize=3)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=FONT - 1)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{below}\n{where}", fontsize=FONT - 1)

    return Panel(title, f"{title}: {below}.", draw)
