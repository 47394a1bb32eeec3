"""Train one variant of the ablation on given paths, and measure its error to the exact value on the way."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

import ctrl_diffusion as cd
from ctrl_diffusion.parallel import ONE_DEVICE, Layout
from ctrl_diffusion.rollout import Rollout, Transitions, over_paths

from .variants import Variant


class ExactValues(NamedTuple):
    """The soft value `V*` and the mean `E[r(X_T) | x]` at held-out states, or their squared standard errors."""

    soft: Float[Array, "k b"]
    mean: Float[Array, "k b"]


class HeldOut(NamedTuple):
    """Held-out states of intervals `j`: their x0 predictions `x_hat`, rewards of these and of the states, exact values.

    `noise` holds the squared standard errors of `exact`, zero for closed forms.
    """

    j: Int[Array, " k"]
    x: Float[Array, "k b *x"]
    x_hat: Float[Array, "k b *x"]
    r_hat: Float[Array, "k b"]
    r_noisy: Float[Array, "k b"]
    exact: ExactValues
    noise: ExactValues


class Law(NamedTuple):
    """Paths to train on, with a leading axis of seeds `S`, rewards `r(x)` of their states, and held-out states."""

    rollout: Rollout
    r_noisy: Float[Array, "S n b"]
    held_out: HeldOut


class ProblemData(NamedTuple):
    """A problem with its paths, the width of value networks and how many paths an iteration takes.

    `optimum` is None where the optimal action is not known.
    """

    objective: cd.Objective
    width: int
    paths: int
    reference: Law
    optimum: Law | None = None


class FitBudget(NamedTuple):
    """Iterations of `updates` updates on `transitions` each; the error is measured `evaluations` times, evenly."""

    iterations: int
    evaluations: int = 16
    updates: int = 8
    transitions: int = 512
    learning_rate: float = 2e-3


class FitState(NamedTuple):
    """What changes while a value is learned."""

    params: Any
    optimizer: optax.OptState


def take_paths(rollout: Rollout, chosen: Int[Array, " p"]) -> Rollout:
    """Some paths of a batch."""
    return over_paths(lambda axis, v: jnp.take(v, chosen, axis=axis), rollout)


def learn(case: ProblemData, variant: Variant, budget: FitBudget, layout: Layout = ONE_DEVICE) -> dict[str, Any]:
    """Train one variant, all seeds at once, and measure it before, on the way and at the end.

    The transitions of an update are divided over the devices of `layout`; all of them have everything else.

    Every seed has its own initial parameters and paths, the same for all variants. An iteration draws paths, computes targets by
    the present value, and makes its updates on their transitions in random order. Adam with a cosine decay to 2 %, gradients clipped
    at norm 10.

    Returns lists: `updates [e]`, `t [k]`; `square_soft`, `square_own [S, e, k]`: mean squares over held-out states of the value
    less `V*` and less what the variant converges to; `variance_*`, `noise_* [k]`: the variance of these over the states, and
    mean squared standard errors; `*_at_optimum`: the same of the trained value less `V*` at the states of the optimum, None where
    that is not known; `seconds`.
    """
    begin = time.perf_counter()
    law, objective = layout.put(variant.law(case), layout.replicated), case.objective
    best = case.optimum and layout.put(case.optimum.held_out, layout.replicated)
    sampler, n, seeds = objective.sampler, objective.intervals, law.r_noisy.shape[0]
    if n * case.paths < budget.updates * budget.transitions:
        raise ValueError(
            f"{budget.updates} updates on {budget.transitions} transitions need more than {case.paths} paths of {n} intervals."
        )
    shape = (sampler.shape, ())
    networks = [cd.value_network(cd.ResidualMLP(*shape, width=case.width, depth=2, rngs=nnx.Rngs(s))) for s in range(seeds)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(p for _, p in networks))
    rate = optax.cosine_decay_schedule(budget.learning_rate, budget.iterations * budget.updates, 0.02)
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))
    critic = variant.critic(variant.form(networks[0][0], sampler.process.t0, sampler.process.t1))
    rollouts, held = law.rollout, law.held_out
    if variant.noisy_reward:
        rollouts = rollouts._replace(r_hat=law.r_noisy)
    own, own_noise = variant.converges_to(held.exact), variant.converges_to(held.noise)

    def iteration(state: FitState, rollout: Rollout, key, i) -> FitState:
        key_paths, key_order = jax.random.split(jax.random.fold_in(key, i))
        some = take_paths(rollout, jax.random.randint(key_paths, (case.paths,), 0, len(rollout.reward)))
        target = critic.targets(objective, some, critic.values(state.params, some))
        order = jax.random.permutation(key_order, n * case.paths)[: budget.updates * budget.transitions]

        def update(state: FitState, index):
            at = index // case.paths, index % case.paths
            x, x_hat, r_hat, goal = (v[at] for v in (some.x, some.x_hat, some.r_hat, target))
            at, x, x_hat, r_hat, goal = layout.constrain((at, x, x_hat, r_hat, goal), layout.batch)
            some_transitions = Transitions(at[0], x, jnp.ones_like(goal), x_hat=x_hat, r_hat=r_hat, value_target=goal)
            gradient = jax.grad(critic.error)(state.params, objective, some_transitions)
            change, opt = optimizer.update(gradient, state.optimizer, state.params)
            return FitState(optax.apply_updates(state.params, change), opt), None

        return jax.lax.scan(update, state, order.reshape(budget.updates, budget.transitions))[0]

    def fit(state: FitState, rollout: Rollout, key, start, stop) -> FitState:
        return jax.lax.fori_loop(start, stop, lambda i, s: iteration(s, rollout, key, i), state)

    def squares(params, held: HeldOut, own):
        r_hat = held.r_noisy if variant.noisy_reward else held.r_hat
        values = jax.lax.map(lambda row: critic.value(params, *row), (sampler.ts[held.j], held.x, held.x_hat, r_hat))
        return jnp.mean((values - held.exact.soft) ** 2, axis=1), jnp.mean((values - own) ** 2, axis=1)

    fit = jax.jit(jax.vmap(fit, in_axes=(0, 0, 0, None, None)), donate_argnums=0)
    measure = jax.jit(jax.vmap(squares, in_axes=(0, None, None)))
    keys = cd.sample_keys(jax.random.key(5), seeds)
    layout.check_batch("transitions of an update", budget.transitions)
    state = FitState(params, jax.vmap(optimizer.init)(params))
    state, keys = layout.put((state, keys), layout.replicated)
    marks = np.linspace(0, budget.iterations, budget.evaluations + 1).astype(int).tolist()
    found = [measure(state.params, held, own)]
    for start, stop in zip(marks, marks[1:]) if critic.learns else ():
        state = layout.paced(fit(state, rollouts, keys, start, stop))
        found.append(measure(state.params, held, own))
    square_soft, square_own = (np.stack([np.asarray(pair[i], np.float64) for pair in found], axis=1) for i in (0, 1))
    if not np.isfinite(square_own).all():
        raise FloatingPointError(f"{variant.name}: the value is not finite after training; lower its learning rate.")

    def listed(v: Array) -> list[float]:
        return np.asarray(v, np.float64).tolist()

    return {
        "updates": [budget.updates * mark for mark in marks[: len(found)]],
        "t": listed(sampler.ts[held.j]),
        "square_soft": square_soft.tolist(),
        "square_own": square_own.tolist(),
        "variance_soft": listed(jnp.var(held.exact.soft, axis=1)),
        "variance_own": listed(jnp.var(own, axis=1)),
        "noise_soft": listed(jnp.mean(held.noise.soft, axis=1)),
        "noise_own": listed(jnp.mean(own_noise, axis=1)),
        "square_at_optimum": best and measure(state.params, best, best.exact.soft)[0][:, None].tolist(),
        "variance_at_optimum": best and listed(jnp.var(best.exact.soft, axis=1)),
        "noise_at_optimum": best and listed(jnp.mean(best.noise.soft, axis=1)),
        "seconds": time.perf_counter() - begin,
    }
