"""From cells to a statement: means over seeds, gains over the reference, and how much of the gain another discretisation keeps."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ..figures import minus

METHODS = ("reference", "score_as_action", "ddpo", "ddpo_kl")
NAMES = {"reference": "reference", "score_as_action": "Score as Action", "ddpo": "DDPO", "ddpo_kl": "DDPO with KL penalty"}
PENALISED = ("reference", "score_as_action", "ddpo_kl")  # methods whose objective has a maximiser, and therefore a gap
AVERAGED = ("reward", "gain", "path_kl", "objective", "relative_gap", "energy_distance", "diversity")

Row = Mapping[str, Any]


def over_seeds(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard error over seeds; `None` where a value is missing, no error for one seed."""
    found = list(values)
    if not found or any(v is None for v in found):
        return None, None
    array = np.asarray(found, np.float64)
    return float(array.mean()), float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else None


def summarise(cells: Sequence[Row], solver: str, steps: int, eta: float) -> dict[str, Any]:
    """`summary`: a row per (method, solver, steps, eta), means and standard errors over seeds. `retention`: see `_retention`."""
    seeds = sorted({row["seed"] for row in cells})
    at = {(row["seed"], row["method"], row["solver"], row["steps"], row["eta"]): row for row in cells}
    rows = []
    for place in dict.fromkeys((row["method"], row["solver"], row["steps"], row["eta"]) for row in cells):
        found = [dict(at[(seed, *place)]) for seed in seeds]
        for seed, row in zip(seeds, found):
            row["gain"] = row["reward"] - at[(seed, "reference", *place[1:])]["reward"]
        entry: dict[str, Any] = dict(zip(("method", "solver", "steps", "eta"), place))
        for name in AVERAGED:
            entry[name], entry[f"{name}_se"] = over_seeds(row[name] for row in found)
        rows.append(entry)
    return {"seeds": len(seeds), "summary": rows, "retention": _retention(at, seeds, solver, steps, eta)}


def _retention(at: Mapping[tuple, Row], seeds: Sequence[int], solver: str, steps: int, eta: float) -> dict[str, Any]:
    """Gain over the reference in other cells, as a fraction of the gain in the cell of training; ratio per seed, mean over seeds.

    Per method: `by_steps` at the solver and eta of training, `other_steps` their mean over the other step counts, and
    `matrix` by eta: the mean over all solvers and step counts.
    """
    solvers, counts, etas = (sorted({place[i] for place in at}) for i in (2, 3, 4))

    def gain(seed: int, method: str, *place: Any) -> float:
        return at[(seed, method, *place)]["reward"] - at[(seed, "reference", *place)]["reward"]

    result: dict[str, Any] = {}
    for method in METHODS[1:]:
        trained = {seed: gain(seed, method, solver, steps, eta) for seed in seeds}
        kept = {n: [gain(s, method, solver, n, eta) / trained[s] for s in seeds] for n in counts}
        others = np.mean([kept[n] for n in counts if n != steps], axis=0)
        result[method] = {
            "gain_trained": _estimate(trained.values()),
            "by_steps": {str(n): _estimate(kept[n]) for n in counts},
            "other_steps": _estimate(others.tolist()),
            "matrix": {
                f"{e:g}": _estimate(float(np.mean([gain(s, method, v, n, e) for v in solvers for n in counts])) / trained[s] for s in seeds)
                for e in etas
            },
        }  # fmt: skip
        result[method]["per_seed"] = others.tolist()
    first = np.asarray(result["score_as_action"]["per_seed"])
    for method in METHODS[2:]:
        result[method]["less_than_score_as_action"] = _difference(first - np.asarray(result[method]["per_seed"]))
    return result


def _estimate(values: Iterable[float]) -> dict[str, float | None]:
    mean, se = over_seeds(values)
    return {"mean": mean, "se": se}


def _difference(values: np.ndarray) -> dict[str, float | None]:
    """Paired difference over seeds with its 95 % interval (Student's t)."""
    mean, se = over_seeds(values.tolist())
    half = None if se is None else float(stats.t.ppf(0.975, len(values) - 1)) * se
    low, high = (None, None) if mean is None or half is None else (mean - half, mean + half)
    return {"mean": mean, "se": se, "low": low, "high": high}


def plus_minus(estimate: Mapping[str, Any], digits: int = 2) -> str:
    """`mean ± se`, without an error where there is one seed."""
    mean, se = estimate["mean"], estimate.get("se")
    if mean is None:
        return "n/a"
    text = minus(f"{mean:.{digits}f}")
    return text if se is None else f"{text} ± {se:.{digits}f}"


def table(found: Mapping[str, Any], solver: str, steps: int, eta: float) -> str:
    """Two tables in Markdown: the methods in the cell of training, and how much of the gain they keep elsewhere."""
    names = ("reward", "path_kl", "relative_gap", "energy_distance", "diversity")
    lines = [
        _line("method", "reward (nats)", "path KL (nats)", "relative gap", "energy distance", "diversity (images)"),
        _line(*["---"] * 6),
    ]
    for row in found["summary"]:
        if (row["solver"], row["steps"], row["eta"]) == (solver, steps, eta):
            entries = (plus_minus({"mean": row[name], "se": row[f"{name}_se"]}) for name in names)
            lines.append(_line(NAMES[row["method"]], *entries))
    retention = found["retention"]
    counts = sorted(int(n) for n in retention["ddpo"]["by_steps"])
    etas = list(retention["ddpo"]["matrix"])
    titles = ["method", f"gain at {steps} steps"]
    titles += [f"kept at {n} steps" for n in counts if n != steps] + [f"kept in all cells, η = {e}" for e in etas]
    lines += ["", _line(*titles), _line(*["---"] * len(titles))]
    for method, row in retention.items():
        entries = [NAMES[method], plus_minus(row["gain_trained"])]
        entries += [plus_minus(row["by_steps"][str(n)]) for n in counts if n != steps]
        entries += [plus_minus(row["matrix"][e]) for e in etas]
        lines.append(_line(*entries))
    return "\n".join(lines) + "\n"


def _line(*entries: str) -> str:
    return f"| {' | '.join(entries)} |"


def verdict(found: Mapping[str, Any], solver: str, steps: int, eta: float) -> str:
    """The statement, in words that follow from the numbers."""
    retention, seeds = found["retention"], found["seeds"]
    ends = [r for r in found["summary"] if (r["solver"], r["steps"], r["eta"]) == (solver, steps, eta)]
    entries = [
        [NAMES[r["method"]], *(plus_minus({"mean": r[v], "se": r.get(f"{v}_se")}) for v in ("reward", "path_kl"))] for r in ends
    ]
    kept = ", ".join(f"{NAMES[m]} {plus_minus(row['other_steps'])}" for m, row in retention.items())
    sentences = [
        "Rewards in the cell of training: " + ", ".join(f"{name} {r} at {kl} nats of path KL" for name, r, kl in entries) + ".",
        f"Trained with {steps} steps of {solver} at eta = {eta:g}, policies keep at the other step counts, on average, this "
        f"fraction of their gain over the reference: {kept} (mean ± standard error over {seeds} seed{'s' if seeds > 1 else ''}).",
    ]
    for method in METHODS[1:]:
        others = {n: e["mean"] for n, e in retention[method]["by_steps"].items() if int(n) != steps}
        worst = min(others, key=lambda n: others[n])
        words = "loses more than half of its gain" if others[worst] < 0.5 else "keeps at least half of its gain everywhere"
        sentences.append(minus(f"{NAMES[method]} {words} (least: {others[worst]:.2f}, at {worst} steps)."))
    for method in METHODS[2:]:
        d = retention[method]["less_than_score_as_action"]
        if d["low"] is None:
            words = "with one seed no statement about the difference is possible"
        elif d["low"] > 0:
            words = "Score as Action keeps more"
        elif d["high"] < 0:
            words = f"{NAMES[method]} keeps more"
        else:
            words = "no difference is resolved"
        interval = "" if d["low"] is None else f", 95 % interval {d['low']:.2f} to {d['high']:.2f}"
        sentences.append(minus(f"Score as Action less {NAMES[method]}: {plus_minus(d)}{interval}; {words}."))
    return " ".join(sentences)
