"""Step-by-step parity with the samplers of k-diffusion, on one denoiser and the same injected noise.

k-diffusion needs numpy < 2 through one of its dependencies, so it cannot be installed next to this library with all of them. Its
update formulas, written out below, are always compared; its own code where `pip install --no-deps k-diffusion` has been run.
"""

import importlib
import importlib.util
import sys
import types
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_diffusion.predictions import EPSILON, X0
from ctrl_diffusion.process import DiffusionProcess, DiffusionTerm
from ctrl_diffusion.schedules import VarianceExploding
from ctrl_diffusion.solvers import (
    DDIM,
    DPMSolver2S,
    DPMSolverPP2M,
    DPMSolverPP3M,
    EDMHeun,
    ExponentialAdamsBashforth,
    ExponentialEuler,
    ExponentialHeun,
    RecordedPath,
    integrate,
)

RNG = np.random.default_rng(0)
SIGMAS = np.append(np.geomspace(10.0, 0.05, 10), 0.0)
STEPS, SHAPE = len(SIGMAS) - 1, (3, 8)
START, NOISE, SECOND = 10 * RNG.standard_normal(SHAPE), *RNG.standard_normal((2, STEPS, *SHAPE))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def denoiser(x, sigma, lib):
    """Nonlinear in the state; the identity at zero noise."""
    return x / (1 + sigma**2) + 0.4 * sigma / (1 + sigma) * lib.tanh(2 * x)


def denoise(x, sigma):
    return denoiser(x, sigma, np)


# --- the published updates: x, the levels s -> t, the denoised state d


def split(s, t, eta):
    """The level that a deterministic step goes down to, and the noise that brings it back up to t."""
    up = eta * t * np.sqrt(1 - (t / s) ** 2)
    return np.sqrt(t**2 - up**2), up


def ancestral(x, eta):
    for s, t, z in zip(SIGMAS, SIGMAS[1:], NOISE):
        down, up = split(s, t, eta)
        x = x + (down - s) * (x - denoise(x, s)) / s + up * z
        yield x


def heun(x, churn):
    for s, t, z in zip(SIGMAS, SIGMAS[1:], NOISE):
        hat = s * (1 + min(churn / STEPS, 2**0.5 - 1))
        x = x + np.sqrt(hat**2 - s**2) * z
        slope = (x - denoise(x, hat)) / hat
        end = x + (t - hat) * slope
        x = end if t == 0 else x + (t - hat) * (slope + (end - denoise(end, t)) / t) / 2
        yield x


def midpoint(x, form):
    """`dpm_2` in slopes, `dpmpp_2s` in denoised states."""
    for s, t in zip(SIGMAS, SIGMAS[1:]):
        d, m = denoise(x, s), np.sqrt(s * t)
        if t > 0 and form == "slopes":
            inner = x + (m - s) * (x - d) / s
            x = x + (t - s) * (inner - denoise(inner, m)) / m
        elif t > 0:
            inner = m / s * x + (1 - m / s) * d
            x = t / s * x + (1 - t / s) * denoise(inner, m)
        else:
            x = d
        yield x


def correlation(s, t):
    """Between the noises of the inner stage and of the whole step, at eta = 1: one Brownian motion in `1 / sigma^2`."""
    m = np.sqrt(s * t)
    return np.sqrt((m**-2 - s**-2) / (t**-2 - s**-2))


def inner_noise(i):
    """Standard normals of the inner stage of step i, made from those of the path."""
    c = correlation(SIGMAS[i], SIGMAS[i + 1]) if SIGMAS[i + 1] > 0 else 0.0
    return c * NOISE[i] + np.sqrt(1 - c**2) * SECOND[i]


def two_stage_sde(x):
    for i, (s, t) in enumerate(zip(SIGMAS, SIGMAS[1:])):
        d, m = denoise(x, s), np.sqrt(s * t)
        if t > 0:
            down, up = split(s, m, 1.0)
            inner = down / s * x + (1 - down / s) * d + up * inner_noise(i)
            down, up = split(s, t, 1.0)
            x = down / s * x + (1 - down / s) * denoise(inner, m) + up * NOISE[i]
        else:
            x = d
        yield x


def multistep(x, eta, weights):
    """Differences of up to three denoised states; `weights(z, z's gain)` multiply first and second ones. eta here is k-diffusion's."""
    past: list[tuple[Any, Any]] = []
    for i, (s, t) in enumerate(zip(SIGMAS, SIGMAS[1:])):
        d = denoise(x, s)
        if t == 0:
            yield d
            return
        h = np.log(s / t)
        z = (1 + eta) * h
        gain = 1 - np.exp(-z)
        x = np.exp(-z) * x + gain * d + t * np.sqrt(1 - np.exp(-2 * eta * h)) * NOISE[i]
        first, second = weights(z, gain)
        if past:
            d1, h1 = past[-1]
            slope, bend = (d - d1) * h / h1, 0.0
            if len(past) > 1 and second is not None:
                d2, h2 = past[-2]
                earlier = (d1 - d2) * h / h2
                bend = (slope - earlier) * h / (h1 + h2)
                slope = slope + bend * h1 / h
            x = x + first * slope + (0 if second is None else second * bend)
        past.append((d, h))
        yield x


def half(z, gain):
    return gain / 2, None


def exact_first(z, gain):
    return 1 - gain / z, None


def exact_both(z, gain):
    first = 1 - gain / z
    return first, 0.5 - first / z


# --- name: k-diffusion's function and arguments, the formulas, our solver, eta and frozen prediction

CHURN = 3.0
CASES = {
    "euler": ("sample_euler", {}, lambda x: ancestral(x, 0.0), ExponentialEuler(), 0.0, X0),
    "euler_ancestral": ("sample_euler_ancestral", {}, lambda x: ancestral(x, 1.0), ExponentialEuler(), 1.0, X0),
    "euler_ancestral eta=0.6": ("sample_euler_ancestral", dict(eta=0.6), lambda x: ancestral(x, 0.6), DDIM(), 0.6, X0),
    "heun": ("sample_heun", {}, lambda x: heun(x, 0.0), ExponentialHeun(), 0.0, EPSILON),
    "heun with churn": ("sample_heun", dict(s_churn=CHURN), lambda x: heun(x, CHURN), EDMHeun(CHURN, STEPS), 0.0, EPSILON),
    "dpm_2": ("sample_dpm_2", {}, lambda x: midpoint(x, "slopes"), DPMSolver2S(), 0.0, EPSILON),
    "dpmpp_2s": ("sample_dpmpp_2s_ancestral", dict(eta=0.0), lambda x: midpoint(x, "denoised"), DPMSolver2S(), 0.0, X0),
    "dpmpp_sde": ("sample_dpmpp_sde", {}, two_stage_sde, DPMSolver2S(), 1.0, X0),
    "dpmpp_2m": ("sample_dpmpp_2m", {}, lambda x: multistep(x, 0.0, half), DPMSolverPP2M(), 0.0, X0),
    "dpmpp_2m_sde": ("sample_dpmpp_2m_sde", {}, lambda x: multistep(x, 1.0, half), DPMSolverPP2M(), 1.0, X0),
    "dpmpp_2m_sde eta=0.25": (  # their eta is our eta^2
        "sample_dpmpp_2m_sde",
        dict(eta=0.25),
        lambda x: multistep(x, 0.25, half),
        DPMSolverPP2M(),
        0.5,
        X0,
    ),
    "dpmpp_2m_sde heun": (
        "sample_dpmpp_2m_sde",
        dict(solver_type="heun"),
        lambda x: multistep(x, 1.0, exact_first),
        ExponentialAdamsBashforth(2),
        1.0,
        X0,
    ),
    "dpmpp_3m_sde": ("sample_dpmpp_3m_sde", {}, lambda x: multistep(x, 1.0, exact_both), DPMSolverPP3M(curvature=0.5), 1.0, X0),
}


class LevyPath(RecordedPath.__bases__[0]):
    """Recorded increments and Levy areas."""

    increments: RecordedPath
    areas: jax.Array
    levy_area: Any = dfx.SpaceTimeLevyArea

    @property
    def t0(self):
        return self.increments.t0

    @property
    def t1(self):
        return self.increments.t1

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        w = self.increments.evaluate(t0, t1)
        if not use_levy:
            return w
        dt = t1 - t0
        i = jnp.argmin(jnp.abs(self.increments.ts - t0))
        return dfx.SpaceTimeLevyArea(dt=dt, W=w, H=self.areas[i] * jnp.sqrt(dt / 12))


def ours(solver, eta, frozen):
    """States after every step, `[steps, b, x]`."""
    schedule = VarianceExploding(horizon=20.0, tau_min=0.0, tau_max=20.0)  # room for churn above the first level
    process = DiffusionProcess(schedule, eta=eta, frozen=frozen)
    ts = schedule.horizon - SIGMAS

    def control(params, t, x, cond):
        sigma = process.tau(t)
        return (denoiser(x, sigma, jnp) - x) / sigma**2

    recorded = RecordedPath(jnp.asarray(ts), jnp.asarray(NOISE))
    path = LevyPath(recorded, jnp.asarray(SECOND)) if isinstance(solver, DPMSolver2S) else recorded
    noisy = eta > 0 or (isinstance(solver, EDMHeun) and solver.s_churn > 0)
    term = DiffusionTerm(process, control, path if noisy else None)
    return np.asarray(integrate(term, solver, ts, jnp.asarray(START), (None, None), every_step=True))[1:]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_parity_with_the_published_formulas(case):
    *_, formulas, solver, eta, frozen = CASES[case]
    np.testing.assert_allclose(ours(solver, eta, frozen), list(formulas(START)), atol=1e-5, rtol=1e-5)


# --- the package itself


@pytest.fixture(scope="module")
def samplers():
    """The module of samplers alone: importing the whole package needs its training dependencies."""
    for name in ("torch", "torchsde", "torchdiffeq"):
        pytest.importorskip(name, reason=f"parity with k-diffusion needs {name}: pip install 'ctrl-diffusion[torch]'")
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("parity with k-diffusion's own code: pip install --no-deps k-diffusion")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    added = {"k_diffusion": package}
    if importlib.util.find_spec("torchvision") is None:  # for images only
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
            added[name] = types.ModuleType(name)
        added["torchvision.transforms"].functional = added["torchvision.transforms.functional"]  # pyright: ignore
    sys.modules.update(added)
    yield importlib.import_module("k_diffusion.sampling")
    for name in [name for name in sys.modules if name in added or name.startswith("k_diffusion.")]:
        del sys.modules[name]


@pytest.mark.parametrize("case", CASES)
def test_parity_with_k_diffusion(case, samplers, monkeypatch):
    name, options, _, solver, eta, frozen = CASES[case]
    torch = samplers.torch
    draws = [torch.from_numpy(z) for z in NOISE]
    if case == "dpmpp_sde":
        draws = [torch.from_numpy(z) for i in range(STEPS) for z in (inner_noise(i), NOISE[i])]
    drawn, states = iter(draws), []
    if name in ("sample_euler", "sample_heun", "sample_dpm_2"):
        monkeypatch.setattr(torch, "randn_like", lambda x: next(drawn))
    elif name != "sample_dpmpp_2m":
        options = dict(options, noise_sampler=lambda s, t: next(drawn))

    def model(x, sigma):
        return denoiser(x, sigma[:, None], torch)

    def callback(step):  # before the update, and with churn after the noise: the state is recorded by its denoised partner
        states.append(step["denoised"].numpy())

    start, sigmas = torch.from_numpy(START), torch.from_numpy(SIGMAS)
    end = getattr(samplers, name)(model, start, sigmas, disable=True, callback=callback, **options).numpy()
    got = ours(solver, eta, frozen)
    np.testing.assert_allclose(got[-1], end, atol=1e-5, rtol=1e-5)
    assert len(states) == STEPS
    if "s_churn" not in options:
        before = np.concatenate([START[None], got[:-1]])
        for x, sigma, expected in zip(before, SIGMAS, states):
            np.testing.assert_allclose(denoise(x, sigma), expected, atol=1e-5, rtol=1e-5)
