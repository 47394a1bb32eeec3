"""The figure of `experiments.benchmark`: images and update samples per second of every side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from .figures import AFTER, BEFORE, FONT, HELD_OUT, Panel, figure, png
from .files import write_atomic

COLORS = (AFTER, BEFORE, HELD_OUT, "#e69f00")


def write_figure(path: Path, metrics: Mapping[str, Any]) -> None:
    """Bars are medians, whiskers quartiles; where there is no bar, the reason stands."""
    panels = [
        panel(metrics, "rollout", "Sampling, images/s", "rollout_ratio_to_scan", "rollout_speedup_over_torch"),
        panel(metrics, "update", "Policy update, samples/s", "update_ratio_to_scan", "update_speedup_over_torch"),
    ]
    write_atomic(path, png(figure(panels, 5.6, 2.9)))


def panel(metrics: Mapping[str, Any], kind: str, title: str, to_scan: str, over_torch: str) -> Panel:
    """One set of bars, with the two ratios below."""
    rows = metrics["sides"]
    below = f"{metrics[to_scan]:.3f}x the scan's time"
    if metrics[over_torch] is not None:
        below += f"; {metrics[over_torch]:.2f}x as fast as {metrics[f'{kind}_faster_torch']}"

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
        axes.set_xlabel(f"{below}\n{metrics['device']}, batch {metrics['batch']}, {metrics['steps']} steps", fontsize=FONT - 1)

    return Panel(title, f"{title}: {below}.", draw)
