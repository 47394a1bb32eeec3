"""The last part of an iteration: updates of policy and value on minibatches, and the update of a trust region on all transitions."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ..critics import soft_error
from ..estimators import Models
from ..estimators.base import per_path
from ..gradients import Loss, each_in_parts, mean_over_batch, reduced_once
from ..parallel import PARAMETERS
from ..process import Params
from ..rollout import Rollout, Transitions
from .assemble import select
from .recipe import Recipe
from .training import Learned

Metrics = dict[str, Float[Array, ""]]


def update(
    recipe: Recipe, learned: Learned, fixed: Any, reference: Params, kl_weight: Any, transitions: Transitions
) -> tuple[Learned, Metrics]:
    """One update of policy and value on the transitions of a minibatch, in `accumulation` microbatches each."""
    loss = policy_loss(recipe, (fixed, Models(reference, learned.value_params), kl_weight))
    params, optimizer, metrics = recipe.trust_region.minibatch(loss, learned.params, learned.optimizer, transitions)
    value_params, value_optimizer, value_metrics = value_step(recipe, learned, fixed, reference, kl_weight, transitions)
    average = learned.average if recipe.trust_region.once else averaged(recipe, params, learned.average)
    found = Learned(params, value_params, optimizer, value_optimizer, average)
    return recipe.layout.constrain(found, partial(recipe.layout.shardings, PARAMETERS)), metrics | value_metrics


def sweep(
    recipe: Recipe,
    learned: Learned,
    fixed: Any,
    reference: Params,
    kl_weight: Any,
    transitions: Transitions,
    order: Int[Array, "k m"],
) -> tuple[Learned, list[Metrics]]:
    """All updates of a pass, one minibatch after the other; returns metrics of the first and of the last."""

    def one(learned: Learned, i) -> tuple[Learned, Metrics]:
        some = recipe.layout.constrain(select(recipe.division, transitions, order, i), recipe.layout.batch)
        return update(recipe, learned, fixed, reference, kl_weight, some)

    learned, metrics = jax.lax.scan(one, learned, jnp.arange(recipe.training.minibatches))
    return learned, [{name: v[i] for name, v in metrics.items()} for i in (0, -1)]


def finish(
    recipe: Recipe, learned: Learned, fixed: Any, reference: Params, kl_weight: Any, transitions: Transitions
) -> tuple[Learned, Metrics]:
    """The update on all transitions, for a trust region that makes one (`once`)."""
    given, objective = (fixed, Models(reference, learned.value_params), kl_weight), recipe.bound(fixed, kl_weight)
    loss = partial(_loss, recipe, given=given)
    parts = recipe.training.accumulation
    params, metrics = recipe.trust_region.finish(objective, loss, learned.params, transitions, recipe.layout, parts)
    return learned._replace(params=params, average=averaged(recipe, params, learned.average)), metrics


def summarise(
    recipe: Recipe, kl_weight: Any, fresh: Rollout, terms: dict[str, Any]
) -> tuple[Any, Float[Array, "b *x"], Metrics]:
    """The temperature of the next iteration, the final states, and mean reward, path KL and objective of the fresh paths.

    The path KL is NaN if the exploration has no likelihood.
    """
    penalty = jnp.sum(fresh.penalty, axis=0)
    gained = fresh.reward - jnp.sum(recipe.objective.costs(fresh), axis=0)
    paid = kl_weight * penalty if recipe.objective.penalised else 0.0
    path_kl = jnp.where(recipe.objective.exploration.has_likelihood, jnp.mean(penalty), jnp.nan)
    metrics = {"reward": jnp.mean(fresh.reward), "path_kl": path_kl, "objective": jnp.mean(gained - paid)}
    metrics |= {f"reward/{name}": jnp.mean(v) for name, v in terms.items()}
    if recipe.training.kl_target is not None:
        metrics["kl_weight"] = kl_weight
        kl_weight = recipe.training.kl_target(kl_weight, metrics["path_kl"])
    return kl_weight, fresh.x[-1], metrics


def policy_loss(recipe: Recipe, given: Any) -> Loss:
    """The estimator's loss `(params, transitions) -> (loss, metrics)`; its gradient is computed in microbatches and reduced once."""
    layout, parts = recipe.layout, recipe.training.accumulation
    if recipe.estimator.is_mean:
        return reduced_once(partial(_loss, recipe), given, layout, parts)
    if parts == 1:
        return partial(_loss, recipe, given=given)

    def loss(params: Params, transitions: Transitions) -> tuple[Float[Array, ""], Metrics]:
        """First all residuals; then the gradient of the statistic, as a mean of residuals weighted by its derivatives."""
        residual = each_in_parts(partial(_residual, recipe, params, given), transitions, layout, parts)
        statistic = partial(recipe.estimator.statistic, recipe.bound(given[0], given[2]))
        (value, metrics), slope = jax.value_and_grad(statistic, has_aux=True)(residual, transitions)
        weighted = reduced_once(partial(_weighted_residual, recipe), given, layout, parts)
        mean, _ = weighted(params, (transitions, slope * len(slope)))
        return value + mean - jax.lax.stop_gradient(mean), metrics

    return loss


def value_step(
    recipe: Recipe, learned: Learned, fixed: Any, reference: Params, kl_weight: Any, transitions: Transitions
) -> tuple[Params, Any, Metrics]:
    """One update of the value on the same transitions."""
    value_params, state = learned.value_params, learned.value_optimizer
    if not recipe.learns_value:
        return value_params, state, {}
    layout, parts, optimizer = recipe.layout, recipe.training.accumulation, recipe.training.value
    assert optimizer is not None
    given = (fixed, learned.params, reference, kl_weight, None)
    if recipe.critic.loss is soft_error and (parts > 1 or layout.mesh is not None):
        largest = mean_over_batch(partial(_largest_exponent, recipe), layout, parts)(value_params, transitions, given)
        given = (*given[:-1], largest["max_exponent"])
    loss = reduced_once(partial(_value_loss, recipe), given, layout, parts)
    (error, _), gradient = jax.value_and_grad(loss, has_aux=True)(value_params, transitions)
    change, state = optimizer.update(gradient, state, value_params)
    return optax.apply_updates(value_params, change), state, {"value_loss": error}


def averaged(recipe: Recipe, params: Params, average: Params) -> Params:
    """The running average of the policy's parameters after an update."""
    decay = recipe.training.average
    return average if decay is None else optax.incremental_update(params, average, 1 - decay)


def _loss(recipe: Recipe, params: Params, transitions: Transitions, given: Any) -> tuple[Float[Array, ""], Metrics]:
    fixed, models, kl_weight = given
    return recipe.estimator.loss(recipe.bound(fixed, kl_weight), recipe.critic, params, models, transitions)


def _residual(recipe: Recipe, params: Params, given: Any, transitions: Transitions) -> Float[Array, " m"]:
    fixed, models, kl_weight = given
    return recipe.estimator.residual(recipe.bound(fixed, kl_weight), recipe.critic, params, models, transitions)


def _weighted_residual(recipe: Recipe, params: Params, weighted: Any, given: Any) -> tuple[Float[Array, ""], Metrics]:
    transitions, weight = weighted
    return jnp.mean(weight * _residual(recipe, params, given, transitions)), {}


def _value_loss(recipe: Recipe, value_params: Params, transitions: Transitions, given: Any) -> tuple[Float[Array, ""], Metrics]:
    fixed, params, reference, kl_weight, largest = given
    objective = recipe.bound(fixed, kl_weight)
    return recipe.estimator.value_error(objective, recipe.critic, value_params, params, reference, transitions, largest), {}


def _largest_exponent(recipe: Recipe, value_params: Params, transitions: Transitions, given: Any) -> Metrics:
    fixed, _, _, kl_weight, _ = given
    flat = per_path(transitions)[0] if recipe.estimator.whole_paths else transitions
    return {"max_exponent": recipe.critic.largest_exponent(value_params, recipe.bound(fixed, kl_weight), flat)}
