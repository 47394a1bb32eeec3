r"""The one loop that every algorithm is a setting of.

Per iteration: sample paths and reward them; let the critic value them; compute what the estimator needs ahead; then, over
minibatches of rows, change the policy by the estimator's loss and the value by the critic's.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from ..chunks import in_chunks
from ..critics import Critic, soft_error
from ..estimators import AbstractEstimator, Calls, Models
from ..estimators.base import require_price
from ..gradients import reduced_once
from ..objective import Objective, Rollout, Rows
from ..process import Cond, Params
from ..rewards import evaluate, evaluate_parts
from ..sampler import Trajectory, path_actions
from ..solvers import sample_keys
from ..states import AbstractStates, OnPolicy, memory_shardings, over_paths
from ..trust import AbstractTrustRegion, FirstOrder
from .training import Algorithm, Info, Programs, State, Training


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
    sampler, n = objective.sampler, objective.intervals
    estimator.check(objective, critic)
    if critic.loss is soft_error and critic.optimizer is not None:
        require_price(objective, "the soft error of a value")
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

    fixed, rest = eqx.partition((objective.sampler.control, objective.reward), _is_array)
    if not any(isinstance(v, jax.ShapeDtypeStruct) for v in jax.tree.leaves(fixed)):
        fixed = layout.put(fixed, layout.parameters)

    def bound(fixed) -> Objective:
        """The objective with the arrays of its control and reward, which programs have as arguments."""
        control, reward = eqx.combine(fixed, rest)
        return eqx.tree_at(lambda o: (o.sampler.control, o.reward), objective, (layout.gathering(control), reward))

    def conditions_of(key) -> Cond:
        return None if objective.conditions is None else objective.conditions(key, batch)

    def empty_rollout() -> Rollout:
        ts, shape, dtype = sampler.ts, sampler.shape, sampler.dtype

        def like(*axes: int):
            return jax.ShapeDtypeStruct(axes, dtype)

        interval = like(n, batch, *shape)
        t, x, pairs = like(*ts.shape), like(n + 1, batch, *shape), like(n, batch)
        cond = jax.eval_shape(conditions_of, jax.random.key(0))
        return Rollout(t, x, interval, interval, interval, interval, pairs, like(batch), cond)  # pyright: ignore[reportArgumentType]

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
    def draw(key) -> Cond:
        """The conditions of an iteration."""
        return divided(conditions_of(key), 0)

    @jax.jit
    def collect(fixed, key, params, cond, part) -> tuple[Trajectory, Float[Array, "b *x"], Cond]:
        """Paths of one part, their ends and their conditions."""
        size = batch // training.rollouts
        keys = sample_keys(key, size, part * size)
        cond = divided(jax.tree.map(lambda v: jax.lax.dynamic_slice_in_dim(v, part * size, size), cond), 0)
        path = objective.exploration.trajectory(bound(fixed).sampler, params, divided(keys, 0), cond)
        return path._replace(x=divided(path.x, 1), noise=divided(path.noise, 1)), divided(path.x[-1], 0), cond

    @jax.jit
    def annotate(fixed, params, reference, path: Trajectory, cond):
        """Old and reference actions of one part, and guesses of the final state with their conditions."""
        sampler, size = bound(fixed).sampler, path.x.shape[1]
        a_old, a_ref = (path_actions(sampler.control, p, path, cond) for p in (params, reference))
        if not critic.value.uses_reward:
            return (*divided((a_old, a_ref, path.x[:-1]), 1), None)
        guide, action = (params, a_old) if denoise_with_policy else (reference, a_ref)
        rows = (path.t[:-1], path.x[:-1], action)
        x_hat = jax.lax.map(lambda row: objective.lookahead(sampler, guide, *row, cond), rows)
        by_path = jnp.swapaxes(x_hat, 0, 1).reshape((size * n,) + x_hat.shape[2:])
        of_path = jax.tree.map(lambda v: jnp.repeat(v, n, axis=0), cond)
        return (*divided((a_old, a_ref, x_hat), 1), divided((by_path, of_path), 0))

    @jax.jit
    def join(parts: list[Rollout], rewards: list[dict[str, Any]]):
        """The paths of an iteration, their ends, and the terms of their rewards, from those of its parts."""
        whole = over_paths(lambda axis, *v: jnp.concatenate(v, axis), *parts)
        rewards = jax.tree.map(lambda *v: jnp.concatenate(v), *rewards)
        return layout.constrain(whole, partial(memory_shardings, layout)), *divided((whole.x[-1], rewards), 0)

    def at_starts(v):
        return v if len(starts) == n else v[starts]

    def signal_of(objective: Objective, models: Models, rollout: Rollout, values):
        """The estimator's signal; where it takes networks, of as many paths at a time as are sampled at a time."""
        if training.rollouts == 1 or not estimator.signal_is_of_paths:
            return estimator.signal(objective, critic, models, rollout, values)

        def of_part(paths: Rollout, values):
            part = over_paths(lambda axis, v: jnp.moveaxis(v, 0, axis), paths)._replace(t=rollout.t)
            return jnp.moveaxis(estimator.signal(objective, critic, models, part, values.T), 1, 0)

        paths = over_paths(lambda axis, v: jnp.moveaxis(v, axis, 0), rollout)._replace(t=None)  # pyright: ignore[reportArgumentType]
        return jnp.moveaxis(in_chunks(of_part, batch // training.rollouts)(paths, values.T), 0, 1)

    @jax.jit
    def prepare(fixed, key, models: Models, rollout: Rollout):
        """Values, targets and signals, as rows."""
        objective = bound(fixed)
        values = critic.values(models.value, rollout)
        target = critic.targets(objective, rollout, values)
        signal = signal_of(objective, models, rollout, values)
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
            cond=jax.tree.map(lambda v: at_starts(jnp.broadcast_to(v, (n,) + v.shape)), rollout.cond),
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

    def value_step(objective, value_params, state, params, reference, rows: Rows):
        """One update of the value on the same rows."""
        if critic.optimizer is None:
            return value_params, state, {}

        def loss(value_params):
            return estimator.value_error(objective, critic, value_params, params, reference, rows)

        error, gradient = jax.value_and_grad(loss)(value_params)
        change, state = critic.optimizer.update(gradient, state, value_params)
        return optax.apply_updates(value_params, change), state, {"value_loss": error}

    def averaged(params: Params, average: Params) -> Params:
        return average if training.average is None else optax.incremental_update(params, average, 1 - training.average)

    def policy_loss(params, rows, given):
        fixed, models = given
        return estimator.loss(bound(fixed), critic, params, models, rows)

    @jax.jit(donate_argnums=0)
    def update(learned, fixed, reference, rows: Rows):
        """One update of policy and value on the rows of a minibatch."""
        params, value_params, opt, value_opt, average = learned
        given = (fixed, Models(reference, value_params))
        loss = partial(policy_loss, given=given)
        if estimator.is_mean:
            loss = reduced_once(policy_loss, given, layout, parts)
        new_params, opt, metrics = trust_region.minibatch(loss, params, opt, rows)
        value_params, value_opt, value_metrics = value_step(bound(fixed), value_params, value_opt, params, reference, rows)
        if not trust_region.once:
            average = averaged(new_params, average)
        learned = (new_params, value_params, opt, value_opt, average)
        return layout.constrain(learned, layout.parameters), metrics | value_metrics

    @jax.jit(donate_argnums=0)
    def sweep(learned, fixed, reference, rows: Rows, order: Int[Array, "k m"]):
        """The updates on all minibatches of a pass, one after the other; metrics of the first and of the last."""

        def one(learned, i):
            return update(learned, fixed, reference, select(rows, order, i))

        learned, metrics = jax.lax.scan(one, learned, jnp.arange(minibatches))
        return learned, [{name: v[i] for name, v in metrics.items()} for i in (0, -1)]

    @jax.jit(donate_argnums=0)
    def finish(policy, fixed, models: Models, rows: Rows):
        """The update on all rows, of a trust region that makes one, of the parameters and their average."""
        params, average = policy
        loss = partial(policy_loss, given=(fixed, models))
        params, metrics = trust_region.finish(bound(fixed), loss, params, rows, layout, parts)
        if trust_region.once:
            average = averaged(params, average)
        return layout.constrain((params, average), layout.parameters), metrics

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

    judge_of_paths = eqx.combine(fixed, rest)[1]

    def judged(path: Trajectory, ends, cond, annotated) -> tuple[Rollout, dict[str, Any]]:
        """A part with its rewards, and the terms that they are sums of."""
        r, terms = evaluate_parts(judge_of_paths, ends, cond)
        a_old, a_ref, x_hat, guesses = annotated
        r_hat = jnp.zeros((n, len(ends)), r.dtype)
        if guesses is not None:
            r_hat = evaluate(judge_of_paths, *guesses).reshape(-1, n).T
        return Rollout(path.t, path.x, path.noise, a_old, a_ref, x_hat, r_hat, r, cond), terms

    def step(key: Key[Array, ""], state: State) -> tuple[State, Info]:
        key_paths, key_rows = jax.random.split(layout.put(key, layout.replicated))
        behaviour = chosen.behaviour(state.params, state.reference)
        cond = layout.paced(draw(jax.random.fold_in(key_rows, 3)))
        sampled = []
        for part in range(training.rollouts):
            path, ends, of_part = layout.paced(collect(fixed, key_paths, behaviour, cond, part))
            sampled.append((path, ends, of_part, layout.paced(annotate(fixed, behaviour, state.reference, path, of_part))))
        found, ends = [judged(*part) for part in sampled], sampled[0][1]
        del sampled  # the parts are free
        fresh, terms = found[0]
        if len(found) > 1:
            fresh, ends, terms = layout.paced(join(*map(list, zip(*found))))
        del found
        memory, rollout = layout.paced(remember(jax.random.fold_in(key_rows, 1), state.memory, fresh))
        models = Models(state.reference, state.value_params)
        rows, metrics = layout.paced(prepare(fixed, jax.random.fold_in(key_rows, 2), models, rollout))
        shown = layout.paced(judge(fresh))
        learned = (state.params, state.value_params, state.optimizer, state.value_optimizer, state.average)
        history: list[dict[str, Any]] = []
        for k in jax.random.split(key_rows, epochs):
            order = shuffle(k)
            if training.scan_minibatches:
                learned, ends_of_pass = layout.paced(sweep(learned, fixed, state.reference, rows, order))
                history += ends_of_pass
            else:
                for i in range(minibatches):
                    some = layout.paced(select(rows, order, i))
                    learned, update_metrics = layout.paced(update(learned, fixed, state.reference, some))
                    history.append(update_metrics)
        params, value_params, opt, value_opt, average = learned
        (params, average), finish_metrics = layout.paced(
            finish((params, average), fixed, Models(state.reference, value_params), rows)
        )
        metrics |= history[-1] | finish_metrics | shown | {f"reward/{name}": jnp.mean(v) for name, v in terms.items()}
        if "max_log_ratio" in history[0]:
            metrics["first_log_ratio"] = history[0]["max_log_ratio"]
        return State(params, state.reference, value_params, opt, value_opt, memory, average), Info(
            metrics, ends, fresh.reward, cond
        )

    programs = Programs(draw, collect, annotate, join, remember, prepare, shuffle, select, update, sweep, finish)
    calls = _calls(objective, estimator, critic, trust_region, training, rows_in_all)
    return Algorithm(init, step, calls, programs, fixed, training.rollouts, training.scan_minibatches)


def _is_array(v: Any) -> bool:
    return isinstance(v, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


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
