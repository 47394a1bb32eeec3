"""The temperature that follows a target path KL: exact values, a resume, one compilation, and where it settles."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ctrl_diffusion as cd
from ctrl_diffusion import exact
from ctrl_diffusion.algorithms import AdaptiveKL

PROCESS = cd.DiffusionProcess(cd.VPLinear(beta_min=4.0, beta_max=4.0, horizon=2.0, tau_min=2e-3, tau_max=2.0))
PROBLEM = exact.GaussianControl(exact.GaussianQuadratic(PROCESS, 1.0, 0.5, 1.0, -0.5, 0.7, noise_start=True))


def control(params, t, x, cond=None):
    a, a_ref = PROBLEM.optimal_action(None, t, x), PROBLEM.reference_action(None, t, x)
    return a_ref + params * (a - a_ref)


def algorithm(kl_target, rate=0.3, kl_weight=0.7):
    sampler = cd.Sampler(PROBLEM.process, control, (1,), grid=PROBLEM.process.grid(16))
    objective = cd.Objective(sampler, cd.differentiable(PROBLEM.reward), kl_weight)
    return cd.adjoint_matching(objective, cd.Training(optax.sgd(rate), 64, kl_target=kl_target))


def test_the_temperature_follows_the_clipped_relative_error():
    """`lambda (1 + rate clip(KL/target - 1))`, and the loss and the objective are those of the temperature before."""
    follow = algorithm(AdaptiveKL(target=4.0, rate=0.1, bound=9.0))
    state = follow.init(jnp.ones(()))._replace(reference=jnp.zeros(()))
    for key in jax.random.split(jax.random.key(0), 3):
        before = float(state.kl_weight)
        fixed = algorithm(None, kl_weight=before)
        same = fixed.init(jnp.array(state.params))._replace(reference=jnp.zeros(()))
        expected, shown = fixed.step(key, same)
        state, info = follow.step(key, state)
        kl = float(info.metrics["path_kl"])
        assert kl > 0.05 and float(info.metrics["kl_weight"]) == pytest.approx(before)
        assert float(state.kl_weight) == pytest.approx(before * (1 + 0.1 * (kl / 4.0 - 1)), rel=1e-5)
        np.testing.assert_allclose(state.params, expected.params, rtol=1e-5)
        np.testing.assert_allclose(info.metrics["objective"], shown.metrics["objective"], rtol=1e-5)
    assert follow.programs["update"].run._cache_size() == follow.programs["prepare"].run._cache_size() == 1


def test_a_resumed_run_has_the_temperature_of_one_that_was_not_stopped(tmp_path):
    follow = algorithm(AdaptiveKL(target=4.0, rate=0.1, bound=9.0))
    ended = {}
    for name, stops in {"whole": (3,), "stopped": (1, 2, 3)}.items():
        for iterations in stops:  # every call begins with the state of a new process
            state = follow.init(jnp.ones(()))._replace(reference=jnp.zeros(()))
            run = cd.runs.RunDirectory(tmp_path / name, {}, loggers=[])
            ended[name], _ = cd.runs.finetune(run, follow, state, jax.random.key(0), iterations=iterations)
    assert float(ended["whole"].kl_weight) != pytest.approx(0.7, rel=0.05)
    chex.assert_trees_all_equal(*ended.values())


def test_the_error_is_clipped_and_the_path_kl_reaches_its_target():
    """Lambda moves by at most 2 % an iteration; from far below the target the policy ends at it."""
    target = 0.3
    bounded = AdaptiveKL(target)
    assert float(bounded(jnp.asarray(1.0), jnp.asarray(30.0))) == pytest.approx(1.02)
    assert float(bounded(jnp.asarray(1.0), jnp.asarray(0.0))) == pytest.approx(0.98)
    follow = algorithm(AdaptiveKL(target, rate=0.5, bound=0.5))
    state = follow.init(jnp.asarray(0.0))
    for i in range(60):
        state, info = follow.step(jax.random.key(i), state)
    assert float(info.metrics["path_kl"]) == pytest.approx(target, rel=0.1)
    assert float(state.kl_weight) != pytest.approx(0.7, rel=0.1)


REFUSED = {
    "target": (lambda: algorithm(AdaptiveKL(-1.0)), "kl_target=.*target=-1.0.* must be positive"),
    "rate": (lambda: algorithm(AdaptiveKL(1.0, rate=5.0, bound=0.5)), "their product below 1"),
    "no price": (
        lambda: cd.ddpo(
            cd.Objective(cd.Sampler(PROBLEM.process, control, (1,)), cd.differentiable(PROBLEM.reward), 0.0),
            cd.Training(optax.sgd(0.1), 8, kl_target=AdaptiveKL(1.0)),
        ),
        "kl_weight=0: kl_target=.* scales it .* give Objective a positive kl_weight",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_targets_that_cannot_work_are_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()
