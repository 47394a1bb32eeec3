"""The two problems of the ablation with their paths and exact values: a ring of Gaussians, and digits by nested simulation."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

import ctrl_diffusion as cd
from ctrl_diffusion.exact import MixtureControl
from ctrl_diffusion.exact.mixture import Components
from ctrl_diffusion.parallel import ONE_DEVICE, Layout, whole
from ctrl_diffusion.predictions import expand
from ctrl_diffusion.rollout import Rollout
from ctrl_diffusion.runs import RunDirectory, exists_for_all, is_first, pretrain, wait_for_all
from ctrl_diffusion.runs.files import write_arrays
from ctrl_diffusion.solvers import power

from .. import data as datasets
from ..classifier import train_classifier
from ..exact.setup import PROBLEMS as EXACT
from ..reward_registry import OF_DIGITS, RewardSettings
from .fit import ExactValues, HeldOut, Law, ProblemData, take_paths


class Size(NamedTuple):
    """How much data a case has: paths per seed, held-out states per time; what follows concerns the digits."""

    seeds: int
    paths: int
    states: int
    digit_states: int = 64
    continuations: int = 1024
    pretrain_steps: int = 1500
    width: int = 128


RING_STEPS = 200

# -- the ring ----------------------------------------------------------------------------------------------------------------


def noised_paths(
    problem: MixtureControl, law: Components, ts: Float[Array, " K"], keys: Key[Array, " b"]
) -> Float[Array, "K b d"]:
    """Paths of the process whose final states have this law, without discretisation: final states, noised step by step.

    At `eta = 1` the reference reverses the noising of the data and the optimal policy that of the reweighted data.
    """
    schedule, tau = problem.process.schedule, problem.process.tau(ts)
    scale = jnp.exp(schedule.log_alpha(tau[:-1]) - schedule.log_alpha(tau[1:]))
    std = jnp.sqrt(schedule.sigma_squared(tau[:-1]) - scale**2 * schedule.sigma_squared(tau[1:]))
    final = law.sample(jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys))
    noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 1), (len(std), final.shape[1])))(keys)

    def back(x, step):
        scale, std, xi = step
        x = scale * x + std * xi
        return x, x

    earlier = jax.lax.scan(back, final, (scale, std, jnp.swapaxes(noise, 0, 1)), reverse=True)[1]
    return jnp.concatenate([earlier, final[None]])


def ring(objective: cd.Objective, problem: MixtureControl, size: Size, optimal: bool) -> Law:
    """Paths of the reference or of the optimal policy, with `V*` and the mean reward to go under the same law.

    The noise of a path is what the chain would have needed to make it; it enters the log-ratio-to-go only.
    """
    ts = objective.sampler.ts
    action, law, mean = problem.reference_action, problem.terminal(ts.dtype), problem.mean_reward
    if optimal:
        action, law, mean = problem.optimal_action, problem.tilted(ts.dtype), problem.optimal_mean_reward
    steps = objective.sampler.transitions()

    @partial(jax.jit, static_argnums=1)
    def draw(key, paths: int):
        x = noised_paths(problem, law, ts, cd.sample_keys(key, paths))
        every = jax.vmap(lambda t, x: (action(None, t, x), problem.reference_action(None, t, x)))
        a_old, a_ref = every(ts[:-1], x[:-1])
        moved = expand(steps.phi, a_old) * x[:-1] + expand(steps.psi, a_old) * a_old
        noise = (x[1:] - moved) / expand(steps.std, a_old)
        x_hat = jax.vmap(problem.process.terminal_mean)(ts[:-1], x[:-1], a_ref)
        reward = jax.vmap(problem.reward)
        paid = objective.step_penalties(a_old, a_ref), objective.step_log_ratios(a_old, a_ref, noise)
        return Rollout(ts, x, problem.reward(x[-1]), *paid, x_hat=x_hat, r_hat=reward(x_hat)), reward(x[:-1])

    # one batch per seed, and one that no seed trains on
    key, paths = jax.random.key(11 + optimal), max(size.paths, size.states)
    batches = [draw(jax.random.fold_in(key, s), paths) for s in range(size.seeds)]
    rollout, r_noisy = jax.tree.map(lambda *v: jnp.stack(v), *batches)
    some, noisy = draw(jax.random.fold_in(key, 1_000_003), paths)
    some, noisy = take_paths(some, jnp.arange(size.states)), noisy[:, : size.states]
    j = jnp.arange(0, objective.intervals, 5)
    exact = ExactValues(*(jax.jit(jax.vmap(f))(ts[j], some.x[j]) for f in (problem.value, mean)))
    held_out = HeldOut(j, some.x[j], some.x_hat[j], some.r_hat[j], noisy[j], exact, jax.tree.map(jnp.zeros_like, exact))
    return Law(rollout, r_noisy, held_out)


def ring_case(name: str) -> Callable[[RunDirectory, Size, Layout], ProblemData]:
    """A ring of `experiments.exact` on 200 steps that shrink towards the data, `t1 - t = (t1 - t0)(1 - i/n)^2`."""

    def make(directory: RunDirectory, size: Size, layout: Layout = ONE_DEVICE) -> ProblemData:
        problem = EXACT[name]()
        assert isinstance(problem, MixtureControl)
        process = problem.process
        grid = power(process.t0, process.t1, RING_STEPS, 2.0)
        sampler = cd.Sampler(process, problem.reference_action, problem.shape, grid=grid)
        objective = cd.Objective(sampler, cd.differentiable(problem.reward), problem.kl_weight)
        return ProblemData(objective, 64, 64, *(ring(objective, problem, size, optimal) for optimal in (False, True)))

    return make


# -- the digits --------------------------------------------------------------------------------------------------------------

STEPS = 16
CHUNK = 4096  # states held in memory by one call of the network


def log_mean_exp(r: Float[Array, "b n"], kl_weight: float) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    r"""`lambda log mean exp(r / lambda)` over `n` draws and its squared standard error, `lambda^2 var(e^{r/lambda}) / (n mean^2)`.

    The bias is minus half of that over lambda, to first order.
    """
    top = jnp.max(r, axis=1, keepdims=True)
    weight = jnp.exp((r - top) / kl_weight)
    mean = jnp.mean(weight, axis=1)
    noise = kl_weight**2 * jnp.var(weight, axis=1, ddof=1) / (r.shape[1] * mean**2)
    return top[:, 0] + kl_weight * jnp.log(mean), noise


def continuations(objective: cd.Objective, params, j: Int[Array, ""], x: Float[Array, "b *x"], key) -> Float[Array, "b *x"]:
    """Final states of the chain from the states `x` of interval `j`, one per row; row `i` draws from `fold_in(key, i)`."""
    steps, ts, keys = objective.sampler.transitions(), objective.sampler.ts, cd.sample_keys(key, len(x))

    def step(i, x):
        noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, i), x.shape[1:], x.dtype))(keys)
        return steps.phi[i] * x + steps.psi[i] * objective.sampler.control(params, ts[i], x, None) + steps.std[i] * noise

    return jax.lax.fori_loop(j, objective.intervals, step, x)


def nested(
    objective: cd.Objective, params, j: Int[Array, " k"], x: Float[Array, "k b *x"], n: int, layout: Layout = ONE_DEVICE
) -> tuple[ExactValues, ExactValues]:
    """`V*` and the mean reward to go of the chain at states of intervals `j`, each from `n` continuations; squared errors.

    Continuations are divided over the devices.
    """

    @jax.jit
    def rewards(params, j, starts, key):
        return objective.reward.fn(continuations(objective, params, j, starts, key))

    layout.check_batch("continuations", n)
    at_once = max(1, CHUNK // n)
    key, params = jax.random.key(23), layout.put(params, layout.replicated)
    found = []
    for k, index in enumerate(j):
        parts = []
        for i in range(0, x.shape[1], at_once):
            starts = layout.put(jnp.repeat(x[k, i : i + at_once], n, axis=0), layout.batch)
            given = layout.put((index, jax.random.fold_in(jax.random.fold_in(key, k), i)), layout.replicated)
            parts.append(jnp.asarray(whole(layout.paced(rewards(params, given[0], starts, given[1]))).reshape(-1, n)))
        r = jnp.concatenate(parts)
        found.append((*log_mean_exp(r, objective.kl_weight), jnp.mean(r, axis=1), jnp.var(r, axis=1, ddof=1) / n))
    soft, soft_noise, mean, mean_noise = (jnp.stack(column) for column in zip(*found))
    return ExactValues(soft, mean), ExactValues(soft_noise, mean_noise)


def digits_case(directory: RunDirectory, size: Size, layout: Layout = ONE_DEVICE) -> ProblemData:
    """A small unconditional model of the digits; the reward is the log-probability of the digit 3; paths of the reference chain."""
    images = datasets.digits()
    assert images.y is not None
    shape = images.x.shape[1:]
    half = np.random.default_rng(0).permutation(len(images.x))[: len(images.x) // 2]
    log_probabilities, _ = train_classifier(jax.random.key(1), jnp.asarray(images.x[half]), jnp.asarray(images.y[half]))
    choice = OF_DIGITS["digit"]
    process = cd.DiffusionProcess(cd.VPCosine(tau_min=0.02))
    network = cd.ResidualMLP(shape, shape, width=size.width, depth=3, rngs=nnx.Rngs(0))
    model = cd.make_model(network, process, shape, grid=process.grid(STEPS))
    model, _ = pretrain(
        directory, model, jnp.asarray(images.x), jax.random.key(2), steps=size.pretrain_steps, batch=256, learning_rate=2e-3,
        layout=layout,
    )  # fmt: skip
    objective = cd.Objective(model.sampler, choice.make(RewardSettings(log_probabilities, 3)), choice.kl_weight)
    params, sampler, reward = jax.tree.map(jnp.asarray, whole(model.params)), model.sampler, objective.reward.fn

    @jax.jit
    def draw(keys):
        path = sampler.trajectory(params, keys)
        a = cd.sampler.path_actions(sampler.control, params, path)
        x_hat = jax.vmap(process.terminal_mean)(path.t[:-1], path.x[:-1], a)
        r_hat, r_noisy = (jax.lax.map(reward, v) for v in (x_hat, path.x[:-1]))
        return path.x, path.noise, a, x_hat, r_hat, r_noisy, reward(path.x[-1])[None]

    def rollout(key, paths: int) -> tuple[Rollout, Float[Array, "n b"]]:
        keys = cd.sample_keys(key, paths)
        parts = [draw(keys[i : i + 1024]) for i in range(0, paths, 1024)]
        x, noise, a, x_hat, r_hat, r_noisy, final = (jnp.concatenate(column, axis=1) for column in zip(*parts))
        return Rollout(sampler.ts, x, final[0], jnp.zeros_like(r_hat), jnp.zeros_like(r_hat), x_hat=x_hat, r_hat=r_hat), r_noisy

    key = jax.random.key(3)
    batches = [rollout(jax.random.fold_in(key, s), size.paths) for s in range(size.seeds)]
    stacked, r_noisy = jax.tree.map(lambda *v: jnp.stack(v), *batches)
    some, noisy = rollout(jax.random.fold_in(key, 1_000_003), size.digit_states)
    j = jnp.arange(0, STEPS, 3)
    file = directory.path / "nested.npz"
    exact, noise = _kept(file, lambda: nested(objective, params, j, some.x[j], size.continuations, layout))
    held_out = HeldOut(j, some.x[j], some.x_hat[j], some.r_hat[j], noisy[j], exact, noise)
    return ProblemData(objective, 128, 256, Law(stacked, r_noisy, held_out))


def _kept(file: Path, make: Callable[[], tuple[ExactValues, ExactValues]]) -> tuple[ExactValues, ExactValues]:
    """The estimates of a file, made and written if it is not there."""
    if not exists_for_all(file):
        exact, noise = make()
        arrays = {"soft": exact.soft, "mean": exact.mean, "soft_noise": noise.soft, "mean_noise": noise.mean}
        if is_first():
            write_arrays(file, {name: np.asarray(v) for name, v in arrays.items()})
        wait_for_all("estimates are written")
    with np.load(file) as found:
        soft, mean, soft_noise, mean_noise = (jnp.asarray(found[k]) for k in ("soft", "mean", "soft_noise", "mean_noise"))
    return ExactValues(soft, mean), ExactValues(soft_noise, mean_noise)


class ProblemChoice(NamedTuple):
    """How a problem is made, iterations of training, and which variants would say nothing new on it, with the reason."""

    make: Callable[[RunDirectory, Size, Layout], ProblemData]
    iterations: int
    left_out: dict[str, str]


_UNKNOWN = "the optimal action is not known"
PROBLEMS: dict[str, ProblemChoice] = {
    "ring_linear": ProblemChoice(ring_case("ring_linear"), 240, {}),
    "ring_quadratic": ProblemChoice(ring_case("ring_quadratic"), 240, {}),
    "digits": ProblemChoice(
        digits_case,
        120,
        {
            "optimum_mean": _UNKNOWN,
            "optimum_kl": _UNKNOWN,
            "optimum_soft": _UNKNOWN,
            "martingale": "on a uniform grid it is the regression at all times",
        },
    ),
}
