r"""The one loop that every algorithm is a setting of.

Per iteration: sample paths and reward them; let the critic value them; compute what the estimator needs ahead; then, over
minibatches of rows, change the policy by the estimator's loss and the value by the critic's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from ..critics import Critic
from ..estimators import AbstractEstimator, Calls, Models
from ..gradients import reduced_once
from ..objective import Objective, Rollout, Rows
from ..parallel import ONE_DEVICE, Layout
from ..process import Params
from ..rewards import evaluate, evaluate_parts
from ..sampler import Sampler, Trajectory, path_actions
from ..solvers import sample_keys
from ..states import AbstractStates, OnPolicy, memory_shardings
from ..trust import AbstractTrustRegion, FirstOrder


class State(NamedTuple):
    """Everything a resume needs."""

    params: Params
    reference: Params
    value_params: Params
    optimizer: Any
    value_optimizer: Any
    memory: Any = ()
    average: Params = ()


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
        rollouts: parts that an iteration's paths are sampled in: while a black-box reward judges one on the host, the devices are busy
            with the next. The same paths.
        times: which times of a path make rows (default: every one that the estimator uses).
        layout: the devices that share the work (default: one). Results do not depend on it beyond rounding.
        accumulation: parts that an update's rows are worked through in, one after the other: less memory, the same gradient.
        average: decay per update of a running average of the policy's parameters, `State.average`; `None`: none is kept.
        stratified: every `minibatches` consecutive rows (times of a path, then paths) are dealt out, one to each minibatch, instead of
            all rows being shuffled. Rows then stay on their devices, whose exchange otherwise grows with the batch; the expected
            gradient is the same.
    """

    policy: optax.GradientTransformation | AbstractTrustRegion
    batch: int
    epochs: int = 1
    minibatches: int = 1
    value: optax.GradientTransformation | None = None
    times: TimeSampling | None = None
    rollouts: int = 1
    layout: Layout = ONE_DEVICE
    accumulation: int = 1
    average: float | None = None
    stratified: bool = False


class Programs(NamedTuple):
    """The compiled programs of an iteration; `select` and `update` run once per minibatch (see `programs.lower`)."""

    collect: Any
    annotate: Any
    remember: Any
    prepare: Any
    shuffle: Any
    select: Any
    update: Any
    finish: Any


class Algorithm(NamedTuple):
    """`state = init(params, value_params)` (`init(params)` without a learned value); `state, info = step(key, state)`.

    `step` consumes its state (buffers are donated).
    """

    init: Callable[..., State]
    step: Callable[[Key[Array, ""], State], tuple[State, Info]]
    calls: Calls
    """What one iteration evaluates, in samples (a value network not counted)."""
    programs: Programs


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
    times, layout, parts = training.times, training.layout, training.accumulation
    for name, number in {
        "batch": batch,
        "epochs": epochs,
        "times.number": 1 if times is None else times.number,
        "rollouts": training.rollouts,
    }.items():
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1.")
    if layout.mesh is not None:
        s = objective.sampler
        gathered = Sampler(s.process, layout.gathering(s.control), s.shape, grid=s.grid, solver=s.solver, dtype=s.dtype)
        objective = eqx.tree_at(lambda o: o.sampler, objective, gathered)
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
    rows_in_one = rows_in_all // minibatches
    if batch % training.rollouts:
        raise ValueError(f"rollouts={training.rollouts} must divide batch={batch}.")
    layout.check_batch(
        "batch" if training.rollouts == 1 else f"batch / {training.rollouts} rollouts", batch // training.rollouts
    )
    layout.check_batch(f"rows of a minibatch over accumulation, {rows_in_one} / {parts}", rows_in_one // max(parts, 1))
    if parts < 1 or rows_in_one % parts:
        raise ValueError(f"accumulation={parts} must divide the rows of a minibatch, {rows_in_one}.")
    if parts > 1 and not estimator.is_mean:
        raise ValueError(
            f"accumulation={parts}: the loss of {type(estimator).__name__} is a statistic of a whole minibatch, not a mean over its "
            "rows; use accumulation=1 and more minibatches."
        )

    def empty_rollout() -> Rollout:
        ts, shape, dtype = sampler.ts, sampler.shape, sampler.dtype

        def like(*axes: int):
            return jax.ShapeDtypeStruct(axes, dtype)

        interval = like(n, batch, *shape)
        t, x, pairs = like(*ts.shape), like(n + 1, batch, *shape), like(n, batch)
        return Rollout(t, x, interval, interval, interval, interval, pairs, like(batch))  # pyright: ignore[reportArgumentType]

    def init(params: Params, value_params: Params = ()) -> State:
        average = () if training.average is None else params
        copies = (params, params, value_params, average)
        params, reference, value_params, average = (placed(jax.tree.map(jnp.copy, p)) for p in copies)
        memory = layout.put(chosen.init(empty_rollout()), partial(memory_shardings, layout))
        opt, value_opt = placed(trust_region.init(params)), placed(critic.init(value_params))
        return State(params, reference, value_params, opt, value_opt, memory, average)

    def placed(tree):
        return layout.put(tree, layout.parameters)

    def divided(tree, axis):
        """Inside a program: over the devices, by samples."""
        return layout.constrain(tree, lambda tree: layout.batch(tree, axis))

    @jax.jit
    def collect(key, params, part) -> tuple[Trajectory, Float[Array, "b *x"]]:
        """Paths of one part, and their ends."""
        size = batch // training.rollouts
        keys = sample_keys(key, size, part * size)
        path = objective.exploration.trajectory(sampler, params, divided(keys, 0))
        return path._replace(x=divided(path.x, 1), noise=divided(path.noise, 1)), divided(path.x[-1], 0)

    @jax.jit(donate_argnums=0)
    def join(paths: list[Trajectory], ends, rewards):
        """The paths of an iteration, their ends and rewards, from those of its parts."""
        x, noise = (jnp.concatenate([getattr(path, name) for path in paths], axis=1) for name in ("x", "noise"))
        path = Trajectory(paths[0].t, divided(x, 1), divided(noise, 1))
        return path, *divided((jnp.concatenate(ends), jax.tree.map(lambda *v: jnp.concatenate(v), *rewards)), 0)

    @jax.jit
    def annotate(params, reference, path: Trajectory):
        """Old and reference actions, and guesses of the final state."""
        a_old, a_ref = path_actions(control, params, path), path_actions(control, reference, path)
        if not critic.value.uses_reward:
            return (*divided((a_old, a_ref, path.x[:-1]), 1), None)
        guide, action = (params, a_old) if denoise_with_policy else (reference, a_ref)
        x_hat = jax.lax.map(lambda row: objective.lookahead(sampler, guide, *row), (path.t[:-1], path.x[:-1], action))
        by_path = jnp.swapaxes(x_hat, 0, 1).reshape((batch * n,) + x_hat.shape[2:])
        return (*divided((a_old, a_ref, x_hat), 1), divided(by_path, 0))

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
        if times is not None:
            columns = times(key, sampler.ts[starts], columns)
        rows = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), columns)
        if not estimator.whole_paths:  # path by path, so that a device has whole paths
            rows = jax.tree.map(lambda v: v.reshape((rows_in_all,) + v.shape[2:]), rows)
        return divided(rows, 0), metrics

    @jax.jit
    def shuffle(key):
        """Which rows each minibatch has, `[minibatches, m]`; stratified: which of each group of `minibatches` rows."""
        if training.stratified:
            dealt = jax.vmap(lambda key: jax.random.permutation(key, minibatches), out_axes=1)
            return divided(dealt(sample_keys(key, rows_in_one)), 1)
        order = jax.random.permutation(key, rows_in_all).reshape(minibatches, -1)
        return divided(order if estimator.whole_paths else order % batch * per_path + order // batch, 1)

    @jax.jit
    def select(rows: Rows, order: Int[Array, "k m"], i) -> Rows:
        """The rows of minibatch `i`."""
        if training.stratified:
            grouped = jax.tree.map(lambda v: v.reshape((rows_in_one, minibatches) + v.shape[1:]), rows)
            return divided(jax.vmap(lambda group, j: jax.tree.map(lambda v: v[j], group))(grouped, order[i]), 0)
        return divided(jax.tree.map(lambda v: v[order[i]], rows), 0)

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
    def update(learned, reference, rows: Rows):
        """One update of policy and value on the rows of a minibatch."""
        params, value_params, opt, value_opt, average = learned
        loss = policy_loss(reference, value_params)
        if estimator.is_mean:
            loss = reduced_once(loss, layout, parts)
        new_params, opt, metrics = trust_region.minibatch(loss, params, opt, rows)
        value_params, value_opt, value_metrics = value_step(value_params, value_opt, params, reference, rows)
        if training.average is not None:
            average = optax.incremental_update(new_params, average, 1 - training.average)
        learned = (new_params, value_params, opt, value_opt, average)
        return layout.constrain(learned, layout.parameters), metrics | value_metrics

    @jax.jit(donate_argnums=0)
    def finish(params, models: Models, rows: Rows):
        params, metrics = trust_region.finish(objective, policy_loss(*models), params, rows)
        return layout.constrain(params, layout.parameters), metrics

    @jax.jit
    def judge(rollout: Rollout):
        price = jnp.sum(objective.step_prices(rollout), axis=0)
        gained = rollout.reward - jnp.sum(objective.costs(rollout), axis=0)
        return {
            "reward": jnp.mean(rollout.reward),
            "path_kl": jnp.mean(price),
            "objective": jnp.mean(gained - (objective.kl_weight * price if objective.kl_weight else 0.0)),
        }

    @jax.jit(donate_argnums=1)
    def remember(key, memory, fresh: Rollout):
        memory, rollout = chosen.update(key, memory, fresh)
        return layout.constrain((memory, rollout), partial(memory_shardings, layout))

    def step(key: Key[Array, ""], state: State) -> tuple[State, Info]:
        key_paths, key_rows = jax.random.split(layout.put(key, layout.replicated))
        behaviour = chosen.behaviour(state.params, state.reference)
        sampled = [layout.paced(collect(key_paths, behaviour, part)) for part in range(training.rollouts)]
        rewards = [evaluate_parts(reward, ends) for _, ends in sampled]
        (path, ends), (r, parts_of_r) = sampled[0], rewards[0]
        if len(sampled) > 1:
            path, ends, (r, parts_of_r) = layout.paced(join(*map(list, zip(*sampled)), rewards))
        a_old, a_ref, x_hat, guesses = layout.paced(annotate(behaviour, state.reference, path))
        r_hat = jnp.zeros((n, batch), r.dtype)
        if guesses is not None:
            r_hat = evaluate(reward, guesses).reshape(batch, n).T
        fresh = Rollout(path.t, path.x, path.noise, a_old, a_ref, x_hat, r_hat, r)
        memory, rollout = layout.paced(remember(jax.random.fold_in(key_rows, 1), state.memory, fresh))
        models = Models(state.reference, state.value_params)
        rows, metrics = layout.paced(prepare(jax.random.fold_in(key_rows, 2), models, rollout))
        shown = layout.paced(judge(fresh))
        learned = (state.params, state.value_params, state.optimizer, state.value_optimizer, state.average)
        history: list[dict[str, Any]] = []
        for k in jax.random.split(key_rows, epochs):
            order = shuffle(k)
            for i in range(minibatches):
                some = layout.paced(select(rows, order, i))
                learned, update_metrics = layout.paced(update(learned, state.reference, some))
                history.append(update_metrics)
        params, value_params, opt, value_opt, average = learned
        params, finish_metrics = layout.paced(finish(params, Models(state.reference, value_params), rows))
        metrics |= history[-1] | finish_metrics | shown | {f"reward/{name}": jnp.mean(v) for name, v in parts_of_r.items()}
        if "max_log_ratio" in history[0]:
            metrics["first_log_ratio"] = history[0]["max_log_ratio"]
        return State(params, state.reference, value_params, opt, value_opt, memory, average), Info(metrics, ends, r)

    programs = Programs(collect, annotate, remember, prepare, shuffle, select, update, finish)
    return Algorithm(init, step, _calls(objective, estimator, critic, trust_region, training, rows_in_all), programs)


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
