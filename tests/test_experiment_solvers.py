"""The experiments on solvers, through their command lines at tiny sizes."""

import json

import jax
import numpy as np
import pytest

from experiments.solver_cost import cost as solver_cost
from experiments.solver_cost.__main__ import main as main_of_cost
from experiments.solver_registry import ADAPTIVE, CASES, DIFFRAX_ODE, DIFFRAX_SDE, IMPLICIT, KINDS, OWN_SDE, SDE
from experiments.solvers import experiment as solvers
from experiments.solvers.__main__ import main

KEYS = {"name", "kind", "declared_order", "measured_order", "ratio_to_scan"}


@pytest.mark.slow
def test_one_solver_of_every_kind_and_a_finished_run(tmp_path, capsys):
    out = tmp_path / "solvers"
    args = ["--out", str(out), "--only", "ExponentialHeun", "Kvaerno3", "--samples", "2", "--repeats", "1"]
    args += ["--evaluations", "48", "96", "192", "--ratio-evaluations", "4", "--ratio-batch", "4"]
    assert main(args) == 0
    rows = json.loads((out / "metrics.json").read_text())["solvers"]
    assert {row["kind"] for row in rows} == set(KINDS) and all(KEYS <= set(row) for row in rows)
    for row in rows:
        assert (
            row["ratio_to_scan"] > 0 and np.all(np.isfinite(row["errors"])) and row["evaluations"] == sorted(row["evaluations"])
        )
        if row["kind"] != ADAPTIVE:  # tolerances are no steps
            tolerance = 0.5 if row["kind"] == IMPLICIT else 0.2  # the number of Newton iterations varies with the step
            assert row["measured_order"] == pytest.approx(row["declared_order"], abs=tolerance)
    assert (out / "solvers.png").read_bytes().startswith(b"\x89PNG")
    assert all(f"`{row['name']}`" in (out / "table.md").read_text() for row in rows)
    before = (out / "metrics.json").stat().st_mtime_ns
    assert main(args) == 0
    assert "finished" in capsys.readouterr().out and (out / "metrics.json").stat().st_mtime_ns == before
    assert main([*args, "--repeats", "2"]) == 1
    assert "other settings" in capsys.readouterr().err


def test_errors_are_printed(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "a"), "--only", "Nobody"]) == 1
    assert "error: only=Nobody names no solver. There are: ExponentialEuler" in capsys.readouterr().err
    assert main_of_cost(["--repeats", "0"]) == 1
    assert "error: repeats=0" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_the_measured_order_leaves_rounding_out():
    counts = [10, 20, 40, 80, 160]
    assert solvers.measured_order(counts, [n**-2.0 for n in counts]) == pytest.approx(2)
    assert solvers.measured_order(counts, [1e-3, 1e-6, 1e-9, 1e-13, 2e-13]) == pytest.approx(np.log2(1e3), abs=1e-6)
    assert solvers.measured_order(counts, [1e-13] * 5) is None


@pytest.mark.slow
@pytest.mark.parametrize("case", [OWN_SDE[0], OWN_SDE[-3], *DIFFRAX_SDE[2:], *DIFFRAX_ODE], ids=lambda case: case.name)
def test_the_scan_makes_as_many_network_calls(case):
    assert solver_cost.count(case, solver_cost.trivial_problem(2), 2) == 2 * case.stages + case.extra


def test_the_scan_does_the_arithmetic_of_ancestral_sampling():
    """With one stage and one draw it makes the very samples of `ExponentialEuler`."""
    problem = solver_cost.trivial_problem(4)
    args = problem.params, *solver_cost.starts(jax.random.key(0), problem)
    scan = solver_cost.hand_written(problem, 6, stages=1, draws=1)(*args)
    ours = solver_cost.solve(OWN_SDE[0], problem, 6)(*args)
    np.testing.assert_allclose(scan, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_table_of_costs(tmp_path, capsys):
    args = ["--out", str(tmp_path / "cost"), "--only", "DPMSolverPP2M", "--evaluations", "4", "--batch", "4", "--no-memory"]
    args += ["--trivial-batch", "4", "--width", "8", "--depth", "1", "--repeats", "1"]
    assert main_of_cost(args) == 0
    rows = json.loads((tmp_path / "cost" / "metrics.json").read_text())["solvers"]
    assert [row["kind"] for row in rows] == [SDE, "ODE"]
    assert rows[0]["forward"] > 0 and rows[0]["trivial"] > 0 and rows[0]["gradient"] > 0
    assert "| `DPMSolverPP2M` | SDE |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_memory_of_gradients_holds_a_state_per_step():
    """The compiler's figures, of a state large enough to show: at least one saved state per step on either side."""
    problem = solver_cost.trivial_problem(1000)
    few, many = (solver_cost.gradient_memory(OWN_SDE[0], problem, n) for n in (4, 36))
    for less, more in zip(few, many):
        assert 32 * 8000 <= more - less < 4 * 32 * 8000


def test_cases_are_named_once():
    names = [(case.kind, case.name) for case in CASES]
    assert len(set(names)) == len(names)
