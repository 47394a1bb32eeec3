"""The leaderboard as a table and two figures: gaps of all algorithms, and reward against path KL on the ring."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

from ctrl_diffusion import exact
from ctrl_diffusion.runs.files import write_atomic

from ..figures import png
from .setup import PROBLEMS
from .units import ENTRIES

Result = dict[str, Any]


def write_report(out: Path, results: Sequence[Result]) -> None:
    """`table.md` (the overview first, if there are several problems), `gaps.png`, and `frontier.png` if the ring is among the problems."""
    several = len({result["problem"] for result in results}) > 1
    write_atomic(out / "table.md", (f"Relative gaps (%)\n\n{overview(results)}\n" if several else "") + table(results))
    write_atomic(out / "gaps.png", png(_gaps(results), 140))
    if any(result["problem"] == "ring_linear" for result in results):
        write_atomic(out / "frontier.png", png(_frontier([r for r in results if r["problem"] == "ring_linear"]), 140))


def _groups(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """Results by problem and algorithm, in the order of the catalogue."""
    keys = [(problem, algorithm) for problem in PROBLEMS for algorithm in ENTRIES]
    groups = {key: [r for r in results if (r["problem"], r["algorithm"]) == key] for key in keys}
    return {key: found for key, found in groups.items() if found}


def _mean(found: Sequence[Result], name: str) -> tuple[float, float] | None:
    """Mean over seeds and its standard error (with one seed: the measurement's own)."""
    values = [r[name] for r in found]
    if any(v is None for v in values):
        return None
    if len(values) == 1:
        return values[0], found[0].get(f"{name}_se") or 0.0
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def _text(pair: tuple[float, float] | None, digits: int, scale: float = 1.0) -> str:
    if pair is None:
        return "-"
    mean, se = pair
    return f"{scale * mean:.{digits}f}" + (f" ± {scale * se:.{digits}f}" if se else "")


def table(results: Sequence[Result]) -> str:
    """One row per problem and algorithm, means over seeds."""
    seeds = len({r["seed"] for r in results})
    lines = [
        f"Means over {seeds} seed{'s' if seeds > 1 else ''}; ± is the standard error over seeds, with one seed that of the measurement.",
        "",
        "| problem | algorithm | relative gap (%) | on the chain (%) | to its own fixed point (%) | control error / zero control's (%) "
        "| reward | path KL | distance | network evaluations, forward + gradient (M) | rewards (M) | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (problem, algorithm), found in _groups(results).items():
        zero = found[0]["zero_control_l2_error"]
        error = _mean(found, "control_l2_error")
        calls = [found[0][name] / 1e6 for name in ("network_evaluations", "network_gradient_evaluations", "reward_evaluations")]
        cells = (
            problem, algorithm, _text(_mean(found, "relative_gap"), 2, 100), _text(_mean(found, "chain_relative_gap"), 1, 100),
            _text(_mean(found, "own_relative_gap"), 2, 100), _text(error, 2, 100 / zero), _text(_mean(found, "reward"), 3),
            _text(_mean(found, "path_kl"), 3), _text(_mean(found, "distance"), 4), f"{calls[0]:.1f} + {calls[1]:.1f}",
            f"{calls[2]:.2f}", f"{np.mean([r['wall_seconds'] for r in found]):.0f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def overview(results: Sequence[Result]) -> str:
    """Relative gaps in %, a row per algorithm and a column per problem; empty where an algorithm does not apply."""
    groups = _groups(results)
    problems, algorithms = ([k for k in known if any(k in key for key in groups)] for known in (PROBLEMS, ENTRIES))
    lines = ["| algorithm | " + " | ".join(problems) + " |", "|---" * (1 + len(problems)) + "|"]
    for algorithm in algorithms:
        found = [groups.get((problem, algorithm)) for problem in problems]
        cells = ["" if rows is None else _text(_mean(rows, "relative_gap"), 2, 100) for rows in found]
        lines.append(f"| {algorithm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _gaps(results: Sequence[Result]) -> Any:
    """Relative gaps on a logarithmic axis, one panel per problem, a point per seed."""
    penalised = [r for r in results if r["relative_gap"] is not None]
    problems = [p for p in PROBLEMS if any(r["problem"] == p for r in penalised)]
    heights = [len({r["algorithm"] for r in penalised if r["problem"] == p}) for p in problems]
    figure, axes = plt.subplots(
        max(len(problems), 1), 1, figsize=(7.5, 1.1 * max(len(problems), 1) + 0.26 * sum(heights)), sharex=True, squeeze=False,
        height_ratios=[h + 1.2 for h in heights] or None, layout="constrained",
    )  # fmt: skip
    for panel, problem in zip(axes[:, 0], problems):
        rows = [r for r in penalised if r["problem"] == problem]
        names = sorted(
            {r["algorithm"] for r in rows}, key=lambda a: -np.mean([r["relative_gap"] for r in rows if r["algorithm"] == a])
        )
        for i, name in enumerate(names):
            values = [100 * max(r["relative_gap"], 1e-5) for r in rows if r["algorithm"] == name]
            panel.plot([min(values), 100], [i, i], color="#e2e2e2", linewidth=1, zorder=0)
            panel.plot(values, [i] * len(values), "o", color="#999999" if name == "exact_critic" else "#1f5fa8", markersize=6)
        panel.set_yticks(range(len(names)), names, fontsize=9)
        panel.set_ylim(-0.6, len(names) - 0.4)
        panel.set_title(problem.replace("_", " "), loc="left", fontsize=10)
        panel.set_xscale("log")
        for bar, style in ((1, "-"), (5, ":")):
            panel.axvline(bar, color="#b04a3a", linewidth=0.8, linestyle=style)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    axes[-1, 0].set_xlabel("optimality gap, % of the reference's (lines: 1 % and 5 %)", fontsize=9)
    return figure


def _frontier(results: Sequence[Result]) -> Any:
    """Reward against path KL at the end of training (first seed), and the best that any policy can do: near the optimum, and all."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    ring = [exact.ring_linear(float(weight)) for weight in np.geomspace(5e-3, 20, 80)]
    best = np.asarray([[float(p.tilted_kl), float(p.tilted_reward)] for p in ring])
    colours = plt.get_cmap("tab20")(np.linspace(0, 1, 20))
    for panel in panels:
        panel.plot(best[:, 0], best[:, 1], color="black", linewidth=1.2, label="best possible")
        for i, algorithm in enumerate(a for a in ENTRIES if a != "exact_critic"):
            for result in [r for r in results if r["algorithm"] == algorithm][:1]:
                free = not ENTRIES[algorithm].penalised
                panel.plot(
                    result["path_kl"], result["reward"], "^" if free else "o", color=colours[i % 20], markersize=7,
                    markeredgecolor="black" if i >= 20 else None,
                    label=f"{algorithm} (no KL penalty)" if free else algorithm,
                )  # fmt: skip
        panel.set_xlabel("path KL to the reference (nats)", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set(xlim=(-0.05, 1.4), ylim=(-0.1, 2.8))
    panels[0].set_ylabel("mean reward", fontsize=9)
    panels[1].set_xscale("symlog", linthresh=1)
    panels[1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
