"""Fine-tuning a deterministic sampler by gradients through it."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ctrl_diffusion as cd
from ctrl_diffusion.runs import RunDirectory, finetune
from tests.test_special_cases import (
    BATCH,
    DIM,
    KEY,
    PROCESS,
    SGD,
    STEPS,
    assert_gradient,
    control,
    one_step,
    reward,
    weights,
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_draft_of_an_ode_needs_no_exploration():
    """The gradient is that of the reward of what the sampler makes. There is no path KL, and likelihoods are refused."""
    process = cd.DiffusionProcess(PROCESS.schedule, 0.0)
    sampler = cd.Sampler(process, control, (DIM,), grid=process.grid(STEPS), dtype=jnp.float64)
    flow = cd.Objective(sampler, cd.differentiable(reward), 0.0)
    new, info = one_step(cd.draft(flow, SGD))
    keys = cd.sample_keys(jax.random.split(KEY)[0], BATCH)
    adjoint = dfx.RecursiveCheckpointAdjoint(checkpoints=STEPS)
    assert_gradient(new.params, weights(0), lambda params: -jnp.mean(reward(sampler.sample(params, keys, adjoint=adjoint))))
    assert np.isnan(info.metrics["path_kl"]) and np.isfinite(info.metrics["objective"])
    with pytest.raises(
        ValueError, match="the sampler is an ODE, whose paths have no likelihood, and LikelihoodRatio needs one"
    ):
        cd.ddpo(flow, SGD)


def test_an_ode_has_no_path_kl_to_limit(tmp_path):
    process = cd.DiffusionProcess(PROCESS.schedule, 0.0)
    sampler = cd.Sampler(process, control, (DIM,), grid=process.grid(STEPS), dtype=jnp.float64)
    algorithm = cd.draft(cd.Objective(sampler, cd.differentiable(reward), 0.0), SGD)
    run, state = RunDirectory(tmp_path / "run", loggers=[]), algorithm.init(weights(0))
    with pytest.raises(ValueError, match="kl_budget=1.0: the sampler is an ODE, which has no path KL: leave it out"):
        finetune(run, algorithm, state, KEY, iterations=1, kl_budget=1.0)
