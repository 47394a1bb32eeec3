"""The discretisation experiment: the whole run on a tiny budget, what its cells mean, how it resumes, and its statistics."""

import dataclasses
import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import ctrl_diffusion as cd
from ctrl_diffusion.runs import Evaluator
from experiments.discretization import experiment as discretization
from experiments.discretization.__main__ import main
from experiments.discretization.cells import Samplers
from experiments.discretization.checks import resolve
from experiments.discretization.figures import best_rewards
from experiments.discretization.summary import METHODS, summarise, table, verdict
from experiments.distances import distances, energy_distance, make_target, noise_floor
from experiments.solver_registry import SOLVERS

TINY = discretization.Config(
    seeds=2, iterations=2, solvers=("ExponentialEuler", "DPMSolverPP2M"), steps=(3, 4), etas=(0.0, 1.0), train_steps=4,
    batch=24, epochs=1, minibatches=2, pretrain_steps=20, pretrain_batch=32, width=16, depth=1, learning_rate=1e-2,
    samples=16, reference_samples=40, optimum_samples=64, optimum_steps=6,
)  # fmt: skip
GAUSSIAN = [("ExponentialEuler", 1.0)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, discretization.run(dataclasses.replace(TINY, out=out))


# -- the run ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_metrics_hold_every_cell_and_gaps_exactly_where_they_are_defined(finished):
    out, metrics = finished
    assert json.loads((out / "metrics.json").read_text()) == metrics
    places = [(r["seed"], r["method"], r["solver"], r["steps"], r["eta"]) for r in metrics["cells"]]
    assert len(places) == len(set(places)) == 2 * len(METHODS) * 2 * 2 * 2
    for row in metrics["cells"]:
        assert {"method", "solver", "steps", "eta", "reward", "reward_se", "relative_gap"} <= set(row)
        for name in ("reward", "reward_se", "energy_distance", "energy_distance_se", "diversity"):
            assert np.isfinite(row[name]), (name, row)
        gaussian = (row["solver"], row["eta"]) in GAUSSIAN
        assert (row["path_kl"] is not None) == gaussian
        assert (row["relative_gap"] is not None) == (gaussian and row["method"] != "ddpo")
        assert row["optimum_is_bound"] is (False if gaussian else None)  # eta 1 is memoryless
        if row["relative_gap"] is not None:
            gap = row["optimum"] - (row["reward"] - TINY.kl_weight * row["path_kl"])
            assert row["optimality_gap"] == pytest.approx(gap, abs=1e-5)
    for name in ("heatmaps.png", "curves.png", "frontier.png", "table.md"):
        assert (out / name).stat().st_size > 0


@pytest.mark.slow
def test_only_the_reference_is_the_reference(finished):
    for row in finished[1]["cells"]:
        if row["path_kl"] is not None:
            assert row["path_kl"] == pytest.approx(0, abs=1e-9) if row["method"] == "reference" else row["path_kl"] > 1e-4
    for row in finished[1]["summary"]:
        if row["method"] == "reference":
            assert row["gain"] == row["gain_se"] == 0


@pytest.mark.slow
def test_the_budgets_are_equal(finished):
    budget = finished[1]["budget"]
    pairs = 2 * 24 * 4
    assert (budget["paths"], budget["policy_updates"]) == (48, 4)
    assert (budget["network_evaluations"], budget["network_gradient_evaluations"]) == (3 * pairs, pairs)
    assert budget["reward_evaluations"] == {"score_as_action": 48 + pairs, "ddpo": 48, "ddpo_kl": 48}
    assert budget["value_gradient_evaluations"] == {"score_as_action": pairs, "ddpo": 0, "ddpo_kl": 0}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["score_as_action", "ddpo", "ddpo_kl"])
def test_the_cell_of_training_is_what_the_saved_model_samples(finished, method):
    """Rewards and path KLs of `Sampler` and `Evaluator`, which know nothing of padded grids."""
    out, metrics = finished
    experiment = discretization.Experiment(resolve(dataclasses.replace(TINY, out=out)))
    model, reference = (cd.load(out / "seed-1" / name / "model") for name in (method, "reference"))
    evaluator = Evaluator(model.sampler, experiment.reward, reference.params, model.sampler.chain_scales(), 16)
    found = evaluator.samples(model.params, experiment.key(1, "evaluation"), 16)
    row = next(
        r for r in metrics["cells"]
        if (r["seed"], r["method"], r["solver"], r["steps"], r["eta"]) == (1, method, "ExponentialEuler", 4, 1.0)
    )  # fmt: skip
    assert row["reward"] == pytest.approx(found.rewards.mean(), abs=1e-4)
    assert found.path_kl is not None and row["path_kl"] == pytest.approx(found.path_kl.mean(), rel=1e-3)


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_with_the_same_cells(finished, tmp_path):
    """Without its last files, with one method trained but not saved and one group of cells missing."""
    out, metrics = finished
    run = tmp_path / "run"
    shutil.copytree(out, run)
    for name in ("metrics.json", "cells/DPMSolverPP2M-eta-1.json", "seed-1/ddpo/result.json"):
        (run / name).unlink()
    shutil.rmtree(run / "seed-1" / "ddpo" / "model")
    kept = {
        p: p.stat().st_mtime_ns for p in run.rglob("*") if p.name in ("result.json", "model.json") or p.parent.name == "cells"
    }
    again = discretization.run(dataclasses.replace(TINY, out=run))
    assert again["cells"] == metrics["cells"]
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert discretization.run(dataclasses.replace(TINY, out=run)) == again
    assert "finished" in printed.getvalue()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_can_be_done_without(finished, tmp_path):
    out, metrics = finished
    run = tmp_path / "run"
    shutil.copytree(out, run)
    (run / "metrics.json").unlink()
    (run / "seed-1" / "ddpo" / "result.json").unlink()
    checkpoints = run / "seed-1" / "ddpo" / "checkpoints" / "finetune"
    newest = max(checkpoints.iterdir(), key=lambda folder: int(folder.name))
    for file in newest.rglob("*"):
        if file.is_file() and file.stat().st_size > 200:
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"finetune/{newest.name} cannot be read .* or pass use_previous_checkpoint=True"):
        discretization.run(dataclasses.replace(TINY, out=run))
    again = discretization.run(dataclasses.replace(TINY, out=run, use_previous_checkpoint=True))
    assert again["cells"] == metrics["cells"]


BAD = {
    "solver": (dict(solvers=("ExponentialEuler", "Milstein")), "solvers: 'Milstein' is not one of ExponentialEuler"),
    "train-solver": (dict(train_solver="UniPC", solvers=("UniPC",)), "train_solver='UniPC' at train_eta=1 has no likelihood"),
    "train-steps": (dict(train_steps=5), r"train_steps=5 is not evaluated: choose it among \(3, 4\)"),
    "train-eta": (dict(train_eta=0.0), "train_solver='ExponentialEuler' at train_eta=0 has no likelihood"),
    "steps": (dict(steps=(4,)), r"steps=\(4,\) must hold another number than train_steps"),
    "price": (dict(kl_weight=0.0), "kl_weight=0.0 must be positive"),
    "samples": (dict(samples=4), "samples=4 must be at least 8"),
    "digit": (dict(digit=10), "digit=10 must be from 0 to 9"),
    "seeds": (dict(seeds=0), "seeds=0 must be at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        discretization.run(dataclasses.replace(TINY, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_the_command_line(tmp_path):
    errors, printed = io.StringIO(), io.StringIO()
    with redirect_stderr(errors):
        assert main(["--out", str(tmp_path / "run"), "--digit", "11"]) == 1
    assert errors.getvalue() == "error: digit=11 must be from 0 to 9.\n"
    with redirect_stdout(printed), pytest.raises(SystemExit):
        main(["--help"])
    for field in dataclasses.fields(discretization.Config):
        assert f"--{field.name.replace('_', '-')}" in printed.getvalue()


def test_the_default_matrix_is_large_enough_and_full_has_five_seeds():
    config = resolve(discretization.Config())
    assert (len(config.solvers), len(config.steps), len(config.etas), config.seeds) >= (8, 6, 3, 2)
    assert resolve(discretization.Config(full=True)).seeds == 5
    assert resolve(discretization.Config(full=True, seeds=7)).seeds == 7


# -- samplers on padded grids -----------------------------------------------------------------------------------------------------


def gaussian_score(params, t, x, cond):
    """Not the score of anything in particular: smooth in `t`, and linear in `x`."""
    return -params * (1 + t) * x + 0.3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "eta"),
    [
        *(("ExponentialEuler", 0.5), ("Euler", 0.5), ("DDIM", 0.5), ("UniPC", 0.5), ("DPMSolver2S", 0.5), ("Heun", 0.5)),
        *(("ExponentialEuler", 0.0), ("UniPC", 0.0)),
    ],
)
def test_samples_on_a_padded_grid_are_those_of_the_sampler(name, eta):
    choice, schedule, keys = SOLVERS[name], cd.VPLinear(tau_min=0.02), cd.sample_keys(jax.random.key(0), 5)
    samplers, params = Samplers(gaussian_score, schedule, (3,), 9), jnp.asarray(0.8)
    process = samplers.process(eta)
    draw = (samplers.draw_chain if choice.gaussian and eta > 0 else samplers.draw)(choice.solver, eta)
    for steps in (4, 9):
        grid = process.grid(steps)
        x, kl = draw(params, jnp.asarray(0.7), grid, keys)
        sampler = cd.Sampler(process, gaussian_score, (3,), grid=grid, solver=choice.solver)
        path = sampler.trajectory(params, keys)
        np.testing.assert_allclose(x, path.x[-1], rtol=2e-4, atol=2e-4)
        assert (kl is not None) == (choice.gaussian and eta > 0)
        if kl is not None:
            a, a_ref = (cd.sampler.path_actions(gaussian_score, p, path) for p in (params, jnp.asarray(0.7)))
            np.testing.assert_allclose(kl, jnp.sum(cd.sampler.step_kl(sampler.chain_scales(), a, a_ref), axis=0), rtol=2e-3)


# -- statistics ---------------------------------------------------------------------------------------------------------------------


def mean_distance(shift):
    """`E|X - Y|` for `X ~ N(0, 1)`, `Y ~ N(shift, 1)`: the mean of a folded normal of variance 2."""
    return 2 / np.sqrt(np.pi) * np.exp(-(shift**2) / 4) + shift * (1 - 2 * stats.norm.cdf(-shift / np.sqrt(2)))


def test_energy_distance_is_that_of_gaussians_and_its_error_is_its_spread():
    """Target N(1, 1) as reweighted N(0, 1): against N(0.3, 1) the distance is that at shift 0.7."""
    rng, found = np.random.default_rng(0), []
    for _ in range(300):
        y = rng.normal(size=(200, 1))
        w = np.exp(y[:, 0])
        found.append(energy_distance(rng.normal(0.3, 1, size=(100, 1)), make_target(y, w / w.sum())))
    means, errors = np.array(found).T
    exact = 2 * (mean_distance(0.7) - mean_distance(0.0))
    # the ratio estimator of the weights is biased by O(1 / effective sample size), about 1 % here
    assert abs(means.mean() - exact) < 4 * means.std() / np.sqrt(300) + 0.02 * exact
    assert errors.mean() == pytest.approx(means.std(), rel=0.2)  # 4 standard errors of a standard deviation are 16 %


def test_energy_distance_without_weights_is_unbiased_where_the_laws_agree():
    rng = np.random.default_rng(1)
    uniform = np.full(40, 1 / 40)
    found = [energy_distance(rng.normal(size=(30, 2)), make_target(rng.normal(size=(40, 2)), uniform)).mean for _ in range(400)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 20
    assert np.std(found) < 4 * noise_floor(rng.normal(size=(80, 2)), np.full(80, 1 / 80), 30, 20, 0) < 16 * np.std(found)


def test_distances_are_euclidean():
    x, y = np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 0.0], [6.0, 8.0], [3.0, 0.0]])
    np.testing.assert_allclose(distances(x, y), [[0, 10, 3], [5, 5, 4]], atol=1e-7)


def synthetic(kept):
    """Cells of 3 seeds with a gain of 2 (1 + seed/10) at 24 steps and a known fraction of it elsewhere."""
    rows = []
    for seed in range(3):
        for solver in ("A", "B"):
            for n in (6, 24):
                for method in METHODS:
                    fraction = 1.0 if n == 24 else kept.get(method, [0, 0, 0])[seed]
                    gain = 0.0 if method == "reference" else 2 * (1 + seed / 10) * fraction * (1 if solver == "A" else 0.5)
                    row = dict(seed=seed, method=method, solver=solver, steps=n, eta=1.0, reward=-3.0 + gain)
                    rows.append(row | dict.fromkeys(("path_kl", "objective", "relative_gap", "energy_distance", "diversity")))
    return rows


def test_retention_is_the_fraction_that_was_put_in():
    kept = {"score_as_action": [0.9, 0.8, 0.7], "ddpo": [0.5, 0.3, 0.4], "ddpo_kl": [0.7, 0.8, 0.9]}
    found = summarise(synthetic(kept), "A", 24, 1.0)
    for method, fractions in kept.items():
        row = found["retention"][method]
        assert row["by_steps"]["6"]["mean"] == pytest.approx(np.mean(fractions))
        assert row["by_steps"]["6"]["se"] == pytest.approx(np.std(fractions, ddof=1) / np.sqrt(3))
        assert row["by_steps"]["24"] == {"mean": pytest.approx(1), "se": pytest.approx(0, abs=1e-12)}
        assert row["gain_trained"]["mean"] == pytest.approx(2.2)
        assert row["matrix"]["1"]["mean"] == pytest.approx(0.75 * (1 + np.mean(fractions)) / 2)  # solver B gains half as much
    difference = found["retention"]["ddpo"]["less_than_score_as_action"]
    paired = np.array([0.4, 0.5, 0.3])
    interval = stats.t.interval(0.95, 2, paired.mean(), stats.sem(paired))
    np.testing.assert_allclose([difference["low"], difference["high"]], interval, rtol=1e-9)
    text = verdict(found, "A", 24, 1.0)
    assert "DDPO loses more than half of its gain (least: 0.40, at 6 steps)" in text
    assert "Score as Action keeps at least half of its gain everywhere (least: 0.80, at 6 steps)" in text
    assert "Score as Action less DDPO: 0.40 ± 0.06, 95 % interval 0.15 to 0.65; Score as Action keeps more." in text
    assert "no difference is resolved" in text.split("Score as Action less DDPO with KL penalty")[1]
    assert "| DDPO | 2.20 ± 0.12 | 0.40 ± 0.06 |" in table(found, "A", 24, 1.0)


def test_the_verdict_can_go_the_other_way():
    kept = {"score_as_action": [0.2, 0.3, 0.1], "ddpo": [0.9, 0.9, 0.8], "ddpo_kl": [0.2, 0.3, 0.1]}
    text = verdict(summarise(synthetic(kept), "A", 24, 1.0), "A", 24, 1.0)
    assert "Score as Action loses more than half" in text and "; DDPO keeps more." in text
    one = [row for row in synthetic(kept) if row["seed"] == 0]
    assert "with one seed no statement" in verdict(summarise(one, "A", 24, 1.0), "A", 24, 1.0)


def test_the_best_reward_at_a_path_kl_is_the_gaussian_one():
    """For `r ~ N(0, 1)` under the reference the optimum at price p has reward 1/p and path KL 1/(2 p^2): reward = sqrt(2 KL)."""
    kl, reward = best_rewards(stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)).T
    np.testing.assert_allclose(reward, np.sqrt(2 * kl), rtol=0.01)
    assert kl[0] == pytest.approx(0.5e-4, rel=0.01) and reward[-1] == pytest.approx(2, rel=0.01)
