"""The three figures of `experiments.discretization`: heat maps of the matrix, curves against steps, reward against path KL."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

import ctrl_diffusion as cd
from ctrl_diffusion.runs.files import write_atomic

from ..figures import AFTER, BEFORE, FONT, HELD_OUT, OPTIMUM, Panel, figure, minus, png
from .summary import METHODS, NAMES

COLORS = {"reference": BEFORE, "score_as_action": AFTER, "ddpo": HELD_OUT, "ddpo_kl": "#009e73"}
MARKS = {"reference": "s", "score_as_action": "o", "ddpo": "^", "ddpo_kl": "v"}
STYLES = {"reference": (0, (1, 1.5)), "score_as_action": "-", "ddpo": (0, (5, 2)), "ddpo_kl": (0, (4, 1.5, 1, 1.5))}

Row = Mapping[str, Any]


def write_figures(
    folder: Path, metrics: Row, history: Mapping[str, Sequence[Sequence[Row]]], chain_rewards: Sequence[np.ndarray], config: Row
) -> None:
    """Writes `heatmaps.png`, `curves.png` and `frontier.png` into `folder`.

    `history` holds the log of every method and seed, `chain_rewards` rewards of reference samples of the chain of training.
    """
    write_atomic(folder / "heatmaps.png", png(heatmaps(metrics["summary"], config)))
    write_atomic(folder / "curves.png", png(figure(curves(metrics, config), 4.6, 4.3)))
    panel = frontier(metrics["summary"], history, chain_rewards, config)
    write_atomic(folder / "frontier.png", png(figure([panel], 6.4, 4.6)))


def heatmaps(rows: Sequence[Row], config: Row) -> Figure:
    """A row per eta; the reward of the reference, then the gain of every method; the cell of training is framed."""
    solvers, steps, etas = list(config["solvers"]), sorted(config["steps"]), sorted(config["etas"], reverse=True)
    at = {(row["method"], row["solver"], row["steps"], row["eta"]): row for row in rows}

    def grid(method: str, eta: float, name: str) -> np.ndarray:
        return np.array([[at[(method, solver, n, eta)][name] for n in steps] for solver in solvers])

    gains = np.concatenate([grid(m, eta, "gain").ravel() for m in METHODS[1:] for eta in etas])
    rewards = np.concatenate([grid("reference", eta, "reward").ravel() for eta in etas])
    top, bottom = max(float(np.quantile(gains, 0.98)), 1e-3), min(float(np.quantile(gains, 0.02)), -1e-3)
    digits = 1 if top > 0.5 else 2
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.02, hspace=0.02)
    height = 1.1 + 0.28 * len(solvers)
    result = Figure(figsize=(3.1 * len(METHODS) + 1.9, height * len(etas) + 0.6), layout=layout, facecolor="white")
    FigureCanvasAgg(result)
    axes = result.subplots(len(etas), len(METHODS), squeeze=False, sharex=True, sharey=True)
    images: list[Any] = [None, None]
    for i, eta in enumerate(etas):
        for j, method in enumerate(METHODS):
            ax, first = axes[i, j], j == 0
            values = grid(method, eta, "reward" if first else "gain")
            if first:
                low, high = np.quantile(rewards, 0.02), rewards.max()
                images[0] = ax.imshow(values, cmap="Greys_r", vmin=low, vmax=high, aspect="auto")
            else:
                images[1] = ax.imshow(values, cmap="RdBu", norm=TwoSlopeNorm(0.0, bottom, top), aspect="auto")
            for (y, x), v in np.ndenumerate(values):
                r, g, b, _ = images[0 if first else 1].to_rgba(v)
                dark = 0.299 * r + 0.587 * g + 0.114 * b < 0.5
                ax.text(
                    x, y, minus(f"{v:.{digits}f}"), ha="center", va="center", fontsize=8, color="white" if dark else "black"
                )
            if eta == config["train_eta"] and not first:
                place = steps.index(config["train_steps"]) - 0.5, solvers.index(config["train_solver"]) - 0.5
                ax.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="black", linewidth=2.2, clip_on=False, zorder=5))
            ax.set_xticks(range(len(steps)), [str(n) for n in steps])
            ax.set_yticks(range(len(solvers)), solvers)
            ax.tick_params(length=0, labelsize=FONT - 1.5)
            ax.spines[:].set_visible(False)
            title = f"{NAMES[method].capitalize() if first else NAMES[method]}: {'reward' if first else 'gain'}, η = {eta:g}"
            ax.set_title(title, loc="left", fontsize=FONT - 0.5, fontweight="bold")
            if i == len(etas) - 1:
                ax.set_xlabel("steps", fontsize=FONT)
    labels = ("mean reward (nats)", "gain over the reference in the same cell (nats)")
    for image, label, shown in zip(images, labels, (axes[:, :1], axes[:, 1:])):
        location = "left" if label == labels[0] else "right"
        bar = result.colorbar(image, ax=shown, location=location, shrink=0.5, aspect=30, extend="both", pad=0.02)
        bar.set_label(label, fontsize=FONT - 1)
        bar.ax.tick_params(labelsize=FONT - 2)
    return result


def curves(metrics: Row, config: Row) -> list[Panel]:
    """Reward against steps with the solver of training, at the eta of training and at the least, and the gain that is kept."""
    solver, trained, eta = config["train_solver"], config["train_steps"], config["train_eta"]
    panels = []
    for e in dict.fromkeys((eta, min(config["etas"]))):

        def reward(axes: Axes, e=e) -> None:
            for method in METHODS:
                rows = [r for r in metrics["summary"] if (r["method"], r["solver"], r["eta"]) == (method, solver, e)]
                x, y, se = np.array(sorted((r["steps"], r["reward"], r["reward_se"] or 0.0) for r in rows)).T
                _band(axes, method, x, y, se)
            _against_steps(axes, config, "mean reward (nats)")

        title = f"Reward at η = {e:g}" + (" (trained)" if e == eta else "")
        panels.append(Panel(title, f"Mean reward against steps with {solver} at eta {e:g}", reward))

    def retention(axes: Axes) -> None:
        for method in METHODS[1:]:
            found = metrics["retention"][method]["by_steps"]
            counts = sorted(found, key=int)
            _band(axes, method, [int(n) for n in counts], *([found[n][v] or 0 for n in counts] for v in ("mean", "se")))
        axes.axhline(1, color=OPTIMUM, linewidth=1, linestyle=(0, (5, 2)), zorder=1)
        axes.set_ylim(min(0.0, axes.get_ylim()[0]), max(1.15, axes.get_ylim()[1]))
        _against_steps(axes, config, f"gain / gain at {trained} steps")

    return [*panels, Panel(f"Gain kept at η = {eta:g}", "Gain as a fraction of that at the step count of training", retention)]


def _band(axes: Axes, method: str, x: Any, y: Any, se: Any) -> None:
    low, high = (np.asarray(y) + sign * np.asarray(se) for sign in (-1, 1))
    axes.fill_between(x, low, high, color=COLORS[method], alpha=0.2, linewidth=0)
    style: dict[str, Any] = dict(color=COLORS[method], marker=MARKS[method], linestyle=STYLES[method], label=NAMES[method])
    axes.plot(x, y, markersize=5, linewidth=1.7, **style)


def _against_steps(axes: Axes, config: Row, label: str) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sorted(config["steps"]), [str(n) for n in sorted(config["steps"])])
    axes.set_xticks([], minor=True)
    axes.axvline(config["train_steps"], color="#bbbbbb", linewidth=5, alpha=0.5, zorder=0)
    axes.set_xlabel(f"steps of {config['train_solver']} (grey: trained)", fontsize=FONT)
    axes.set_ylabel(label, fontsize=FONT)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False, fontsize=FONT - 1, borderpad=0)


def frontier(
    rows: Sequence[Row], history: Mapping[str, Sequence[Sequence[Row]]], chain_rewards: Sequence[np.ndarray], config: Row
) -> Panel:
    """Reward against path KL at the cell of training: the way of every method there, its end, and the best that is possible."""

    def draw(axes: Axes) -> None:
        best = np.mean([best_rewards(rewards) for rewards in chain_rewards], axis=0)
        axes.plot(best[:, 0], best[:, 1], color=OPTIMUM, linewidth=1.4, linestyle=(0, (5, 2)), label="best possible", zorder=1)
        for method in METHODS[1:]:
            for run in history[method]:
                points = np.array(
                    [[r["path_kl"], r["reward"]] for r in run if r["phase"] == "finetune" and r["path_kl"] > 0.02]
                )
                axes.plot(*points.reshape(-1, 2).T, color=COLORS[method], linewidth=0.8, alpha=0.45, zorder=2)
            place = (method, config["train_solver"], config["train_steps"], config["train_eta"])
            row = next(r for r in rows if (r["method"], r["solver"], r["steps"], r["eta"]) == place)
            axes.errorbar(
                row["path_kl"], row["reward"], row["reward_se"] or 0, row["path_kl_se"] or 0, color=COLORS[method],
                marker=MARKS[method], markersize=8, markeredgecolor="white", linewidth=1.6, linestyle="none", label=NAMES[method],
                zorder=4,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(left=0.02)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("path KL from the reference (nats)", fontsize=FONT)
        axes.set_ylabel("mean reward (nats)", fontsize=FONT)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(loc="upper left", frameon=False, fontsize=FONT - 1)

    return Panel("Reward against path KL, equal budgets", "Reward against path KL of the methods and at the optimum", draw)


def best_rewards(rewards: np.ndarray) -> np.ndarray:
    """`[k, 2]`: path KL and reward at the optimum, for kl_weights from 100 down to 1/2."""
    found = [cd.reweighted_optimum(rewards, kl_weight) for kl_weight in np.geomspace(100, 0.5, 60)]
    return np.array([[optimum.path_kl, optimum.reward] for optimum in found])
