r"""The one loop that every algorithm is a setting of.

Per iteration: sample paths and reward them; let the critic value them; compute what the estimator needs ahead; then, over
minibatches of rows, change the policy by the estimator's loss and the value by the critic's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from ..critics import Critic
from ..estimators import AbstractEstimator, Calls, Models
from ..objective import Objective, Rollout, Rows
from ..process import Params
from ..rewards import evaluate
from ..sampler import Trajectory, path_actions
from ..solvers import sample_keys
from ..states import AbstractStates, OnPolicy
from ..trust import AbstractTrustRegion, FirstOrder


class State(NamedTuple):
    """Everything a resume needs."""

    params: Params
    reference: Params
    value_params: Params
    optimizer: Any
    value_optimizer: Any
    memory: Any = ()


class Info(NamedTuple):
    """What one iteration showed: scalar metrics, and the final states with their rewards."""

    metrics: dict[str, Float[Array, ""]]
    samples: Float[Array, "b *x"]
    rewards: Float[Array, " b"]


class TimeSampling(NamedTuple):
    """A few times of every path, drawn anew for each path and iteration: less work per path, the same expected gradient.

    Attributes:
        number: rows per path, drawn with replacement.
        density: relative frequency of the control intervals, `(left ends of intervals [n]) -> [n]`, positive; a row counts one over
            its frequency, so that the density changes the variance of the policy's gradient and not its mean. A critic's regression
            is on the rows as they are drawn.
    """

    number: int
    density: Callable[[Float[Array, " n"]], Float[Array, " n"]] = jnp.ones_like

    def __call__(self, key: Key[Array, ""], t: Float[Array, " s"], columns: Rows) -> Rows:
        """`[number, b]` of the columns `[s, b, ...]` at times `t`, with their weights."""
        density = self.density(t) / jnp.sum(self.density(t))
        batch = columns.j.shape[1]
        chosen = jax.random.choice(key, len(t), (self.number, batch), p=density)
        rows = jax.tree.map(lambda v: v[chosen, jnp.arange(batch)], columns)
        return rows._replace(weight=rows.weight / (len(t) * density[chosen]))


class Training(NamedTuple):
    """How much data an iteration has and how it is used; global numbers.

    Attributes:
        policy: how the policy moves: an optax optimiser, or a trust region such as `NaturalGradient(radius)`.
        batch: paths per iteration.
        epochs: passes over the rows of an iteration.
        minibatches: updates per pass; must divide the number of rows: `batch * intervals` (or times), `batch` for whole paths.
        value: optax optimiser of a learned value, on the same rows; `None`: the value is not changed.
        times: which times of a path make rows (default: every one that the estimator uses).
    """

    policy: optax.GradientTransformation | AbstractTrustRegion
    batch: int
    epochs: int = 1
    minibatches: int = 1
    value: optax.GradientTransformation | None = None
    times: TimeSampling | None = None


class Algorithm(NamedTuple):
    """`state = init(params, value_params)` (`init(params)` without a learned value); `state, info = step(key, state)`.

    `step` consumes its state (buffers are donated).
    """

    init: Callable[..., State]
    step: Callable[[Key[Array, ""], State], tuple[State, Info]]
    calls: Calls
    """What one iteration evaluates, in samples (a value network not counted)."""


def compose(
    objective: Objective,
    estimator: AbstractEstimator,
    critic: Critic,
    training: Training,
    *,
    states: AbstractStates | None = None,
    denoise_with_policy: bool = False,
) -> Algorithm:
    r"""An algorithm from its parts.

    Args:
        objective: what is maximised, on which chain.
        estimator: how the policy's gradient is estimated.
        critic: what a state is worth, and how that is learned.
        training: batch, passes, optimisers and trust region.
        states: whose paths are trained on (default: the policy's own).
        denoise_with_policy: `x_hat` of the value from the policy's score instead of the reference's. A posterior mean divides
            the score by `alpha`: near the noise end a slight change of the policy moves its `x_hat` without bound.
    """
    batch, epochs, minibatches = training.batch, training.epochs, training.minibatches
    trust_region = training.policy if isinstance(training.policy, AbstractTrustRegion) else FirstOrder(training.policy)
    chosen = OnPolicy() if states is None else states
    times = training.times
    for name, number in {"batch": batch, "epochs": epochs, "times.number": 1 if times is None else times.number}.items():
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1.")
    sampler, reward, control, n = objective.sampler, objective.reward, objective.sampler.control, objective.intervals
    estimator.check(objective, critic)
    starts = estimator.starts(objective)
    if times is not None and estimator.whole_paths:
        raise ValueError(f"times={times}: {type(estimator).__name__} is trained on whole paths; use times=None.")
    per_path = len(starts) if times is None else times.number
    rows_in_all = batch if estimator.whole_paths else batch * per_path
    if minibatches < 1 or rows_in_all % minibatches:
        drawn = "intervals" if times is None else "times.number"
        what = f"batch = {batch}" if estimator.whole_paths else f"batch * {drawn} = {batch} * {per_path} = {rows_in_all}"
        raise ValueError(f"minibatches={minibatches} must divide {what}.")

    def empty_rollout() -> Rollout:
        ts, shape, dtype = sampler.ts, sampler.shape, sampler.dtype

        def like(*axes: int):
            return jax.ShapeDtypeStruct(axes, dtype)

        interval = like(n, batch, *shape)
        t, x, pairs = like(*ts.shape), like(n + 1, batch, *shape), like(n, batch)
        return Rollout(t, x, interval, interval, interval, interval, pairs, like(batch))  # pyright: ignore[reportArgumentType]

    def init(params: Params, value_params: Params = ()) -> State:
        params, reference, value_params = (jax.tree.map(jnp.copy, p) for p in (params, params, value_params))
        memory = chosen.init(empty_rollout())
        return State(params, reference, value_params, trust_region.init(params), critic.init(value_params), memory)

    @jax.jit
    def collect(key, params) -> Trajectory:
        return objective.exploration.trajectory(sampler, params, sample_keys(key, batch))

    @jax.jit
    def annotate(params, reference, path: Trajectory):
        """Old and reference actions, and guesses of the final state."""
        a_old, a_ref = path_actions(control, params, path), path_actions(control, reference, path)
        if not critic.value.uses_reward:
            return a_old, a_ref, path.x[:-1]
        guide, action = (params, a_old) if denoise_with_policy else (reference, a_ref)
        x_hat = jax.lax.map(lambda row: objective.lookahead(sampler, guide, *row), (path.t[:-1], path.x[:-1], action))
        return a_old, a_ref, x_hat

    def at_starts(v):
        return v if len(starts) == n else v[starts]

    @jax.jit
    def prepare(key, models: Models, rollout: Rollout):
        """Values, targets and signals, as rows."""
        values = critic.values(models.value, rollout)
        target = critic.targets(objective, rollout, values)
        signal = estimator.signal(objective, critic, models, rollout, values)
        columns = Rows(
            j=at_starts(jnp.broadcast_to(jnp.arange(n)[:, None], (n, batch))),
            x=at_starts(rollout.x[:-1]),
            x_next=at_starts(rollout.x[1:]),
            noise=at_starts(rollout.noise),
            a_old=at_starts(rollout.a_old),
            a_ref=at_starts(rollout.a_ref),
            x_hat=at_starts(rollout.x_hat),
            r_hat=at_starts(rollout.r_hat),
            weight=at_starts(jnp.ones((n, batch), target.dtype)),
            target=at_starts(target),
            signal=signal,
        )
        metrics = {"signal_std": jnp.std(signal)} if signal.size else {}
        if critic.optimizer is not None:
            residual = jnp.var(target - values[:-1]) / jnp.maximum(jnp.var(target), jnp.finfo(target.dtype).tiny)
            metrics["value_explained_variance"] = 1 - residual
        if estimator.whole_paths:
            return jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), columns), metrics
        if times is not None:
            columns = times(key, sampler.ts[starts], columns)
        return jax.tree.map(lambda v: v.reshape((rows_in_all,) + v.shape[2:]), columns), metrics

    def value_step(value_params, state, params, reference, rows: Rows):
        """One update of the value on the same rows."""
        if critic.optimizer is None:
            return value_params, state, {}

        def loss(value_params):
            return estimator.value_error(objective, critic, value_params, params, reference, rows)

        error, gradient = jax.value_and_grad(loss)(value_params)
        change, state = critic.optimizer.update(gradient, state, value_params)
        return optax.apply_updates(value_params, change), state, {"value_loss": error}

    def policy_loss(reference, value_params):
        return lambda params, rows: estimator.loss(objective, critic, params, Models(reference, value_params), rows)

    @jax.jit(donate_argnums=0)
    def update(learned, reference, rows: Rows, chosen_rows: Int[Array, " m"]):
        """One update of policy and value on the rows with these indices."""
        params, value_params, opt, value_opt = learned
        rows = jax.tree.map(lambda v: v[chosen_rows], rows)
        new_params, opt, metrics = trust_region.minibatch(policy_loss(reference, value_params), params, opt, rows)
        value_params, value_opt, value_metrics = value_step(value_params, value_opt, params, reference, rows)
        return (new_params, value_params, opt, value_opt), metrics | value_metrics

    @jax.jit(donate_argnums=0)
    def finish(params, models: Models, rows: Rows):
        return trust_region.finish(objective, policy_loss(*models), params, rows)

    @jax.jit
    def judge(rollout: Rollout):
        price = jnp.sum(objective.step_prices(rollout), axis=0)
        gained = rollout.reward - jnp.sum(objective.costs(rollout), axis=0)
        return {
            "reward": jnp.mean(rollout.reward),
            "path_kl": jnp.mean(price),
            "objective": jnp.mean(gained - (objective.kl_weight * price if objective.kl_weight else 0.0)),
        }

    remember = jax.jit(chosen.update, donate_argnums=1)

    def step(key: Key[Array, ""], state: State) -> tuple[State, Info]:
        key_paths, key_rows = jax.random.split(key)
        behaviour = chosen.behaviour(state.params, state.reference)
        path = collect(key_paths, behaviour)
        a_old, a_ref, x_hat = annotate(behaviour, state.reference, path)
        r = evaluate(reward, path.x[-1])
        r_hat = jnp.zeros((n, batch), r.dtype)
        if critic.value.uses_reward:
            r_hat = evaluate(reward, x_hat.reshape((n * batch,) + x_hat.shape[2:])).reshape(n, batch)
        fresh = Rollout(path.t, path.x, path.noise, a_old, a_ref, x_hat, r_hat, r)
        memory, rollout = remember(jax.random.fold_in(key_rows, 1), state.memory, fresh)
        models = Models(state.reference, state.value_params)
        rows, metrics = prepare(jax.random.fold_in(key_rows, 2), models, rollout)
        shown = judge(fresh)
        learned = (state.params, state.value_params, state.optimizer, state.value_optimizer)
        history: list[dict[str, Any]] = []
        for k in jax.random.split(key_rows, epochs):
            for chosen_rows in jax.random.permutation(k, rows_in_all).reshape(minibatches, -1):
                learned, update_metrics = update(learned, state.reference, rows, chosen_rows)
                history.append(update_metrics)
        params, value_params, opt, value_opt = learned
        params, finish_metrics = finish(params, Models(state.reference, value_params), rows)
        metrics |= history[-1] | finish_metrics | shown
        if "max_log_ratio" in history[0]:
            metrics["first_log_ratio"] = history[0]["max_log_ratio"]
        return State(params, state.reference, value_params, opt, value_opt, memory), Info(metrics, path.x[-1], r)

    return Algorithm(init, step, _calls(objective, estimator, critic, trust_region, training, rows_in_all))


def _calls(
    objective: Objective,
    estimator: AbstractEstimator,
    critic: Critic,
    trust_region: AbstractTrustRegion,
    training: Training,
    rows: int,
) -> Calls:
    """Paths with old and reference actions, the signal, and the losses."""
    states = objective.intervals * training.batch
    signal, loss = estimator.signal_calls(critic), estimator.loss_calls(objective, critic)
    evaluated = trust_region.loss_evaluations(rows, training.epochs)
    return Calls(
        (objective.exploration.substeps_per_interval + 2) * states + signal.network * states + loss.network * evaluated,
        signal.gradient * states + loss.gradient * evaluated,
        training.batch + (critic.value.uses_reward + signal.reward) * states + loss.reward * evaluated,
    )
