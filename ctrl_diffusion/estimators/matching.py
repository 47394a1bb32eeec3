r"""Gradients by regression: the action is matched to the maximiser of the Hamiltonian, computed from a gradient of the value.

    a_target(t_j, x_j) = a_ref + w_j std_j^2 / (lambda psi_j) g_j,      loss = lambda sum_j E |scale_j (a_theta - a_target)|^2 / 2,

`g_j` estimates `grad V(t_{j+1}, x_{j+1})`. For short steps the factor tends to `w G^2 / (lambda B)`, which is `w c / (2 lambda k)`.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..critics import Critic
from ..exploration import shift
from ..objective import Objective
from ..predictions import expand
from ..process import Params
from ..rollout import EVERY_FIELD, Fields, Rollout, Transitions
from .base import AbstractEstimator, Calls, Metrics, Models, require_differentiable, require_kl_weight
from .pathwise import Credit, undiscounted

Gradient = Callable[[Objective, Critic, Models, Rollout], Float[Array, "n b *x"]]


class LeanAdjoint(eqx.Module):
    r"""`g_j = a_{j+1}`, with `a_n = grad r(x_n)` and `a_j = D_x(x + reference step)^T b_j - grad f(t_j, x_j) dt_j`.

    This is the adjoint of the *reference* chain along the policy's paths: Domingo-Enrich et al. 2025, eq. 38 to 40 ("lean"). Deviation:
    the derivative is that of the sampler's own step, not an Euler step of the adjoint's equation.

    As published `b_j = a_{j+1}`. It has no bias, but where paths choose between modes its noise is heavy-tailed and many times the mean.
    A finite `horizon` bootstraps, as `LikelihoodRatio(horizon)` does for returns: `b_j = (1 - mu_j) h_j + mu_j a_{j+1}` with
    `mu_j = exp(-dt_j / horizon)`. Here `h_j = lambda psi_j / std_j^2 (a_old - a_ref)(t_j, x_j)` is the sampling policy's own estimate of
    the mean of `a_{j+1}` given `x_j`. At the optimum `h_j` equals that mean, so the fixed point is the same for every horizon.

    Args:
        horizon: decay time, control time; `inf` is the published method.
    """

    horizon: float = eqx.field(static=True, default=float("inf"))

    def __check_init__(self):
        if not self.horizon > 0:
            raise ValueError(f"horizon={self.horizon} must be positive: it is a time; use inf for the adjoint as published.")

    def __call__(self, objective: Objective, critic: Critic, models: Models, rollout: Rollout) -> Float[Array, "n b *x"]:
        step, dt = objective.sampler.transitions(), jnp.diff(rollout.t)
        process, control = objective.sampler.process, objective.sampler.control
        published, expected = self.horizon == float("inf"), None
        if not published:
            expected = (rollout.a_old - rollout.a_ref) / expand(pull_to_action(objective), rollout.a_old)

        def backward(adjoint, at_time):
            t, x, phi, psi, h, mean, keep = at_time
            _, vjp = jax.vjp(lambda x: phi * x + psi * control(models.reference, t, x, rollout.cond), x)
            cost = jax.grad(lambda x: h * jnp.sum(process.running_cost(t, x)))(x)
            return vjp(adjoint if published else mean + keep * (adjoint - mean))[0] - cost, adjoint

        end = jax.grad(lambda x: jnp.sum(objective.reward(x, rollout.cond)))(rollout.x[-1])
        times = (rollout.t[:-1], rollout.x[:-1], step.phi, step.psi, dt, expected, jnp.exp(-dt / self.horizon))
        return jax.lax.scan(backward, end, times, reverse=True)[1]


def pull_to_action(objective: Objective) -> Float[Array, " n"]:
    """`std_j^2 / (lambda psi_j)`: the factor from the gradient of the value at the end of a step to the change of its action."""
    step = objective.sampler.transitions()
    return step.std**2 / (objective.kl_weight * step.psi)


def value_gradient(objective: Objective, critic: Critic, models: Models, rollout: Rollout) -> Float[Array, "n b *x"]:
    """`grad V(t_{j+1}, x_{j+1})` of the critic."""

    def gradient(tx):
        t, x = tx
        return jax.grad(lambda x: jnp.sum(critic(models.value, objective, models.reference, t, x, rollout.cond)))(x)

    return jax.lax.map(gradient, (rollout.t[1:], rollout.x[1:]))


class Matching(AbstractEstimator):
    """Regresses the action on `a_ref + w std^2 / (lambda psi) g`; the module's docstring has the loss.

    Args:
        gradient: `g`, `(objective, critic, models, rollout) -> [n, b, *x]`: `LeanAdjoint()` or `value_gradient`.
        credit: weights `w` `[n]`.
    """

    gradient: Gradient = eqx.field(static=True, default=LeanAdjoint())
    credit: Credit = eqx.field(static=True, default=undiscounted)
    whole_paths: bool = eqx.field(static=True, default=False, init=False)

    def check(self, objective: Objective, critic: Critic) -> None:
        require_kl_weight(objective, "matching")
        if isinstance(self.gradient, LeanAdjoint) or critic.value.uses_reward:
            require_differentiable(objective, "the gradient of the value")
        if not bool(jnp.all(objective.sampler.transitions().std > 0)):
            raise ValueError(
                "matching regresses on std^2 / (lambda psi) grad V, and a step of this chain has no noise (std=0): use eta > 0."
            )

    @property
    def policy_target_is_of_paths(self) -> bool:
        return True

    def fields(self, objective: Objective) -> Fields:
        if isinstance(self.gradient, LeanAdjoint) and self.gradient.horizon < float("inf"):
            return Fields(frozenset({"a_ref", "a_old"}))
        known = isinstance(self.gradient, LeanAdjoint) or self.gradient is value_gradient
        return Fields(frozenset({"a_ref"}) if known else EVERY_FIELD.paths)

    def policy_target_calls(self, critic: Critic) -> Calls:
        """One derivative of the reference, for the adjoint or inside the value, and one reward inside the value."""
        inside = critic.value.uses_reward
        return Calls(gradient=int(isinstance(self.gradient, LeanAdjoint) or inside), reward=int(inside))

    def policy_target(self, objective: Objective, critic: Critic, models: Models, rollout: Rollout, values):
        """Target actions."""
        factor = self.credit(objective) * pull_to_action(objective)
        g = self.gradient(objective, critic, models, rollout)
        return rollout.a_ref + expand(factor, g) * g

    def loss(self, objective: Objective, critic: Critic, params: Params, models: Models, transitions: Transitions):
        a = objective.control(params, transitions.j, transitions.x, transitions.cond)
        z = shift(objective.scales[transitions.j], a, transitions.policy_target)
        error = 0.5 * jnp.sum(z**2, axis=tuple(range(1, z.ndim)))
        error = objective.intervals * jnp.mean(transitions.weight * error)
        metrics: Metrics = {"matching_error": error}
        return objective.kl_weight * error, metrics


class GradientBalance(AbstractEstimator):
    r"""Residual nabla-detailed-balance: `V(t', x') - V(t, x) = lambda log (pi_theta / pi_ref)(x' | x)`, differentiated.

    The derivative in `x'` (*forward*) determines the policy given the value: it is matching with `grad V(t', x')`. The derivative in `x`
    (*reverse*) determines the value given the policy, and replaces the regression on returns as the value's loss:

        grad V(t, x) = -lambda grad_x [log pi_theta - log pi_ref](x' | x) - grad_x cost_j.

    Liu et al. 2025, eq. 14 to 18, in terms of a scalar value whose gradient is the residual flow's score.
    """

    whole_paths: bool = eqx.field(static=True, default=False, init=False)

    def fields(self, objective: Objective) -> Fields:
        return Fields(transitions=frozenset({"x_next", "a_ref"}))

    def check(self, objective: Objective, critic: Critic) -> None:
        Matching(value_gradient).check(objective, critic)
        require_differentiable(objective, "the gradient of the value at the end")

    def loss_calls(self, objective: Objective, critic: Critic) -> Calls:
        """The policy; the value's gradient at both ends; the derivatives of policy and reference in the reverse residual."""
        return Calls(gradient=3 + 2 * int(critic.value.uses_reward), reward=2)

    def loss(self, objective: Objective, critic: Critic, params: Params, models: Models, transitions: Transitions):
        t_next = objective.sampler.ts[transitions.j + 1]
        g = jax.grad(lambda x: jnp.sum(critic(models.value, objective, models.reference, t_next, x, transitions.cond)))(
            transitions.x_next
        )
        target = transitions.a_ref + expand(pull_to_action(objective)[transitions.j], g) * g
        return Matching().loss(objective, critic, params, models, transitions._replace(policy_target=target))

    def value_error(
        self,
        objective: Objective,
        critic: Critic,
        value_params: Params,
        params: Params,
        reference: Params,
        transitions: Transitions,
        largest: Float[Array, ""] | None = None,
    ) -> Float[Array, ""]:
        """Mean of `|grad V(t, x) + lambda grad_x log (pi_theta / pi_ref)(x' | x) + grad cost|^2 / 2`, summed over dimensions."""
        phi, psi, std = (expand(v[transitions.j], transitions.x) for v in objective.sampler.transitions())

        def log_ratio_of(x):
            def squared(p):
                a = objective.control(p, transitions.j, x, transitions.cond)
                return ((transitions.x_next - phi * x - psi * a) / std) ** 2

            return -0.5 * jnp.sum(squared(params) - squared(reference))

        t, t_next = objective.sampler.ts[transitions.j], objective.sampler.ts[transitions.j + 1]
        cost = jax.grad(lambda x: jnp.sum((t_next - t) * objective.sampler.process.running_cost(t, x)))(transitions.x)
        pull = objective.kl_weight * jax.lax.stop_gradient(jax.grad(log_ratio_of)(transitions.x)) + cost
        g = jax.grad(lambda x: jnp.sum(critic(value_params, objective, reference, t, x, transitions.cond)))(transitions.x)
        return 0.5 * jnp.mean(jnp.sum((g + pull) ** 2, axis=tuple(range(1, g.ndim))))
