"""The ablation of value networks: its exact values, its targets and losses by hand, what it writes, that it resumes."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ctrl_diffusion as cd
from ctrl_diffusion import exact
from ctrl_diffusion.critics import MartingaleCritic, squared_error
from ctrl_diffusion.rollout import Rollout, Transitions
from experiments.value_networks import experiment as value_networks
from experiments.value_networks.__main__ import main
from experiments.value_networks.cases import PROBLEMS, continuations, log_mean_exp, noised_paths
from experiments.value_networks.report import relative_errors
from experiments.value_networks.variants import BY_NAME, PANELS, VARIANTS

SCHEDULE = cd.VPLinear(tau_min=1e-3)


def mixture(reward, kl_weight: float = 1.0) -> exact.MixtureControl:
    return exact.MixtureControl(cd.DiffusionProcess(SCHEDULE), exact.ring(), reward, kl_weight)


REWARDS = {
    "linear": mixture(exact.LinearReward((1.0, 0.0))),
    "quadratic": mixture(exact.QuadraticReward(0.5, (2.0, 0.0)), 0.7),
}


# -- exact values


@pytest.mark.parametrize("problem", REWARDS.values(), ids=REWARDS)
def test_mean_rewards_are_those_of_the_posterior_of_the_final_state(problem):
    """Bayes' rule on a grid: `p(y) N(x; scale y, n)`, for the optimum times `exp(r(y)/lambda)`.

    The trapezoidal rule for an analytic integrand that vanishes at the ends: its error is below rounding as long as the narrowest
    factor is wider than the spacing, here 0.02 against a standard deviation of at least 0.15.
    """
    axis = np.linspace(-6, 6, 601)
    y = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    x = jnp.asarray([[0.3, -0.8], [-1.5, 0.2], [2.0, 1.0]])
    process, law = problem.process, problem.terminal()
    for time in (0.1, 0.5, 0.9):
        t = jnp.asarray(time)
        scale = float(process.schedule.alpha(process.tau(t)) / process.schedule.alpha(jnp.asarray(1e-3)))
        noise = float(
            process.schedule.sigma_squared(process.tau(t)) - scale**2 * process.schedule.sigma_squared(jnp.asarray(1e-3))
        )
        assert min(math.sqrt(noise) / scale, 0.35) > 0.15
        squares = np.sum((y[:, None] - np.asarray(law.means)) ** 2, axis=-1)
        prior = np.exp(-squares / (2 * float(law.variance))).sum(axis=1)
        r = np.asarray(problem.reward(jnp.asarray(y)), np.float64)
        for i, (mean, best) in enumerate(zip(problem.mean_reward(t, x), problem.optimal_mean_reward(t, x))):
            weight = prior * np.exp(-np.sum((np.asarray(x[i]) - scale * y) ** 2, axis=1) / (2 * noise))
            assert float(mean) == pytest.approx(weight @ r / weight.sum(), abs=2e-4)  # float32 against sums of order 10
            weight = weight * np.exp(r / problem.kl_weight)
            assert float(best) == pytest.approx(weight @ r / weight.sum(), abs=2e-4)


def test_a_linear_reward_of_the_posterior_mean_is_the_mean_reward():
    problem = REWARDS["linear"]
    x = 2 * jax.random.normal(jax.random.key(0), (64, 2))
    for time in (0.2, 0.6, 0.95):
        t = jnp.asarray(time)
        x_hat = problem.process.terminal_mean(t, x, problem.reference_action(None, t, x))
        np.testing.assert_allclose(problem.reward(x_hat), problem.mean_reward(t, x), atol=1e-3)


@pytest.mark.parametrize("problem", REWARDS.values(), ids=REWARDS)
def test_noised_paths_have_the_law_of_the_exact_values(problem):
    """`r - E[r | x]` has mean zero and is uncorrelated with the state; so has `e^{(r - V*)/lambda} - 1` under the reference."""
    ts, keys = jnp.asarray([0.0, 0.3, 0.6, 0.8, 0.95, problem.process.t1]), cd.sample_keys(jax.random.key(4), 20_000)
    laws = ((problem.terminal(), problem.mean_reward), (problem.tilted(), problem.optimal_mean_reward))
    for law, mean in laws:
        x = noised_paths(problem, law, ts, keys)
        for t, at in zip(ts[:-1], x[:-1]):
            errors = [problem.reward(x[-1]) - mean(t, at)]
            if law is laws[0][0]:
                errors.append(jnp.exp((problem.reward(x[-1]) - problem.value(t, at)) / problem.kl_weight) - 1)
            for error in errors:
                for feature in (jnp.ones(len(at)), at[:, 0], at[:, 1]):
                    product = np.asarray(error * feature, np.float64)
                    assert abs(product.mean()) < 4.5 * product.std() / np.sqrt(len(product))  # 60 checks: 4.5 standard errors


# -- targets and losses


@pytest.fixture(scope="module")
def objective() -> cd.Objective:
    problem = REWARDS["linear"]
    sampler = cd.Sampler(problem.process, problem.reference_action, (2,), grid=np.asarray([0.0, 0.2, 0.9, problem.process.t1]))
    return cd.Objective(sampler, cd.differentiable(problem.reward), 1.0)


def test_td_mixes_targets_of_one_two_and_three_steps(objective):
    """Rewards 8, values 1, 2, 4, intervals that cost 1/2, 1/4, 1: one-step targets 3/2, 15/4, 7, Monte Carlo 25/4, 27/4, 7.

    With `lambda = e^{-dt / horizon} = 1/2`: the last is 7; the second 15/4 / 2 + 27/4 / 2 = 21/4; the first
    3/2 / 2 + (4 - 3/4) / 4 + 25/4 / 4 = 25/8.
    """
    zeros = jnp.zeros((3, 1, 2))
    rollout = Rollout(
        jnp.arange(4.0),
        jnp.zeros((4, 1, 2)),
        jnp.asarray([8.0]),
        *[jnp.zeros((3, 1))] * 2,
        x_hat=zeros,
        r_hat=jnp.zeros((3, 1)),
    )
    values = jnp.asarray([[1.0], [2.0], [4.0], [8.0]])
    monte_carlo = jnp.asarray([[6.25], [6.75], [7.0]])

    def targets(horizon: float) -> list[float]:
        critic = cd.Critic(cd.X0RewardValue(0.0, 1.0), target=lambda objective, rollout: monte_carlo, horizon=horizon)
        return np.asarray(critic.targets(objective, rollout, values))[:, 0].tolist()

    assert targets(math.inf) == [6.25, 6.75, 7.0]
    assert targets(0.0) == pytest.approx([1.5, 3.75, 7.0])
    assert targets(1 / math.log(2)) == pytest.approx([3.125, 5.25, 7.0])
    assert targets(1e6) == pytest.approx([6.25, 6.75, 7.0], abs=1e-4)


def test_the_martingale_loss_is_an_integral_over_time(objective):
    """Intervals of 0.2, 0.7, 0.099 with errors 1, 2, 3: `(0.2 + 4 x 0.7 + 9 x 0.099) / 0.999`; the regression: 14/3."""
    value = cd.X0RewardValue(objective.sampler.process.t0, objective.sampler.process.t1)
    j, zeros = jnp.arange(3), jnp.zeros((3, 2))
    goal = jnp.asarray([1.0, -2.0, 3.0])
    rows = Transitions(j, zeros, weight=jnp.ones(3), x_hat=zeros, r_hat=jnp.zeros(3), value_target=goal)
    dt = np.diff(objective.sampler.times)
    assert float(MartingaleCritic(value).error((), objective, rows)) == pytest.approx(dt @ [1, 4, 9] / dt.sum(), rel=1e-5)
    assert float(cd.Critic(value).error((), objective, rows)) == pytest.approx(14 / 3)
    even = cd.Sampler(objective.sampler.process, objective.sampler.control, (2,), grid=objective.sampler.process.grid(3))
    even = cd.Objective(even, objective.reward, 1.0)
    assert float(MartingaleCritic(value).error((), even, rows)) == pytest.approx(14 / 3, rel=1e-5)
    assert MartingaleCritic(value).loss is squared_error
    with pytest.raises(TypeError, match="loss"):
        MartingaleCritic(value, loss=squared_error)  # pyright: ignore[reportCallIssue]


# -- nested simulation


def test_log_mean_exp_and_its_error():
    """Of rewards 0 and log 3 with equal chances at temperature 1: log 2, and `var = (1/2)^2 / n` of `e^r / E e^r`."""
    r = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, (2000, 400)), math.log(3.0), 0.0)
    value, noise = log_mean_exp(r, 1.0)
    assert np.mean(noise) == pytest.approx(0.25 / 400, rel=0.01)
    error = np.asarray(value) - math.log(2.0)
    assert error.mean() == pytest.approx(-0.5 * 0.25 / 400, abs=4 * math.sqrt(0.25 / 400 / 2000))
    assert error.var() == pytest.approx(0.25 / 400, rel=4 * math.sqrt(2 / 2000))  # a variance of 2000 normal draws
    shifted, same = log_mean_exp(1000 + 0.5 * r, 0.5)  # no overflow; the temperature scales the value, its square the noise
    np.testing.assert_allclose(shifted - 1000, 0.5 * value, atol=1e-3)
    np.testing.assert_allclose(same, 0.25 * noise, rtol=1e-2)


def test_continuations_are_the_chain():
    """Under the action `-t x` the chain is linear: its mean factor and variance follow by recursion."""
    process = cd.DiffusionProcess(cd.VPLinear(tau_min=0.3))
    sampler = cd.Sampler(process, lambda p, t, x, c: -t * x, (2,), grid=process.grid(4))
    linear = cd.Objective(sampler, cd.differentiable(lambda x: x[:, 0]), 1.0)
    steps, ts = sampler.transitions(), sampler.ts
    x = jnp.tile(jnp.asarray([[1.0, -2.0]]), (20_000, 1))
    for first in (0, 2):
        factor, variance = 1.0, 0.0
        for i in range(first, 4):
            f = float(steps.phi[i] - steps.psi[i] * ts[i])
            factor, variance = factor * f, variance * f**2 + float(steps.std[i]) ** 2
        final = np.asarray(continuations(linear, None, jnp.asarray(first), x, jax.random.key(first)), np.float64)
        np.testing.assert_allclose(final.mean(0), factor * np.asarray([1.0, -2.0]), atol=4 * math.sqrt(variance / 20_000))
        np.testing.assert_allclose(final.var(0), variance, rtol=5 * math.sqrt(2 / 20_000))


# -- the experiment


def test_relative_errors_are_zero_for_the_exact_value_and_one_for_a_constant():
    result = {"t": [0.0, 0.4, 1.0], "variance_own": [0.0, 1.0, 4.0], "noise_own": [0.1, 0.1, 0.1]}
    result["square_own"] = [[[0.1, 1.1, 4.1], [0.1, 0.1, 0.1], [0.1, 0.35, 1.1]]]
    np.testing.assert_allclose(relative_errors(result, "own"), [[1.0, 0.0, 0.5]], atol=1e-6)


def test_variants_differ_in_one_factor_and_each_is_shown():
    assert set(BY_NAME) == {name for panel in PANELS for name in panel.names}
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    assert all(set(problem.left_out) <= set(BY_NAME) for problem in PROBLEMS.values())
    chosen = value_networks.units(value_networks.Config())
    assert {unit.variant for unit in chosen if unit.problem == "ring_linear"} == set(BY_NAME)
    assert len([unit for unit in chosen if unit.problem == "digits"]) == len(BY_NAME) - 4
    assert len(value_networks.units(value_networks.Config(quick=True))) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variants": ("plane",)}, "variants: 'plane' is not one of structured"),
        ({"problems": ("ring",)}, "problems: 'ring' is not one of ring_linear"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
        ({"continuations": 1}, "continuations=1 must be at least 2"),
        ({"problems": ("digits",), "variants": ("optimum_kl",)}, "optimum_kl on digits: the optimal action is not known"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        value_networks.units(value_networks.Config(**settings))


@pytest.mark.slow
def test_the_command_learns_writes_and_resumes(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    args = ["--out", str(out), "--problems", "ring_linear", "digits", "--variants", "optimum_soft", "x0_prediction"]
    args += ["--iterations", "6", "--paths", "256", "--states", "64", "--digit-states", "4", "--continuations", "16"]
    args += ["--pretrain-steps", "20"]
    assert main(args) == 0
    results = json.loads((out / "metrics.json").read_text())["results"]
    by_unit = {(r["problem"], r["variant"]): r for r in results}
    assert len(by_unit) == 3  # the optimum of the digits is not known
    learned, x0_reward = by_unit["ring_linear", "optimum_soft"], by_unit["ring_linear", "x0_prediction"]
    assert learned["updates"] == 48 and x0_reward["updates"] == 0
    assert learned["error_own"] < 0.5 * learned["early_error_own"]  # 0.3 of 1.6 in fact
    assert learned["error_own"] == learned["error_soft"] == pytest.approx(learned["error_at_optimum"], rel=1e-5)
    digits = by_unit["digits", "x0_prediction"]
    assert x0_reward["estimate_error"] == 0 < digits["estimate_error"] and digits["error_at_optimum"] is None
    for problem in ("ring_linear", "digits"):
        for name in ("errors", "curves"):
            assert (out / f"{name}-{problem}.png").stat().st_size > 1000
    assert len((out / "table.md").read_text().splitlines()) == 7

    # of a run that was stopped only what is missing is made again, the paths of its problem included
    made, again = [], []
    missing = out / "units" / "ring_linear-x0_prediction.json"
    result = json.loads(missing.read_text())
    (out / "metrics.json").unlink()
    missing.unlink()
    stubs = {name: p._replace(make=lambda *_, name=name: made.append(name)) for name, p in PROBLEMS.items()}
    monkeypatch.setattr(value_networks, "PROBLEMS", stubs)
    monkeypatch.setattr(value_networks, "learn", lambda case, variant, budget, layout: again.append(variant.name) or result)
    assert main(args) == 0
    assert (made, again) == (["ring_linear"], ["x0_prediction"])
    assert json.loads((out / "metrics.json").read_text())["results"] == results
    capsys.readouterr()
    assert main(args) == 0
    assert "finished" in capsys.readouterr().out
    assert main([*args, "--seeds", "3"]) == 1
    assert "other settings" in capsys.readouterr().err
