"""The table and the figure of `experiments.pod_plan`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from ctrl_diffusion.runs.files import write_atomic

from ..figures import AFTER, BEFORE, FONT, HELD_OUT, OPTIMUM, Panel, figure, png

Row = Mapping[str, Any]


def size(number: float | None) -> str:
    """Bytes for a person."""
    if number is None:
        return "too much"
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 2**power:
            return f"{number / 2**power:.3g} {unit}" if number < 1000 * 2**power else f"{number / 2**power:.0f} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """Seconds for a person."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def exchanged(found: Mapping[str, Mapping[str, int]]) -> str:
    """Collectives by kind."""
    return ", ".join(f"{v['count']} {kind} ({size(v['bytes'])})" for kind, v in found.items()) or "none"


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def table(metrics: Row) -> str:
    """The plan in Markdown; all numbers are those of one chip."""
    m, chip = metrics, metrics["chip"]
    optimiser = m["optimizer_bytes"] + m["value_optimizer_bytes"]
    facts = [
        ["parameters (policy, reference, value)", " + ".join(size(m[f"{n}_bytes"]) for n in ("parameter", "reference", "value_parameter"))],
        ["optimiser state", size(optimiser)],
        ["peak memory", f"{size(m['peak_bytes'])} of {size(m['hbm_bytes'])} (`{m['peak_program']}`)"],
        ["products per iteration", f"{m['flops'] / 1e9:.4g} GFLOP"],
        ["HBM traffic per iteration", size(m["hbm_traffic_bytes"])],
        ["collectives per iteration", exchanged(m["collectives"])],
        ["iteration at best", f"{duration(m['seconds'])}: products {duration(m['product_seconds'])}, HBM {duration(m['hbm_seconds'])}, "
         f"collectives {duration(m['collective_seconds'])}"],
        ["largest batch that fits", f"{'at least ' * m['is_lower_bound']}{m['largest_batch']} ({_tried(m['tried'])})"],
    ]  # fmt: skip
    if m["unknown_loops"]:
        facts.append(["loops of unknown length", f"{m['unknown_loops']}: counted as one round each"])
    if not m["tried"]:
        facts = [fact for fact in facts if fact[0] != "largest batch that fits"]
    programs = [
        [f"`{name}`", str(v["calls"]), size(v["peak_bytes"]), size(v["temporary_bytes"]), f"{v['flops'] / 1e9:.4g}",
         size(v["hbm_traffic_bytes"]), exchanged(v["collectives_by_kind"]), duration(v["seconds"])]
        for name, v in m["programs"].items()
    ]  # fmt: skip
    weak = [
        [v["slice"], str(v["batch"]), size(v["peak_bytes"]), f"{v['flops'] / 1e9:.4g}", exchanged(v["collectives"]),
         duration(v["seconds"]), f"{v['efficiency']:.2f}"]
        for v in m["weak_scaling"]
    ]  # fmt: skip
    assumptions = (
        f"Roofline of {chip['name']}: {chip['flops'] / 1e12:g} TFLOP/s in bfloat16, HBM {chip['hbm_bandwidth'] / 1e9:g} GB/s, each link "
        f"{chip['link_bandwidth'] / 1e9:.3g} GB/s one way, {duration(chip['hop_seconds'])} per hop; products and HBM at the same time, "
        "collectives after them. Rewards, the order of transitions and the start of programs are not counted.\n"
    )
    text = f"## {m['topology']}, global batch {m['batch']}: one of {m['chips']} chips\n\n" + _markdown(["per chip", ""], facts)
    heads = ["program", "runs", "peak memory", "temporaries", "GFLOP", "HBM traffic", "collectives", "at best"]
    text += f"\nOne run of each program:\n\n{_markdown(heads, programs)}\n{assumptions}"
    if weak:
        heads = ["slice", "batch", "peak memory", "GFLOP", "collectives per iteration", "iteration at best", "efficiency"]
        text += f"\n## The same batch per chip\n\n{_markdown(heads, weak)}"
    return text


def _tried(tried: Sequence[Row]) -> str:
    return ", ".join(f"{v['batch']}: {size(v['peak_bytes'])}" for v in sorted(tried, key=lambda v: v["batch"]))


def write_figure(path: Path, metrics: Row) -> None:
    """Least times and peak memory against the number of chips, at the same batch per chip; nothing without such slices."""
    rows = metrics["weak_scaling"]
    if not rows:
        return
    chips, at = [str(row["chips"]) for row in rows], np.arange(len(rows))

    def times(axes: Axes) -> None:
        for label, name, colour, mark in (
            ("iteration at best", "seconds", OPTIMUM, "o-"),
            ("HBM traffic", "hbm_seconds", BEFORE, "s--"),
            ("collectives", "collective_seconds", HELD_OUT, "^:"),
            ("matrix products", "product_seconds", AFTER, "D-."),
        ):
            axes.plot(at, [1e3 * row[name] for row in rows], mark, color=colour, label=label)
        _finish(axes, chips, "ms per iteration")

    def memory(axes: Axes) -> None:
        axes.plot(at, [row["peak_bytes"] / 2**30 for row in rows], "o-", color=AFTER, label="peak of a chip")
        axes.axhline(rows[0]["hbm_bytes"] / 2**30, color=OPTIMUM, linestyle=(0, (5, 2)), label="what programs can have")
        _finish(axes, chips, "GiB")

    each = f"{metrics['chip']['name']}, {rows[0]['batch'] / rows[0]['chips']:g} paths per chip"
    panels = [
        Panel(f"Time at best: {each}", "Least times by what takes them, and of an iteration, against chips", times),
        Panel("Memory of a chip", "Peak memory against chips, and what a chip has", memory),
    ]
    write_atomic(path, png(figure(panels, 5.4, 3.9)))


def _finish(axes: Axes, chips: Sequence[str], unit: str) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.4)  # room for the legend
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylabel(unit, fontsize=FONT)
    axes.set_xticks(np.arange(len(chips)), chips)
    axes.set_xlabel("chips", fontsize=FONT)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", ncols=2, frameon=False, fontsize=FONT - 1)
