"""The first half of an iteration: sample paths, annotate them with actions, compute their rewards, and store them for replay."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ..process import Cond, Params
from ..rewards import Reward, compute_reward_terms, compute_rewards
from ..rollout import Rollout, over_paths
from ..sampler import Trajectory, path_actions
from ..solvers import sample_keys
from .recipe import Recipe, Sampling


class Keys(NamedTuple):
    """Random keys of an iteration. Each is used for one purpose only."""

    paths: Key[Array, ""]
    shuffles: list[Key[Array, ""]]
    conditions: Key[Array, ""]
    replay: Key[Array, ""]
    times: Key[Array, ""]


class Annotated(NamedTuple):
    """Paths that wait for their rewards. The fields of `paths` that a `Trajectory` has are still `None`.

    Attributes:
        paths: penalties, log-ratios and actions.
        ends: final states.
        x0_predictions: the x0 predictions to compute rewards of, path by path, with the conditions of their paths; `None` if the
            value uses no such reward.
    """

    paths: Rollout
    ends: Float[Array, "b *x"]
    x0_predictions: tuple[Float[Array, "bn *x"], Cond] | None


def split_keys(epochs: int, key: Key[Array, ""]) -> Keys:
    """Split the key of an iteration."""
    paths, shuffles, *others = jax.random.split(key, 5)
    return Keys(paths, list(jax.random.split(shuffles, epochs)), *others)


def draw(recipe: Recipe, key: Key[Array, ""]) -> Cond:
    """Draw the conditions of an iteration."""
    return recipe.conditions(key)


def sample(
    sampling: Sampling, fixed: Any, key: Key[Array, ""], params: Params, cond: Cond, part: Any
) -> tuple[Trajectory, Cond]:
    """Sample the paths of one part; returns them with their conditions."""
    size, layout = sampling.size, sampling.layout
    keys = layout.constrain(sample_keys(key, size, part * size), layout.batch)
    cond = layout.constrain(jax.tree.map(lambda v: jax.lax.dynamic_slice_in_dim(v, part * size, size), cond), layout.batch)
    return sampling.exploration.trajectory(sampling.bound(fixed), params, keys, cond), cond


def annotate(recipe: Recipe, fixed: Any, params: Params, reference: Params, path: Trajectory, cond: Cond) -> Annotated:
    """Compute old and reference actions, penalties, log-ratios and x0 predictions of one part. Fields that nothing reads are dropped."""
    sampler, objective, value = recipe.bound(fixed, 0.0).sampler, recipe.objective, recipe.critic.value
    a_old, a_ref = (path_actions(sampler.control, p, path, cond) for p in (params, reference))
    x_hat = x0_predictions = None
    if value.uses_reward:
        guide, action = (params, a_old) if recipe.denoise_with_policy else (reference, a_ref)
        times = (path.t[:-1], path.x[:-1], action)
        x_hat = jax.lax.map(lambda at_time: objective.x0_prediction(sampler, guide, *at_time, cond), times)
        n, size = x_hat.shape[:2]
        by_path = jnp.swapaxes(x_hat, 0, 1).reshape((size * n,) + x_hat.shape[2:])
        x0_predictions = by_path, jax.tree.map(lambda v: jnp.repeat(v, n, axis=0), cond)
    penalty, log_ratio = objective.step_penalties(a_old, a_ref), objective.step_log_ratios(a_old, a_ref, path.noise)
    kept = {name: v for name, v in {"a_old": a_old, "a_ref": a_ref}.items() if name in recipe.declared}
    x_hat = x_hat if value.uses_x_hat else None
    paths = Rollout(None, None, None, penalty, log_ratio, x_hat=x_hat, cond=cond, **kept)  # pyright: ignore[reportArgumentType]
    return Annotated(paths, path.x[-1], x0_predictions)


def reward(recipe: Recipe, fixed: Any, path: Trajectory, annotated: Annotated) -> tuple[Rollout, dict[str, Any]]:
    """Compute the rewards of one part, and the terms of a weighted sum. Not a compiled program: a reward may run on the host."""
    reward_fn: Reward = recipe.bound(fixed, 0.0).reward
    paths, ends, x0_predictions = _recorded(recipe, path, annotated)
    r, terms = compute_reward_terms(reward_fn, ends, paths.cond)
    r_hat = (
        None
        if x0_predictions is None
        else compute_rewards(reward_fn, *x0_predictions).reshape(-1, recipe.objective.intervals).T
    )
    return paths._replace(reward=r, r_hat=r_hat), terms


def reward_shapes(recipe: Recipe, fixed: Any, path: Trajectory, annotated: Annotated) -> tuple[Rollout, dict[str, Any]]:
    """The shapes that `reward` returns, from the shapes of its arguments."""
    paths, ends, x0_predictions = _recorded(recipe, path, annotated)
    r = jax.ShapeDtypeStruct(ends.shape[:1], ends.dtype)
    r_hat = None if x0_predictions is None else jax.ShapeDtypeStruct(paths.penalty.shape, ends.dtype)
    return paths._replace(reward=r, r_hat=r_hat), {part.name: r for _, part in recipe.objective.reward.parts}  # pyright: ignore[reportArgumentType]


def _recorded(recipe: Recipe, path: Trajectory, annotated: Annotated) -> Annotated:
    """Fill in the states, and the noise if something reads it."""
    noise = path.noise if "noise" in recipe.declared else None
    return annotated._replace(paths=annotated.paths._replace(t=path.t, x=path.x, noise=noise))


def join(recipe: Recipe, parts: list[Rollout], terms: list[dict[str, Any]]) -> tuple[Rollout, dict[str, Any]]:
    """Join the parts: all paths of an iteration, and the terms of their rewards."""
    whole = over_paths(lambda axis, *v: jnp.concatenate(v, axis), *parts)
    return whole, jax.tree.map(lambda *v: jnp.concatenate(v), *terms)


def remember(recipe: Recipe, key: Key[Array, ""], buffer: Any, fresh: Rollout) -> tuple[Any, Rollout]:
    """Store the fresh paths; returns the new buffer and the paths to train on."""
    return recipe.behaviour.update(key, buffer, fresh)


def empty_buffer(recipe: Recipe) -> Any:
    """An empty replay buffer for paths with the fields that the recipe's parts read."""
    sampler, training = recipe.objective.sampler, recipe.training
    ts, n, b = sampler.ts, recipe.objective.intervals, training.batch

    def like(*axes: int) -> Any:
        return jax.ShapeDtypeStruct(axes, sampler.dtype)

    states, interval, value = like(n + 1, b, *sampler.shape), like(n, b, *sampler.shape), recipe.critic.value
    cond = jax.eval_shape(recipe.conditions, jax.random.key(0))
    return recipe.behaviour.init(
        Rollout(
            like(*ts.shape), states, like(b), like(n, b), like(n, b),
            **{name: interval for name in ("noise", "a_old", "a_ref") if name in recipe.declared},
            x_hat=interval if value.uses_reward and value.uses_x_hat else None,
            r_hat=like(n, b) if value.uses_reward else None, cond=cond,
        )
    )  # fmt: skip
