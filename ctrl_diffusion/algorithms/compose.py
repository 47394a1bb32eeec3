"""Composes algorithms from parts. Every algorithm is a recipe for the same iteration, `iteration.iterate`."""

from typing import Any

import jax
import jax.numpy as jnp

from ..critics import Critic
from ..estimators import AbstractEstimator
from ..objective import Objective
from ..process import Params
from ..replay import AbstractBehaviour, OnPolicy
from .collect import empty_buffer
from .iteration import iterate
from .programs import make_programs, running, state_axes
from .recipe import Recipe
from .training import Algorithm, Info, Learned, State, Training


def compose(
    objective: Objective,
    estimator: AbstractEstimator,
    critic: Critic,
    training: Training,
    *,
    behaviour: AbstractBehaviour | None = None,
    denoise_with_policy: bool = False,
) -> Algorithm:
    r"""An algorithm from its parts.

    Args:
        objective: the objective, which is defined on the chain of its sampler.
        estimator: the estimator of the policy gradient.
        critic: the value of a state, and how it is learned.
        training: batch, passes, optimisers and trust region.
        behaviour: the paths to train on (default: the policy's own, `OnPolicy()`).
        denoise_with_policy: compute `x_hat` of the value from the policy's score, not from the reference's. A posterior mean divides
            the score by `alpha`. Near the noise end a slight change of the policy therefore moves its `x_hat` without bound.

    Raises:
        ValueError: if parts do not go together; the message names them.
    """
    recipe = Recipe(objective, estimator, critic, training, behaviour or OnPolicy(), denoise_with_policy)
    recipe.check()
    layout, fixed, programs = training.layout, recipe.fixed(), make_programs(recipe)

    def init(params: Params, value_params: Params = ()) -> State:
        _check_value_params(recipe, value_params)
        params, reference = (jax.tree.map(jnp.copy, params) for _ in range(2))
        average = () if training.average is None else jax.tree.map(jnp.copy, params)
        value_params = jax.tree.map(jnp.copy, value_params)
        value_optimizer = training.value.init(value_params) if recipe.learns_value and training.value is not None else ()
        learned = Learned(params, value_params, recipe.trust_region.init(params), value_optimizer, average)
        kl_weight = jnp.asarray(objective.kl_weight, objective.sampler.dtype)
        state = State(learned, reference, empty_buffer(recipe), kl_weight)
        return layout.put(state, lambda state: layout.shardings(state_axes(recipe), state))

    def step(key: Any, state: Any) -> tuple[State, Info]:
        _check_call(key, state)
        key = layout.put(key, layout.replicated)
        return iterate(running(programs, layout), recipe, fixed, key, state)

    return Algorithm(init, step, fixed, recipe, programs)


def _check_call(key: Any, state: Any) -> None:
    """Refuse arguments of `step` that JAX would refuse in words of its own."""
    if not isinstance(state, State):
        raise TypeError(
            f"state is a {type(state).__name__}: pass what init returned, or the first of the two that step returned."
        )
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(state)):
        raise ValueError(
            "state was given to step before, which wrote the next state into its memory: pass the state that step returned, or a copy "
            "made before (jax.tree.map(jnp.copy, state))."
        )
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()):
        about = f"{key.dtype} of shape {key.shape}" if isinstance(key, jax.Array) else type(key).__name__
        raise TypeError(
            f"key is {about}: pass one key, such as jax.random.key(0) or jax.random.fold_in(key, iteration); one of "
            "jax.random.PRNGKey as jax.random.wrap_key_data(key)."
        )


def _check_value_params(recipe: Recipe, value_params: Any) -> None:
    """Refuse parameters of a value that no optimiser changes, and a value optimiser without parameters."""
    value, given = type(recipe.critic.value).__name__, bool(jax.tree.leaves(value_params))
    if recipe.critic.learns and recipe.training.value is None and given:
        raise ValueError(
            f"Training(value=None): the parameters of {value} would never be learned. Give an optimiser, such as "
            "Training(value=optax.adam(1e-3)), or keep them fixed on purpose: Critic(..., frozen=True)."
        )
    if recipe.learns_value and not given:
        raise ValueError(
            f"value_params is empty, but Training(value=...) is to learn the parameters of {value}: call init(params, value_params), or "
            "wrap a value without parameters in ctrl_diffusion.GivenValue."
        )
