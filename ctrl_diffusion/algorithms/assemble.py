"""The middle of an iteration: values and targets of all transitions, and the division of transitions into minibatches."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ..chunks import in_chunks
from ..estimators import Models
from ..objective import Objective
from ..rollout import Rollout, Transitions, over_paths
from ..solvers import sample_keys
from .recipe import Division, Recipe

Metrics = dict[str, Float[Array, ""]]


def prepare(
    recipe: Recipe, fixed: Any, key: Key[Array, ""], models: Models, kl_weight: Any, rollout: Rollout
) -> tuple[Transitions, Metrics]:
    """Transitions with the targets of value and policy. They are ordered path by path, so that every device has whole paths."""
    objective, critic, training, starts = recipe.bound(fixed, kl_weight), recipe.critic, recipe.training, recipe.starts
    values = critic.values(models.value, rollout)
    target = critic.targets(objective, rollout, values)
    policy_target = _policy_target(recipe, objective, models, rollout, values)
    n, batch = values.shape[0] - 1, values.shape[1]
    read = recipe.estimator.fields(objective).transitions
    columns: dict[str, Any] = {"j": jnp.broadcast_to(jnp.arange(n)[:, None], (n, batch)), "x": rollout.x[:-1]}
    columns |= {"weight": jnp.ones((n, batch), target.dtype)}
    columns |= {name: getattr(rollout, name) for name in ("noise", "a_old", "a_ref") if name in read}
    columns |= {"x_next": rollout.x[1:]} if "x_next" in read else {}
    columns |= {"x_hat": rollout.x_hat, "r_hat": rollout.r_hat, "value_target": target} if recipe.learns_value else {}
    columns |= {"cond": jax.tree.map(lambda v: jnp.broadcast_to(v, (n,) + v.shape), rollout.cond)}
    some = columns if len(starts) == n else jax.tree.map(lambda v: v[starts], columns)
    transitions = Transitions(**some, policy_target=policy_target)
    metrics = {} if policy_target is None else {"policy_target_std": jnp.std(policy_target)}
    if recipe.learns_value:
        residual = jnp.var(target - values[:-1]) / jnp.maximum(jnp.var(target), jnp.finfo(target.dtype).tiny)
        metrics["value_explained_variance"] = 1 - residual
    if training.times is not None:
        transitions = training.times(key, objective.sampler.ts[starts], transitions)
    transitions = jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), transitions)
    if not recipe.estimator.whole_paths:
        transitions = jax.tree.map(lambda v: v.reshape((recipe.transitions,) + v.shape[2:]), transitions)
    return transitions, metrics


def _policy_target(recipe: Recipe, objective: Objective, models: Models, rollout: Rollout, values: Float[Array, "K b"]) -> Any:
    """The policy target. If it evaluates networks, it is computed for as many paths at a time as are sampled at a time."""
    estimator, critic = recipe.estimator, recipe.critic
    if recipe.training.rollouts == 1 or not estimator.policy_target_is_of_paths:
        return estimator.policy_target(objective, critic, models, rollout, values)

    def of_part(paths: Rollout, values):
        part = over_paths(lambda axis, v: jnp.moveaxis(v, 0, axis), paths)._replace(t=rollout.t)
        policy_target = estimator.policy_target(objective, critic, models, part, values.T)
        assert policy_target is not None  # of estimators that treat paths independently
        return jnp.moveaxis(policy_target, 1, 0)

    paths = over_paths(lambda axis, v: jnp.moveaxis(v, axis, 0), rollout)._replace(t=None)  # pyright: ignore[reportArgumentType]
    return jnp.moveaxis(in_chunks(of_part, recipe.paths_of_a_part)(paths, values.T), 0, 1)


def shuffle(division: Division, key: Key[Array, ""]) -> Int[Array, "minibatches m"]:
    """The transitions of each minibatch, as indices; if stratified, the index within each group of `minibatches` transitions."""
    batch, minibatches, transitions = division.batch, division.minibatches, division.transitions
    if division.stratified:
        dealt = jax.vmap(lambda key: jax.random.permutation(key, minibatches), out_axes=1)
        return dealt(sample_keys(key, transitions // minibatches))
    order = jax.random.permutation(key, transitions).reshape(minibatches, -1)
    return order if division.whole_paths else order % batch * division.of_a_path + order // batch


def select(division: Division, transitions: Transitions, order: Int[Array, "minibatches m"], i: Any) -> Transitions:
    """The transitions of minibatch `i`."""
    if not division.stratified:
        return jax.tree.map(lambda v: v[order[i]], transitions)
    groups = (division.transitions // division.minibatches, division.minibatches)
    grouped = jax.tree.map(lambda v: v.reshape(groups + v.shape[1:]), transitions)
    return jax.vmap(lambda group, j: jax.tree.map(lambda v: v[j], group))(grouped, order[i])
