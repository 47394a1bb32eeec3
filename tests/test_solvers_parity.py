"""Step-by-step parity with the schedulers of diffusers, on the same network outputs and the same injected noise."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_diffusion.predictions import EPSILON, X0
from ctrl_diffusion.process import DiffusionProcess
from ctrl_diffusion.schedules import VPTable
from ctrl_diffusion.solvers import (
    DDIM,
    DPMSolverPP2M,
    DPMSolverPP3M,
    ExponentialEuler,
    ExponentialHeun,
    RecordedPath,
    UniPC,
    from_timesteps,
    integrate,
    leading,
)

torch = pytest.importorskip("torch", reason="parity with diffusers needs torch: pip install 'ctrl-diffusion[torch]'")
diffusers = pytest.importorskip("diffusers", reason="parity with diffusers: pip install 'ctrl-diffusion[torch]'")

STEPS, SHAPE = 10, (3, 8)
BETAS = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
RNG = np.random.default_rng(0)
START, NOISE = RNG.standard_normal(SHAPE), RNG.standard_normal((STEPS, *SHAPE))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def network(x, timestep, lib):
    """An epsilon prediction, nonlinear in the state."""
    return x * timestep / (timestep + 200) + 0.3 * lib.tanh(2 * x) / (1 + timestep / 500)


def schedule_of(scheduler, timesteps):
    """The scheduler's own (float32) table, in float64."""
    products = scheduler.alphas_cumprod.double().numpy()
    betas = 1 - products / np.append(1.0, products[:-1])
    return VPTable(betas=tuple(betas.tolist()), tau_min=0.0, tau_max=(int(timesteps[0]) + 1) / 1000)


def ours(scheduler, timesteps, solver, eta, frozen=X0):
    """States after every step, `[steps, b, x]`."""
    process = DiffusionProcess(schedule_of(scheduler, timesteps), eta=eta, frozen=frozen)
    ts = from_timesteps(timesteps)

    def control(params, t, x, cond):
        tau = process.tau(t)
        return -network(x, 1000 * tau - 1, jnp) / process.schedule.sigma(tau)

    path = None if eta == 0 else RecordedPath(jnp.asarray(ts), jnp.asarray(NOISE))
    return np.asarray(integrate(process.term(control, path), solver, ts, jnp.asarray(START), (None, None), every_step=True))[1:]


def theirs(scheduler, monkeypatch, scaled=False, calls_per_step=1, **step):
    """The scheduler's loop. `scaled`: its state is `x / alpha`. Noise drawn inside is replaced by the injected one."""
    scheduler.set_timesteps(STEPS)
    drawn = iter(torch.from_numpy(NOISE))
    module = importlib.import_module(type(scheduler).__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(drawn))
    products = scheduler.alphas_cumprod.double()
    timesteps = scheduler.timesteps.numpy()
    x = torch.from_numpy(START.copy())
    x = x / products[int(timesteps[0])].sqrt() if scaled else x
    states = []
    noise_argument = step.pop("noise_argument", None)
    for i, t in enumerate(scheduler.timesteps):
        if noise_argument:
            step[noise_argument] = torch.from_numpy(NOISE[i])
        output = network(scheduler.scale_model_input(x, t), t.double(), torch)
        x = scheduler.step(output, t, x, **step).prev_sample.double()
        last = i == len(timesteps) - 1
        if last or (i + 1) % calls_per_step == 0:
            following = torch.tensor(1.0) if last else products[int(timesteps[i + 1])]
            states.append((x * following.sqrt() if scaled else x).numpy())
    return np.stack(states)


def heun_states(states):
    """Heun's scheduler calls twice a step, but once in the last: keep what follows each second call, and the end."""
    return np.concatenate([states[1:-1:2], states[-1:]])


CASES = {
    "DDIM eta=0": ("DDIMScheduler", {}, dict(eta=0.0), ExponentialEuler(), 0.0, X0),
    "DDIM eta=0, our DDIM": ("DDIMScheduler", {}, dict(eta=0.0), DDIM(), 0.0, X0),
    "DDIM eta=0.5": ("DDIMScheduler", {}, dict(eta=0.5, noise_argument="variance_noise"), DDIM(), 0.5, X0),
    "DDIM eta=1": ("DDIMScheduler", {}, dict(eta=1.0, noise_argument="variance_noise"), ExponentialEuler(), 1.0, X0),
    "DDPM": ("DDPMScheduler", {}, {}, ExponentialEuler(), 1.0, X0),
    "EulerAncestral": ("EulerAncestralDiscreteScheduler", {}, dict(scaled=True), ExponentialEuler(), 1.0, X0),
    "Euler": ("EulerDiscreteScheduler", {}, dict(scaled=True), ExponentialEuler(), 0.0, X0),
    "Heun": ("HeunDiscreteScheduler", {}, dict(scaled=True), ExponentialHeun(), 0.0, EPSILON),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", dict(algorithm_type="dpmsolver++"), {}, DPMSolverPP2M(), 0.0, X0),
    "SDE-DPM-Solver++ 2M": (
        "DPMSolverMultistepScheduler",
        dict(algorithm_type="sde-dpmsolver++"),
        dict(noise_argument="variance_noise"),
        DPMSolverPP2M(),
        1.0,
        X0,
    ),
    "DPM-Solver++ 3M as published": (
        "DPMSolverMultistepScheduler",
        dict(algorithm_type="dpmsolver++", solver_order=3, solver_type="heun", lower_order_final=False),
        {},
        DPMSolverPP3M(curvature=0.5),
        0.0,
        X0,
    ),
    "UniPC": ("UniPCMultistepScheduler", dict(solver_order=2, solver_type="bh2"), {}, UniPC(2), 0.0, X0),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_parity_with_diffusers(case, monkeypatch):
    name, config, step, solver, eta, frozen = CASES[case]
    if name in ("DDIMScheduler", "DDPMScheduler"):
        config = dict(config, clip_sample=False)
    if name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        config = dict(config, final_sigmas_type="zero")
        timesteps = leading(STEPS, drop_last=True)
    else:
        timesteps = leading(STEPS)
    scheduler = getattr(diffusers, name)(**BETAS, timestep_spacing="leading", **config)
    expected = theirs(scheduler, monkeypatch, **step)
    if name == "HeunDiscreteScheduler":
        expected = heun_states(expected)
    np.testing.assert_array_equal(np.unique(scheduler.timesteps.numpy().astype(int))[::-1], timesteps)
    got = ours(scheduler, timesteps, solver, eta, frozen)
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)
