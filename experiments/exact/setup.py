"""Problems whose optimum is known, each with a sampler, a policy and a value to be trained."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

import ctrl_diffusion as cd
from ctrl_diffusion import exact
from ctrl_diffusion.exact import AbstractControlProblem
from ctrl_diffusion.networks import TimeEmbedding
from ctrl_diffusion.predictions import V, expand
from ctrl_diffusion.solvers import power

Control = Callable[..., Any]

PROBLEMS: dict[str, Callable[[], AbstractControlProblem]] = {
    "ring_linear": exact.ring_linear,
    "ring_quadratic": exact.ring_quadratic,
    "gaussian_quadratic": functools.partial(exact.gaussian_quadratic, tau_min=2e-3),
    "quadratic_ou_easy": exact.quadratic_ou_easy,
    "quadratic_ou_hard": exact.quadratic_ou_hard,
    "linear_ou": exact.linear_ou,
    "double_well": exact.double_well,
}
DIFFUSION = ("ring_linear", "ring_quadratic", "gaussian_quadratic")


class PolicyNetwork(nnx.Module):
    """`gain(t) features + network(features, t)`: features `[b, f]` to `[b, *out]`, zero at first."""

    def __init__(self, features: int, out: tuple[int, ...], width: int, rngs: nnx.Rngs):
        self.out = nnx.static(out)
        self.embed = TimeEmbedding(width, rngs)
        self.gain = nnx.Linear(width, math.prod(out) * features, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.network = cd.ResidualMLP((features,), out, width=width, depth=2, rngs=rngs)

    def __call__(self, features, t, cond=None):
        gain = self.gain(nnx.silu(self.embed(t))).reshape(len(features), -1, features.shape[1])
        return self.network(features, t) + jnp.einsum("bof,bf->bo", gain, features).reshape(-1, *self.out)


class CoordinateNetwork(nnx.Module):
    """A small network for every coordinate, which sees its own `(t, x_i, seen_i)` only: features `[b, 2 d]` to `[b, d]`, zero at first."""

    def __init__(self, features: int, out: tuple[int, ...], width: int, rngs: nnx.Rngs):
        (d,) = out
        each = nnx.initializers.lecun_normal(batch_axis=0)
        self.embed = TimeEmbedding(width, rngs)
        self.enter = nnx.Einsum("bfd,dfk->bdk", (d, features // d, width), kernel_init=each, rngs=rngs)
        self.modulation = nnx.Einsum("be,dek->bdk", (d, width, 2 * width), (d, 2 * width), kernel_init=each, rngs=rngs)
        self.inner = nnx.Einsum("bdk,dkl->bdl", (d, width, width), (d, width), kernel_init=each, rngs=rngs)
        self.leave = nnx.Einsum("bdk,dk->bd", (d, width), kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, features, t, cond=None):
        scale, shift = jnp.split(self.modulation(nnx.silu(self.embed(t))), 2, axis=-1)
        h = self.enter(features.reshape(len(features), -1, self.leave.kernel.shape[0]))
        return self.leave(nnx.silu(self.inner(nnx.silu(h * (1 + scale) + shift))))


COORDINATEWISE = ("double_well",)
"""Problems whose drift, noise, cost and reward treat coordinates one by one: their policies do so too, with half the width."""


class Setup(NamedTuple):
    """A problem with a sampler, a control and a value; `start(seed)` gives the parameters of both."""

    problem: AbstractControlProblem
    sampler: cd.Sampler
    value: Control
    start: Callable[[int], tuple[Any, Any]]


def setup(problem_name: str, width: int = 32) -> Setup:
    """The reference action plus `G^2/B` times a network that starts at zero; a value network of `(t, x)` beside it.

    The network sees `t`, `x` and what the reference makes of them: the posterior mean of diffusion problems, the drift of others.
    On the `COORDINATEWISE` problems it is one small network per coordinate, otherwise one of all.
    Steps shrink towards the end, `t1 - t = (t1 - t0) (1 - i/n)^1.5`. Diffusion problems are sampled with frozen v-predictions on 100
    of them: a policy that is optimal for this chain has a relative gap of 0.4 % on the ring, with 50 steps and x0 frozen it has 3 %.
    Others have their own number.
    """
    problem = PROBLEMS[problem_name]()
    process, steps, shape = problem.process, len(problem.grid()) - 1, problem.shape
    if isinstance(process, cd.DiffusionProcess):
        process, steps = cd.DiffusionProcess(process.schedule, process.eta, V), 100
    grid = power(process.t0, process.t1, steps, 1.5)

    def networks(seed):
        rngs = nnx.Rngs(seed)
        if problem_name in COORDINATEWISE:
            policy = cd.value_network(CoordinateNetwork(2 * math.prod(shape), shape, width // 2, rngs))
        else:
            policy = cd.value_network(PolicyNetwork(2 * math.prod(shape), shape, width, rngs))
        return policy, cd.value_network(cd.ResidualMLP(shape, (), width=width, depth=2, rngs=rngs))

    def start(seed):
        (_, params), (_, value_params) = networks(seed)
        return params, value_params

    (network, _), (value, _) = networks(0)

    def control(params, t, x, cond=None):
        _, b, g = process.coefficients(t)
        a_ref = problem.reference_action(None, t, x)
        seen = process.terminal_mean(t, x, a_ref) if isinstance(process, cd.DiffusionProcess) else a_ref
        features = jnp.concatenate([v.reshape(len(x), -1) for v in (x, seen)], axis=1)
        return a_ref + expand(g**2 / b, x) * network(params, t, features)

    return Setup(problem, cd.Sampler(process, control, shape, grid=grid), value, start)
