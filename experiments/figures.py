"""The figures of a run: sample grids, curves against time, class histogram. Figure objects only: no pyplot, no global state.

A figure is a row of panels, so that the same panel serves a wide picture and a narrow screen.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke

from ctrl_diffusion.runs.images import mosaic

# Okabe and Ito's colours, told apart with any colour vision; marks and line styles differ as well.
BEFORE, AFTER, HELD_OUT, OPTIMUM = "#9a9a9a", "#0072b2", "#d55e00", "#111111"
FONT = 10.5

Row = Mapping[str, Any]


class Panel(NamedTuple):
    """One set of axes: `draw(axes)` fills it, `alt` says in words what it shows."""

    title: str
    alt: str
    draw: Callable[[Axes], None]


def figure(panels: Sequence[Panel], width: float = 4.3, height: float = 3.7) -> Figure:
    """The panels side by side, each `width` x `height` inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.07, wspace=0.04)
    result = Figure(figsize=(width * len(panels), height), layout=layout, facecolor="white")
    FigureCanvasAgg(result)
    for axes, panel in zip(result.subplots(1, len(panels), squeeze=False)[0], panels):
        axes.set_title(panel.title, loc="left", fontsize=FONT + 1, fontweight="bold", pad=8)
        axes.tick_params(labelsize=FONT - 1, color="#666666")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#666666")
        panel.draw(axes)
    return result


def png(figure: Figure, dpi: int = 200) -> bytes:
    """The figure as a PNG of this resolution, dots per inch."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
    return file.getvalue()


# -- samples -----------------------------------------------------------------------------------------------------------------


def sample_panels(samples: Mapping[str, np.ndarray], unit: str) -> list[Panel]:
    """Grids before, after and (where there are any) at the optimum, each with the mean reward of what it shows."""

    def panel(name: str, title: str) -> Panel:
        def draw(axes: Axes) -> None:
            axes.imshow(mosaic(samples[name]))
            axes.set_axis_off()
            rewards = samples.get(f"rewards_{name}")
            if rewards is not None:
                text = minus(f"mean reward {np.mean(rewards):.2f} {unit}").removesuffix(" reward units")
                axes.text(0, -0.02, text, transform=axes.transAxes, fontsize=FONT, va="top")

        return Panel(title, f"{len(samples[name])} samples, {title[0].lower() + title[1:]}", draw)

    titles = {"before": "Before fine-tuning", "after": "After fine-tuning", "optimum": "At the optimum"}
    return [panel(name, title) for name, title in titles.items() if name in samples]


# -- curves ------------------------------------------------------------------------------------------------------------------


def series(rows: Sequence[Row], x: str, y: str, se: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`x`, `y` and standard errors (0 where unknown) of the rows in which `x` and `y` are numbers."""
    kept = [row for row in rows if row.get(x) is not None and row.get(y) is not None]
    columns = [[row[x] for row in kept], [row[y] for row in kept], [(se and row.get(se)) or 0.0 for row in kept]]
    first, second, third = (np.asarray(column, np.float64) for column in columns)
    return first, second, third


def curve_panels(
    history: Sequence[Row], metrics: Row, unit: str, *, same_scale: bool = True, kl_budget: float | None = None
) -> list[Panel]:
    """Reward, path KL and relative gap against the time spent fine-tuning; those without any data are left out.

    The held-out reward shares the axes of the reward if it has the `same_scale`, and has its own otherwise.
    """
    rows = [row for row in history if row.get("phase") == "finetune"]
    start = {  # before the first update the policy is the reference
        "wall_seconds": 0.0,
        "evaluation_reward": metrics.get("reward_reference"),
        "evaluation_reward_se": metrics.get("reward_reference_se"),
        "evaluation_path_kl": 0.0,
        "relative_gap": 1.0,
        "held_out_reward": metrics.get("held_out_reward_reference"),
    }
    seconds = max([row["wall_seconds"] for row in rows if row.get("wall_seconds") is not None], default=0.0)
    scale, time = (1.0, "s") if seconds < 600 else (60.0, "min") if seconds < 36000 else (3600.0, "h")

    def batches(axes: Axes, name: str, color: str, label: str, **style: Any) -> None:
        x, y, _ = series([start, *rows] if name in start else rows, "wall_seconds", name)
        if len(x):
            axes.plot(x / scale, y, color=color, label=label, **style)

    def evaluations(axes: Axes, name: str) -> None:
        if not any(row.get(name) is not None for row in rows):
            return
        x, y, se = series([start, *rows], "wall_seconds", name, f"{name}_se")
        label = "evaluation ± s.e." if se.any() else "evaluation"
        axes.errorbar(x / scale, y, se, color=AFTER, marker="o", markersize=4, linewidth=1.8, label=label, zorder=3)

    def finish(axes: Axes, label: str, lines: Sequence[tuple[float | None, str, str, str]]) -> None:
        for value, text, color, side in lines:
            if value is not None:
                level(axes, value, text, color, side)
        axes.set_xlabel(f"fine-tuning time ({time})", fontsize=FONT)
        axes.set_ylabel(label, fontsize=FONT)
        axes.margins(x=0.03, y=0.13)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.19), ncols=2, frameon=False, fontsize=FONT - 1, borderpad=0)

    def reward(axes: Axes) -> None:
        batches(axes, "reward", AFTER, "training batches", alpha=0.5, linewidth=1.1)
        if same_scale:
            batches(axes, "held_out_reward", HELD_OUT, "held-out reward", linestyle="--", linewidth=1.4)
        evaluations(axes, "evaluation_reward")
        optimum = (metrics.get("optimum_reward"), "optimum", OPTIMUM, "above")
        finish(axes, f"mean reward ({unit})", [optimum, (metrics.get("reward_reference"), "reference", "#666666", "below")])

    def held_out(axes: Axes) -> None:
        batches(axes, "held_out_reward", HELD_OUT, "training batches", linestyle="--", linewidth=1.4)
        finish(axes, "log-prob. of the likeliest class (nats)", [])

    def path_kl(axes: Axes) -> None:
        batches(axes, "path_kl", AFTER, "training batches", alpha=0.5, linewidth=1.1)
        evaluations(axes, "evaluation_path_kl")
        optimum = (metrics.get("optimum_path_kl"), "optimum", OPTIMUM, "above")
        finish(axes, "path KL (nats)", [optimum, (kl_budget, "budget", HELD_OUT, "above")])

    def gap(axes: Axes) -> None:
        evaluations(axes, "relative_gap")
        finish(
            axes,
            "relative gap (dimensionless)",
            [(0.0, "optimum", OPTIMUM, "below"), (1.0, "reference", "#666666", "above right")],
        )

    panels: dict[tuple[str, ...], Panel] = {
        ("reward", "evaluation_reward"): Panel("Reward", "Mean reward against fine-tuning time", reward),
        ("path_kl", "evaluation_path_kl"): Panel("Path KL", "Path KL from the reference against fine-tuning time", path_kl),
        ("relative_gap",): Panel("Relative optimality gap", "Relative optimality gap against fine-tuning time", gap),
    }
    if not same_scale:
        panels["held_out_reward",] = Panel("Held-out reward", "Held-out reward against fine-tuning time", held_out)
    return [panel for names, panel in panels.items() if any(row.get(name) is not None for row in rows for name in names)]


def level(axes: Axes, value: float, text: str, color: str, side: str) -> None:
    """A labelled horizontal line; the label sits where a curve that starts at the reference does not pass."""
    axes.axhline(value, color=color, linewidth=1.3, linestyle=(0, (1, 1.5)) if color != OPTIMUM else (0, (5, 2)), zorder=2)
    left = side == "above" or (side == "below" and color == OPTIMUM)
    axes.annotate(
        text,
        (0.02 if left else 0.98, value),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, -3 if side == "below" else 3),
        textcoords="offset points",
        ha="left" if left else "right",
        va="top" if side == "below" else "bottom",
        color=color,
        fontsize=FONT - 0.5,
        path_effects=[withStroke(linewidth=3, foreground="white")],
        zorder=4,
    )


def diagnostic_panels(history: Sequence[Row]) -> list[Panel]:
    """What tells whether the training itself went well: loss of pre-training, quality of the value, size of the updates."""

    def panel(phase: str, x: str, y: str, title: str, label: str, log: bool = False) -> Panel | None:
        rows = [row for row in history if row.get("phase") == phase]
        name = "pre-training" if phase == "pretrain" else "fine-tuning"
        xs, ys, _ = series(rows, x, y)
        if not len(xs):
            return None

        def draw(axes: Axes) -> None:
            axes.plot(xs, ys, color=AFTER, linewidth=1.4, marker="o" if len(xs) < 40 else "", markersize=3.5)
            if log and (ys > 0).all():
                axes.set_yscale("log")
            axes.set_xlabel(f"{name} {x}", fontsize=FONT)
            axes.set_ylabel(label, fontsize=FONT)
            axes.grid(axis="y", which="both", color="#e6e6e6", linewidth=0.8)

        return Panel(title, f"{title} against the {x} of {name}", draw)

    panels = (
        panel("pretrain", "step", "loss", "Pre-training loss", "denoising loss"),
        panel("finetune", "iteration", "value_explained_variance", "Value network", "explained variance (1 is perfect)"),
        panel("finetune", "iteration", "update_kl", "Size of the updates", "KL between successive policies (nats)", log=True),
    )
    return [panel for panel in panels if panel is not None]


# -- classes -----------------------------------------------------------------------------------------------------------------


def class_panel(samples: Mapping[str, np.ndarray], target: int | None = None) -> Panel | None:
    """Class frequencies before and after as bars and at the optimum as the level to reach; `target` is the rewarded class."""
    if "histogram_before" not in samples or "histogram_after" not in samples:
        return None

    def draw(axes: Axes) -> None:
        before, after = (100 * np.asarray(samples[f"histogram_{name}"]) for name in ("before", "after"))
        classes = np.arange(len(before))
        axes.bar(classes - 0.2, before, 0.4, color="#c4c4c4", edgecolor="#7a7a7a", linewidth=0.6, label="before fine-tuning")
        axes.bar(classes + 0.2, after, 0.4, color=AFTER, edgecolor=AFTER, linewidth=0.6, label="after fine-tuning")
        if "histogram_optimum" in samples:
            optimum = 100 * np.asarray(samples["histogram_optimum"])
            lines = axes.hlines(optimum, classes - 0.47, classes + 0.47, color=OPTIMUM, linewidth=2, label="at the optimum")
            lines.set(path_effects=[withStroke(linewidth=3.6, foreground="white")])
        labels = [f"{i}\n(rewarded)" if i == target else str(i) for i in classes]
        axes.set_xticks(classes, labels)
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("class assigned by a classifier", fontsize=FONT)
        axes.set_ylabel("share of samples (%)", fontsize=FONT)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlim(-0.7, len(classes) - 0.3)
        handles, names = axes.get_legend_handles_labels()
        order = sorted(range(len(names)), key=lambda i: names[i] == "at the optimum")
        axes.legend([handles[i] for i in order], [names[i] for i in order], loc="best", frameon=False, fontsize=FONT - 1)

    return Panel("Classes of the samples", "Class frequencies before and after fine-tuning and at the optimum", draw)


def minus(text: str) -> str:
    """A typographic minus sign in front of a number."""
    return text.replace("-", "\N{MINUS SIGN}")
