"""Compiles the programs of an iteration for a slice, and adds up what they take: rows of the plan, the largest batch, weak scaling."""

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

import ctrl_diffusion as cd
from ctrl_diffusion.algorithms import lower
from ctrl_diffusion.algorithms.programs import state_axes
from ctrl_diffusion.parallel import PARAMETERS, Layout, make_mesh
from ctrl_diffusion.runs.files import write_atomic

from ..commandline import require_at_least, require_known
from .cases import EXPERIMENTS, PlannedExperiment
from .chips import COMPILERS, HOP_SECONDS, Slice, describe, parse_slice, roofline, usual_slices
from .config import Config as Config
from .hlo import account, by_kind
from .report import table, write_figure

PER_PART = ("sample", "annotate")


Row = dict[str, Any]


LEVELS = {"jax_optimization_level": "O1", "jax_memory_fitting_level": "O0"}
"""Options of JAX that are a low effort."""


@contextlib.contextmanager
def compiling_with(effort: str) -> Iterator[None]:
    """Set JAX's optimisation levels for this effort, and restore them afterwards."""
    before = {name: getattr(jax.config, name) for name in LEVELS}
    try:
        for name, level in LEVELS.items() if effort == "low" else ():
            jax.config.update(name, level)
        yield
    finally:
        for name, level in before.items():
            jax.config.update(name, level)


def compile_all(case: PlannedExperiment, where: Slice, fsdp: int, batch: int) -> Row:
    """The programs of an iteration with a global `batch` on a slice: one row of the plan."""
    layout = Layout(make_mesh(fsdp, describe(where)))
    algorithm = case.algorithm(layout, batch)
    row: Row = {"slice": where.name, "chips": where.chips, "batch": batch, "hbm_bytes": where.chip.usable}
    held = _state_bytes(algorithm, layout, case)
    begin = time.perf_counter()
    lowered = lower(algorithm, case.params, case.value_params)
    row |= held | {"lower_seconds": time.perf_counter() - begin}
    programs: dict[str, Row] = {}
    for name, program in lowered.items():
        begin = time.perf_counter()
        try:
            compiled = program.compile(COMPILERS[where.chip.platform].options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return row | {"peak_bytes": None, "refused": f"{name}: {str(error).splitlines()[0]}"}
        seconds = time.perf_counter() - begin
        if seconds > 20:
            print(f"  {name}: {seconds:.0f} s")
        programs[name] = {"calls": program.calls, "compile_seconds": seconds} | _one_run(compiled, where)
    _add_peaks(programs, sum(held.values()))
    return row | {"programs": programs} | _iteration(programs)


def _state_bytes(algorithm: cd.algorithms.Algorithm, layout: Layout, case: PlannedExperiment) -> dict[str, int]:
    """What a chip has of the state that lasts from iteration to iteration, bytes."""
    state = jax.eval_shape(algorithm.init, case.params, case.value_params)

    def on_a_chip(tree: Any, axes: Any) -> int:
        placed = jax.tree.leaves(layout.described(axes, tree))
        return sum(math.prod(v.sharding.shard_shape(v.shape)) * v.dtype.itemsize for v in placed)

    sizes = {
        f"{name.replace('params', 'parameter')}_bytes": on_a_chip(v, PARAMETERS) for name, v in state.learned._asdict().items()
    }
    sizes |= {"reference_bytes": on_a_chip(state.reference, PARAMETERS), "fixed_bytes": on_a_chip(algorithm.fixed, PARAMETERS)}
    return sizes | {"replay_buffer_bytes": on_a_chip(state.buffer, state_axes(algorithm.recipe).buffer)}


def _one_run(compiled: jax.stages.Compiled, where: Slice) -> Row:
    """Memory, work and least times of one run of a program on a chip."""
    memory, found = compiled.memory_analysis(), account(compiled.as_text() or "", where.chips)
    assert memory is not None
    seconds = roofline(found, where)
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "compiler_peak_bytes": memory.peak_memory_in_bytes,
        "flops": found.flops,
        "bf16_flops": found.bf16_flops,
        "hbm_traffic_bytes": found.hbm_bytes,
        "collectives": [c._asdict() for c in found.collectives],
        "collectives_by_kind": by_kind(found.collectives),
        "unknown_loops": found.unknown_loops,
        "product_seconds": seconds.products,
        "hbm_seconds": seconds.hbm,
        "collective_seconds": seconds.collectives,
        "seconds": seconds.total,
    }


def _add_peaks(programs: dict[str, Row], held: int) -> None:
    """The memory of a chip while each program runs: its own, what earlier ones left, and the code of all. `held` is the state's."""
    code = sum(row["code_bytes"] for row in programs.values())
    for name, row in programs.items():
        kept = row["calls"] if name in PER_PART else 1  # all parts are, and the last minibatch
        before = row["output_bytes"] * min(row["calls"] - 1, kept)
        outside = max(held - row["argument_bytes"], 0)
        row["outside_bytes"] = outside + before
        row["peak_bytes"] = code + outside + before + row["argument_bytes"] + row["output_bytes"] + row["temporary_bytes"]
        held += kept * row["output_bytes"]


def _iteration(programs: dict[str, Row]) -> Row:
    """Sums over an iteration."""
    rows = list(programs.values())

    def total(name: str) -> Any:
        return sum(row["calls"] * row[name] for row in rows)

    kinds = sorted({kind for row in rows for kind in row["collectives_by_kind"]})
    names = ("flops", "bf16_flops", "hbm_traffic_bytes", "product_seconds", "hbm_seconds", "collective_seconds", "seconds")
    return {
        "peak_bytes": max(row["peak_bytes"] for row in rows),
        "peak_program": max(programs, key=lambda name: programs[name]["peak_bytes"]),
        "collectives": {
            kind: {
                unit: sum(row["calls"] * row["collectives_by_kind"].get(kind, {unit: 0})[unit] for row in rows)
                for unit in ("count", "bytes")
            }
            for kind in kinds
        },
        "unknown_loops": total("unknown_loops"),
        "compile_seconds": sum(row["compile_seconds"] for row in rows),
    } | {name: total(name) for name in names}


def largest_batch(cell: Callable[[int], Row], batch: int, limit: int, compiles: int) -> Row:
    """The largest batch `batch * 2^k` up to `limit` that fits, by compiling at most `compiles` of them.

    The first two tell how memory grows; the next ones are where a line through the last two meets what the chip has.
    """
    tried: dict[int, int | None] = {}
    top = max(int(math.log2(limit / batch)), 0)
    best, refused, k = -1, top + 1, 0
    while len(tried) < compiles and best + 1 < refused:
        row = cell(batch * 2**k)
        tried[batch * 2**k] = row["peak_bytes"]
        fits = row["peak_bytes"] is not None and row["peak_bytes"] <= row["hbm_bytes"]
        best, refused = (max(best, k), refused) if fits else (best, min(refused, k))
        known = [(size, peak) for size, peak in sorted(tried.items()) if peak is not None][-2:]
        if k == 0:
            k = min(3, top)
        elif len(known) == 2 and (slope := (known[1][1] - known[0][1]) / (known[1][0] - known[0][0])) > 0:
            k = int(math.log2(max(known[1][0] + (row["hbm_bytes"] - known[1][1]) / slope, batch) / batch))
        k = min(max(k, best + 1), refused - 1)
    return {
        "largest_batch": batch * 2**best if best >= 0 else None,
        "is_lower_bound": best + 1 < refused or refused == top + 1,
        "tried": [{"batch": size, "peak_bytes": peak} for size, peak in tried.items()],
    }


def run(config: Config) -> dict[str, Any]:
    """The plan; returns what is in `metrics.json`."""
    require_known("experiment", [config.experiment], EXPERIMENTS)
    require_at_least(1, batch=config.batch, fsdp=config.fsdp, accumulation=config.accumulation)
    require_at_least(0, compiles=config.compiles)
    where = parse_slice("topology", config.topology)
    chosen = usual_slices(where.chip) if config.slices is None else [parse_slice("slices", name) for name in config.slices]
    describe(where)
    case = EXPERIMENTS[config.experiment](config)
    batch = config.batch or case.batch
    for other in chosen:
        if batch * other.chips % where.chips:
            raise ValueError(
                f"slices={other.name!r}: batch={batch} on {where.chips} chips is no whole number on {other.chips}: choose another batch."
            )

    apart = ("out", "topology", "slices", "compiles", "batch")
    settings = {name: v for name, v in dataclasses.asdict(config).items() if name not in apart}
    rows = _earlier(config.out, settings)

    def cell(where: Slice, batch: int) -> Row:
        """Compiled now, or in an earlier run."""
        found = [row for row in rows if (row["slice"], row["batch"]) == (where.name, batch)]
        if not found:
            print(f"compiling for {where.name}, batch {batch} ...", file=sys.stderr, flush=True)
            with compiling_with(config.effort):
                found = [compile_all(case, where, config.fsdp, batch)]
            rows.extend(found)
            _save(config.out, {"settings": settings, "compiled": rows})
        return found[0]

    main_row = cell(where, batch)
    if main_row["peak_bytes"] is None:
        raise ValueError(
            f"batch={batch} does not fit {where.name}: {main_row['refused']}. Use a smaller batch or more accumulation."
        )
    limit = max(batch, 2**31 // max(case.intervals, 1) - 1)  # transitions are numbered with 32 bits
    search = largest_batch(lambda size: cell(where, size), batch, limit, config.compiles)
    weak = [cell(other, batch * other.chips // where.chips) for other in chosen]
    scaling = [row for row in weak if row["peak_bytes"] is not None]
    chip = {name: v for name, v in where.chip._asdict().items() if name != "options"} | {"hop_seconds": HOP_SECONDS}
    metrics = {"settings": settings, "topology": where.name, "chip": chip}
    metrics |= {**main_row, **search, "weak_scaling": [_scaled(row, scaling[0]) for row in scaling], "compiled": rows}
    if config.out is not None:
        _save(config.out, metrics)
        write_atomic(config.out / "table.md", table(metrics))
        write_figure(config.out / "pod_plan.png", metrics)
    return metrics


def _scaled(row: Row, first: Row) -> Row:
    """A row of weak scaling: the same batch per chip, and how near its time is to that of the first."""
    names = ("slice", "chips", "batch", "peak_bytes", "hbm_bytes", "flops", "collectives", "product_seconds", "hbm_seconds")
    names += ("collective_seconds", "seconds", "compile_seconds")
    return {name: row[name] for name in names} | {"efficiency": first["seconds"] / row["seconds"]}


def _earlier(out: Path | None, settings: dict[str, Any]) -> list[Row]:
    """The rows of an earlier run with the same settings."""
    if out is None or not (out / "metrics.json").exists():
        return []
    found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    if found["settings"] != settings:
        raise ValueError(f"out={out} holds a run with other settings {found['settings']}: choose another folder.")
    return found["compiled"]


def _save(out: Path | None, metrics: dict[str, Any]) -> None:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
