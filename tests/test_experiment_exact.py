"""The leaderboard: what it runs, what it writes, that it resumes, and the fixed point of mean values."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ctrl_diffusion as cd
from ctrl_diffusion.solvers import power
from experiments.algorithm_registry import ALGORITHMS, AlgorithmSettings, choose
from experiments.exact import experiment as leaderboard
from experiments.exact.__main__ import main
from experiments.exact.report import overview
from experiments.exact.setup import DIFFUSION, PROBLEMS, setup
from experiments.exact.units import (
    ENTRIES,
    FIXED_POINTS,
    FOR_THIS_PROBLEM,
    budget_for,
    mean_value_action,
    sqdf_discount_per_time,
    structured_value,
    why_not,
)

KEYS = """algorithm problem seed relative_gap optimality_gap_se control_l2_error zero_control_l2_error reward path_kl
network_evaluations reward_evaluations wall_seconds""".split()


def test_the_default_covers_every_algorithm_on_the_ring_and_two_elsewhere():
    chosen = leaderboard.units(leaderboard.Config())
    by_problem = {problem: {u.algorithm for u in chosen if u.problem == problem} for problem in PROBLEMS}
    assert by_problem["ring_linear"] == set(ENTRIES)
    assert all(len(found) >= 2 for found in by_problem.values())
    full = leaderboard.units(leaderboard.Config(full=True))
    assert len(full) == 3 * sum(why_not(a, p) is None for a in ENTRIES for p in PROBLEMS)
    quick = leaderboard.units(leaderboard.Config(quick=True))
    assert len(quick) == 4 and all(u.budget.iterations < budget_for(u.algorithm, u.problem).iterations for u in quick)
    assert {(u.algorithm, u.problem): u.budget for u in full if u[:2] in FOR_THIS_PROBLEM} == FOR_THIS_PROBLEM


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
def test_policies_start_at_the_reference_and_see_what_is_said(problem):
    """One network of all coordinates, but for the double well: there coordinate i moves with coordinate i alone."""
    place = setup(problem)
    start, _ = place.start(0)
    control, reference = place.sampler.control, place.problem.reference_action
    process = place.problem.process
    t = jnp.asarray(0.3 * process.t0 + 0.7 * process.t1)
    x = jax.random.normal(jax.random.key(1), (3, *place.problem.shape))
    np.testing.assert_array_equal(control(start, t, x), reference(None, t, x))
    other = jax.tree.map(lambda v: v + 0.3 * jax.random.normal(jax.random.key(2), v.shape), start)
    learned = jax.jacfwd(lambda x: control(other, t, x[None])[0] - reference(None, t, x[None])[0])(x[0])
    alone = np.eye(len(learned), dtype=bool)
    np.testing.assert_array_equal(learned != 0, alone if problem == "double_well" else np.ones_like(alone))


def test_the_overview_has_means_over_seeds_and_gaps_where_there_are_none():
    def row(algorithm, problem, gap):
        return {"algorithm": algorithm, "problem": problem, "relative_gap": gap}

    rows = [row("dpok", "ring_linear", 0.03), row("dpok", "ring_linear", 0.05), row("ddpo", "ring_linear", None)]
    rows += [row("dpok", "double_well", 0.1)]
    assert overview(rows).splitlines()[0] == "| algorithm | ring_linear | double_well |"
    assert overview(rows).splitlines()[2:] == ["| ddpo | - |  |", "| dpok | 4.00 ± 1.00 | 10.00 |"]


def test_what_does_not_apply_has_a_reason():
    assert all(why_not(a, p) is None for a in ENTRIES for p in DIFFUSION)
    assert "posterior mean" in str(why_not("sqdf", "double_well"))
    with pytest.raises(ValueError, match="none of these algorithms applies"):
        leaderboard.units(leaderboard.Config(algorithms=("sqdf",), problems=("linear_ou",)))
    with pytest.raises(ValueError, match="quick=True and full=True"):
        leaderboard.units(leaderboard.Config(quick=True, full=True))
    with pytest.raises(ValueError, match="algorithms: 'ppo' is not one of"):
        leaderboard.units(leaderboard.Config(algorithms=("ppo",)))
    with pytest.raises(ValueError, match="algorithm='vrad' is not one of score_as_action"):
        choose("vrad")


@pytest.mark.slow
def test_the_command_writes_metrics_and_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("experiments.exact.units.PATHS", 128)
    args = ["--out", str(tmp_path / "run"), "--problems", "linear_ou", "--iterations", "2", "--workers", "1"]
    args += ["--algorithms", "adjoint_matching_bootstrapped", "log_variance"]
    assert main(args) == 0
    results = json.loads((tmp_path / "run" / "metrics.json").read_text())["results"]
    assert {r["algorithm"] for r in results} == {"log_variance", "adjoint_matching_bootstrapped"} and len(results) == 2
    for result in results:
        assert set(KEYS) <= set(result)
        assert result["zero_control_l2_error"] == pytest.approx(4.3233, rel=1e-3)  # u* does not depend on the state
        assert 0 < result["relative_gap"] < 1.05
    first = {r["algorithm"]: r for r in results}["adjoint_matching_bootstrapped"]
    assert first["network_evaluations"] == 2 * 3 * 256 * 50
    assert first["network_gradient_evaluations"] == 2 * 256 * (50 + 50)  # the adjoint, and the regression
    for name in ("table.md", "gaps.png"):
        assert (tmp_path / "run" / name).stat().st_size > 200
    # a unit that is there is not run again; one that is missing is
    (tmp_path / "run" / "metrics.json").unlink()
    (tmp_path / "run" / "units" / "log_variance-linear_ou-0.json").unlink()
    kept = tmp_path / "run" / "units" / "adjoint_matching_bootstrapped-linear_ou-0.json"
    before = kept.stat().st_mtime_ns
    assert main(args) == 0
    assert kept.stat().st_mtime_ns == before
    again = json.loads((tmp_path / "run" / "metrics.json").read_text())["results"]
    for a, b in zip(results, again):
        assert {k: v for k, v in a.items() if k != "wall_seconds"} == {k: v for k, v in b.items() if k != "wall_seconds"}
    capsys.readouterr()
    assert main(args) == 0
    assert "finished" in capsys.readouterr().out
    assert main([*args, "--seeds", "2"]) == 1
    assert "other settings" in capsys.readouterr().err


@pytest.mark.slow
def test_the_fixed_point_of_mean_values_is_half_of_the_optimum_at_half_the_temperature():
    """Under `a = a_ref + (a*_{lambda/2} - a_ref)/2` the mean reward from x is `V*_{lambda/2}(t, x)`, so `a` is greedy for it."""
    place = setup("ring_linear")
    problem = place.problem
    action = mean_value_action(place)
    half = type(problem)(problem.process, problem.data, problem.reward, problem.kl_weight / 2)
    sampler = cd.Sampler(problem.process, action, (2,), grid=problem.grid(400))
    path = jax.jit(lambda keys: sampler.trajectory(None, keys))(cd.sample_keys(jax.random.key(0), 4096))
    for j in (0, 200, 320):
        t = path.t[j]
        error = np.asarray(problem.reward(path.x[-1]) - half.value(t, path.x[j]))
        se = error.std() / np.sqrt(len(error))
        assert abs(error.mean()) < 4 * se + 0.03  # 400 steps: the chain's own discretisation, about one percent of the value
        # the conditional mean, not only the mean: uncorrelated with the state
        for i in range(2):
            x = np.asarray(path.x[j][:, i])
            product = error * (x - x.mean())
            assert abs(product.mean()) < 4 * product.std() / np.sqrt(len(error)) + 0.03 * x.std()
    x, t = path.x[200], path.t[200]
    greedy = problem.reference_action(None, t, x) + half.value_gradient(t, x) / problem.kl_weight
    np.testing.assert_allclose(action(None, t, x), greedy, atol=1e-4 * float(jnp.max(jnp.abs(greedy))))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sqdf", "sqdf_per_time"])
def test_the_fixed_point_of_the_discounted_x0_reward_is_stationary(name):
    """On the ring's chain, the gradient of SQDF's loss in a scale of the pull vanishes there, but for one step's change."""
    place = setup("ring_linear")
    problem, pulled = place.problem, FIXED_POINTS[name](place)

    def control(params, t, x, cond=None):
        a, a_ref = pulled(None, t, x), problem.reference_action(None, t, x)
        return a_ref + params[0] * (a - a_ref)

    sampler = cd.Sampler(place.sampler.process, control, (2,), grid=place.sampler.grid)
    objective = cd.Objective(sampler, cd.differentiable(problem.reward), problem.kl_weight)
    settings = AlgorithmSettings(objective, structured_value(place), cd.Training(optax.sgd(1.0), 2048))
    algorithm = ENTRIES[name].make(settings)
    moved = []
    for scale in (1.0, 0.0):
        state = algorithm.init(jnp.asarray([scale]))._replace(reference=jnp.zeros(1))
        moved.append(float(algorithm.step(jax.random.key(0), state)[0].params[0]) - scale)
    assert moved[1] > 0
    assert abs(moved[0]) < 0.05 * moved[1]


def test_plain_names_are_the_published_methods():
    """Variants have names of their own; SQDF's discount per unit of time is the published one on the paper's 50 equal steps."""
    assert all(ENTRIES[name] is choice for name, choice in ALGORITHMS.items())
    place = setup("ring_linear")
    process = place.problem.process
    paper = cd.Sampler(process, place.sampler.control, (2,), grid=process.grid(50))
    for sampler, same in ((paper, True), (place.sampler, False)):
        objective = cd.Objective(sampler, cd.differentiable(place.problem.reward), 1.0)
        per_step = cd.estimators.discount_per_step(0.9)(objective)
        assert np.allclose(sqdf_discount_per_time(objective), per_step, rtol=1e-5) is same


@pytest.mark.slow
def test_what_the_grid_bounds():
    """The policy that ascends V* on the chain, `a = a_ref + std^2/(lambda psi) E grad V*(t', x')`, against a*: docs/exact.md."""

    def gap(problem, sampler):
        path = jax.jit(lambda keys: sampler.trajectory(None, keys))(cd.sample_keys(jax.random.key(0), 512))
        step = sampler.transitions()

        @jax.jit
        def rates(row):
            t, t_next, x, phi, psi, std, key = row
            a_ref, a_star = problem.reference_action(None, t, x), problem.optimal_action(None, t, x)
            noise = jax.random.normal(key, (32, *x.shape))

            def ascend(a, _):
                ends = (phi * x + psi * a + std * noise).reshape(-1, 2)
                gradient = jnp.mean(problem.value_gradient(t_next, ends).reshape(noise.shape), axis=0)
                return a_ref + std**2 / (problem.kl_weight * psi) * gradient, None

            a = jax.lax.scan(ascend, a_ref, length=4)[0]  # a contraction: 0.2 per step at the most
            rate = problem.process.kl_rate
            return (t_next - t) * jnp.mean(rate(t, a, a_star)), (t_next - t) * jnp.mean(rate(t, a_ref, a_star))

        keys = jax.random.split(jax.random.key(1), len(path.t) - 1)
        rows = (path.t[:-1], path.t[1:], path.x[:-1], *step, keys)
        own, reference = jax.lax.map(rates, rows)
        return float(jnp.sum(own) / jnp.sum(reference))

    place = setup("ring_linear")
    problem, process = place.problem, place.problem.process
    optimal = cd.Sampler(place.sampler.process, problem.optimal_action, (2,), grid=place.sampler.grid)
    assert abs(gap(problem, optimal) - 0.0044) < 0.001
    for steps, expected in ((50, 0.029), (100, 0.0085)):
        grid = power(process.t0, process.t1, steps, 2.0)
        assert abs(gap(problem, cd.Sampler(process, problem.optimal_action, (2,), grid=grid)) - expected) < 0.15 * expected


WORKERS = """
import concurrent.futures, multiprocessing, os, time
from experiments.exact.experiment import _start_worker

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=_start_worker, initargs=(set(),))
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {7, 1, 3, 5, 9}, raising=False)
    assert leaderboard.shares(2) == [{1, 5, 9}, {3, 7}]
    assert leaderboard.shares(6) == [{1, 3, 5, 7, 9}] * 6
    kept: list[set[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: kept.append(cores), raising=False)
    parent = SimpleNamespace(join=threading.Event().wait)  # lives for ever
    monkeypatch.setattr(leaderboard.multiprocessing, "parent_process", lambda: parent)
    for cores in ({3, 7}, set()):
        leaderboard._start_worker(cores)
    assert kept == [{3, 7}]


@pytest.mark.slow
def test_a_killed_run_leaves_no_worker(tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    root = str(Path(leaderboard.__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)  # it is there
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent by ten seconds")
