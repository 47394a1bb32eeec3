r"""Continuous-time policy optimisation with a value network ("Score as Action", arXiv 2502.01819), PPO form.

Per iteration: sample paths under the current policy with exploration; measure the KL of every interval to the reference;
regress the value on the return to go at all times; ascend

    sum_j E[ min(rho_j A_j, clip(rho_j) A_j) ] - kl_weight sum_j E[ kl_j(theta) ],     log rho_j = z_j . xi_j - |z_j|^2 / 2,

`z_j = scale_j (a_theta - a_old)(t_j, x_j)`, over minibatches of (time, sample) pairs. `A_j` are value increments.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from ..exploration import AbstractExploration, Brownian, shift
from ..objective import advantages, centre, clipped_surrogate, returns_to_go, standardise, value_increments
from ..process import Params
from ..rewards import Reward, as_reward, evaluate
from ..sampler import Sampler, Trajectory, log_ratio, path_actions, step_kl
from ..solvers import sample_keys
from ..values import AbstractValue


class State(NamedTuple):
    """Everything a resume needs."""

    params: Params
    reference: Params
    value_params: Params
    optimizer: optax.OptState
    value_optimizer: optax.OptState


class Info(NamedTuple):
    """What one iteration showed: scalar metrics, and the final states with their rewards."""

    metrics: dict[str, Float[Array, ""]]
    samples: Float[Array, "b *x"]
    rewards: Float[Array, " b"]


class Algorithm(NamedTuple):
    """`state = init(params, value_params)` (`init(params)` without a learned value); `state, info = step(key, state)`.

    `step` consumes its state (buffers are donated).
    """

    init: Callable[..., State]
    step: Callable[[Key[Array, ""], State], tuple[State, Info]]


class Pairs(NamedTuple):
    """Training data, one row per (time, sample) pair."""

    t: Float[Array, " n"]
    x: Float[Array, "n *x"]
    noise: Float[Array, "n *x"]
    a_old: Float[Array, "n *x"]
    a_ref: Float[Array, "n *x"]
    x_hat: Float[Array, "n *x"]
    r_hat: Float[Array, " n"]
    scale: Float[Array, " n"]
    price_scale: Float[Array, " n"]
    advantage: Float[Array, " n"]
    target: Float[Array, " n"]


def score_as_action(
    sampler: Sampler,
    reward: Reward | Callable,
    value: AbstractValue,
    *,
    kl_weight: float,
    batch: int,
    optimizer: optax.GradientTransformation,
    value_optimizer: optax.GradientTransformation,
    exploration: AbstractExploration | None = None,
    epochs: int = 1,
    minibatches: int = 1,
    clip: float = float("inf"),
    horizon: float = 0.0,
    kl_to_go: bool = True,
    normalise: str = "none",
    max_advantage: float = float("inf"),
    denoise_with_policy: bool = False,
) -> Algorithm:
    r"""Score as Action, PPO form.

    Args:
        sampler: process, control, solver and control grid that data is collected with.
        reward: a `Reward`, or any Python function of a numpy batch.
        value: the critic; `V(t1, x) = r(x)`.
        kl_weight: the temperature lambda, reward units per nat of path KL; at least 0.
        batch: paths per iteration (global).
        optimizer, value_optimizer: optax transformations for the policy and the value.
        exploration: `Brownian()` (default) or `ActionNoise(...)`.
        epochs: passes over the data of an iteration.
        minibatches: updates per pass; must divide `batch * intervals`.
        clip: the likelihood ratio is clipped to `1 +- clip`; inf is no clipping. Log-densities are *summed* over state
            dimensions, so usual values (0.1 to 0.3) apply, unlike in codes that average them.
        horizon: decay time of the advantages, in units of control time (`objective.advantages`).
        kl_to_go: include the KL still to be paid in the value's target. Without it (as published) the fixed point is not the
            maximiser of J when `kl_weight > 0`.
        normalise: standardise advantages over the batch at each time ("time", as published), over all pairs ("all"), subtract
            their mean over the batch at each time ("centre"), or neither ("none").
            Standardised advantages change the price relative to the reward: with `kl_weight > 0` only "none" and "centre" optimise J.
        max_advantage: clamp of the advantages' magnitude, after normalisation (published: 5).
        denoise_with_policy: `x_hat` of the value from the policy's score instead of the reference's. A posterior mean divides
            the score by `alpha`: near the noise end a slight change of the policy moves its `x_hat` without bound, and with it
            the value, whereas the reference's stays what it was.

    Deviations from the paper at the defaults: KL-to-go in the target; no standardisation and no clamp; log-ratios summed;
    `x_hat` from the reference.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{zhao2025score, title={Score as Action: Fine-Tuning Diffusion Generative Models by Continuous-time
          Reinforcement Learning}, author={Zhao, Hanyang and Chen, Haoxian and Zhang, Ji and Yao, David D. and Tang, Wenpin},
          booktitle={ICML}, year={2025}, eprint={2502.01819}}
        ```
    """
    explore = Brownian() if exploration is None else exploration
    reward = as_reward(reward)
    intervals = len(sampler.times) - 1
    n = intervals * batch
    _check(kl_weight=kl_weight, clip=clip, horizon=horizon, max_advantage=max_advantage, batch=batch, epochs=epochs)
    if minibatches < 1 or n % minibatches:
        raise ValueError(f"minibatches={minibatches} must divide batch * intervals = {batch} * {intervals} = {n}.")
    if normalise not in ("none", "centre", "time", "all"):
        raise ValueError(f'normalise={normalise!r} must be "none", "centre", "time" or "all".')
    process, control = sampler.process, sampler.control
    scales, price_scales = explore.scales(sampler), explore.price_scales(sampler)
    dt = jnp.diff(sampler.ts)

    def init(params: Params, value_params: Params = ()) -> State:
        params, reference, value_params = (jax.tree.map(jnp.copy, p) for p in (params, params, value_params))
        return State(params, reference, value_params, optimizer.init(params), value_optimizer.init(value_params))

    @jax.jit
    def collect(key, params) -> Trajectory:
        return explore.trajectory(sampler, params, sample_keys(key, batch))

    @jax.jit
    def annotate(params, reference, path: Trajectory):
        """Old and reference actions, KL per interval, and posterior means of the final state."""
        a_old, a_ref = path_actions(control, params, path), path_actions(control, reference, path)
        a_hat = a_old if denoise_with_policy else a_ref
        x_hat = jax.vmap(process.terminal_mean)(path.t[:-1], path.x[:-1], a_hat)
        return a_old, a_ref, step_kl(price_scales, a_old, a_ref), x_hat

    @jax.jit
    def prepare(value_params, path: Trajectory, a_old, a_ref, kl, x_hat, r_hat, r):
        """Values, advantages and targets, flattened to (time, sample) pairs."""
        values = jax.lax.map(lambda row: value(value_params, *row), (path.t[:-1], path.x[:-1], x_hat, r_hat))
        values = jnp.concatenate([values, r[None]])
        target = returns_to_go(r, kl, kl_weight if kl_to_go else 0.0)
        advantage = advantages(value_increments(values, kl, kl_weight if kl_to_go else 0.0), dt, horizon)
        if normalise == "centre":
            advantage = centre(advantage)
        elif normalise != "none":
            advantage = standardise(advantage, 1 if normalise == "time" else None)
        advantage = jnp.clip(advantage, -max_advantage, max_advantage)
        rows = (path.t[:-1], scales, price_scales)
        t, scale, price = (jnp.broadcast_to(v[:, None], (intervals, batch)) for v in rows)
        columns = Pairs(t, path.x[:-1], path.noise, a_old, a_ref, x_hat, r_hat, scale, price, advantage, target)
        pairs = jax.tree.map(lambda v: v.reshape((n,) + v.shape[2:]), columns)
        residual = jnp.var(target - values[:-1]) / jnp.maximum(jnp.var(target), jnp.finfo(target.dtype).tiny)
        return pairs, {"value_explained_variance": 1 - residual, "advantage_std": jnp.std(advantage)}

    def policy_loss(params, rows: Pairs):
        a = control(params, rows.t, rows.x, None)
        z = shift(rows.scale, a, rows.a_old)
        log_rho = log_ratio(z, rows.noise)
        gain = clipped_surrogate(log_rho, rows.advantage, clip)
        kl = 0.5 * jnp.sum(shift(rows.price_scale, a, rows.a_ref) ** 2, axis=tuple(range(1, a.ndim)))
        metrics = {
            "update_kl": intervals * 0.5 * jnp.mean(jnp.sum(z**2, axis=tuple(range(1, z.ndim)))),
            "max_log_ratio": jnp.max(jnp.abs(log_rho)),
            "clip_fraction": jnp.mean(jnp.abs(jnp.expm1(log_rho)) > clip),
        }
        return intervals * jnp.mean(kl_weight * kl - gain), metrics

    def value_loss(value_params, rows: Pairs):
        return jnp.mean((value(value_params, rows.t, rows.x, rows.x_hat, rows.r_hat) - rows.target) ** 2)

    @jax.jit(donate_argnums=0)
    def update(learned, pairs: Pairs, rows: Array):
        """One optimiser step of policy and value on the pairs with indices `rows`."""
        params, value_params, opt, value_opt = learned
        rows = jax.tree.map(lambda v: v[rows], pairs)
        (loss, metrics), gradient = jax.value_and_grad(policy_loss, has_aux=True)(params, rows)
        change, opt = optimizer.update(gradient, opt, params)
        value_error, value_gradient = jax.value_and_grad(value_loss)(value_params, rows)
        value_change, value_opt = value_optimizer.update(value_gradient, value_opt, value_params)
        metrics |= {"policy_loss": loss, "value_loss": value_error, "gradient_norm": optax.tree.norm(gradient)}
        learned = optax.apply_updates(params, change), optax.apply_updates(value_params, value_change), opt, value_opt
        return learned, metrics

    def step(key: Key[Array, ""], state: State) -> tuple[State, Info]:
        key_paths, key_rows = jax.random.split(key)
        path = collect(key_paths, state.params)
        a_old, a_ref, kl, x_hat = annotate(state.params, state.reference, path)
        r = evaluate(reward, path.x[-1])
        r_hat = jnp.zeros((intervals, batch), r.dtype)
        if value.uses_reward:
            r_hat = evaluate(reward, x_hat.reshape((n,) + x_hat.shape[2:])).reshape(intervals, batch)
        pairs, metrics = prepare(state.value_params, path, a_old, a_ref, kl, x_hat, r_hat, r)
        learned = (state.params, state.value_params, state.optimizer, state.value_optimizer)
        history = []
        for k in jax.random.split(key_rows, epochs):
            for rows in jax.random.permutation(k, n).reshape(minibatches, -1):
                learned, update_metrics = update(learned, pairs, rows)
                history.append(update_metrics)
        path_kl = jnp.sum(kl, axis=0)
        metrics |= {name: history[-1][name] for name in history[-1]}
        metrics |= {
            "reward": jnp.mean(r),
            "path_kl": jnp.mean(path_kl),
            "objective": jnp.mean(r - kl_weight * path_kl),
            "first_log_ratio": history[0]["max_log_ratio"],
        }
        params, value_params, opt, value_opt = learned
        return State(params, state.reference, value_params, opt, value_opt), Info(metrics, path.x[-1], r)

    return Algorithm(init, step)


def _check(**arguments: Any) -> None:
    """Numbers that must not be negative (or nan)."""
    remedies = {
        "kl_weight": "it is the temperature lambda, the price per nat of path KL: use 0 for no price, more for a weaker tilt",
        "clip": "use inf for no clipping",
        "horizon": "it is a time: use 0 for single increments, inf for Monte Carlo returns",
        "max_advantage": "use inf for no clamp",
    }
    for name, value in arguments.items():
        if name in ("batch", "epochs"):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        elif not value >= 0:
            raise ValueError(f"{name}={value} must not be negative: {remedies[name]}.")
