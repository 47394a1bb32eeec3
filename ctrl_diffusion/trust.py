r"""Trust regions: how a policy is updated, by a first-order optimiser or by the natural gradient within a KL radius.

The distance between successive policies is the path KL, `KL(P^old || P^new) = sum_j E |scale_j (a_new - a_old)|^2 / 2`. It is one number
in nats, and its meaning does not depend on the number of steps.
"""

import abc
from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from .estimators.base import per_path
from .exploration import shift
from .gradients import Loss, mean_in_parts
from .objective import Objective
from .parallel import ONE_DEVICE, Layout
from .predictions import expand
from .process import Params
from .rollout import Transitions


class AbstractTrustRegion(eqx.Module):
    """Changes parameters to lower a loss: on minibatches, or once per iteration on all transitions (`once`)."""

    once: ClassVar[bool] = False

    @abc.abstractmethod
    def init(self, params: Params) -> Any:
        """State of the optimiser."""

    @abc.abstractmethod
    def minibatch(self, loss: Loss, params: Params, state: Any, transitions: Transitions) -> tuple[Params, Any, dict[str, Any]]:
        """One update on a minibatch."""

    def finish(
        self,
        objective: Objective,
        loss: Loss,
        params: Params,
        transitions: Transitions,
        layout: Layout = ONE_DEVICE,
        parts: int = 1,
    ) -> tuple[Params, dict[str, Any]]:
        """One update on all transitions of an iteration, computed in `parts` microbatches on the devices of `layout`."""
        return params, {}

    def loss_evaluations(self, transitions: int, epochs: int) -> int:
        """Evaluations of the loss with its gradient (or work of the same cost) in an iteration of `epochs` passes, in transitions."""
        return transitions * epochs


class FirstOrder(AbstractTrustRegion):
    """An optax optimiser on minibatches. A clip, a mask or a proximal penalty of the estimator bounds the step."""

    optimizer: optax.GradientTransformation = eqx.field(static=True)

    def init(self, params: Params) -> optax.OptState:
        return self.optimizer.init(params)

    def minibatch(self, loss: Loss, params: Params, state: optax.OptState, transitions: Transitions):
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params, transitions)
        change, state = self.optimizer.update(gradient, state, params)
        return (
            optax.apply_updates(params, change),
            state,
            metrics | {"policy_loss": value, "gradient_norm": optax.tree.norm(gradient)},
        )


class NaturalGradient(AbstractTrustRegion):
    r"""TRPO: a step along `F^{-1} g`, found by conjugate gradient and shortened by a line search.

    `F` is the Hessian of the path KL at the old policy, `sum_j E (scale_j da/dtheta)^T (scale_j da/dtheta)`, applied by one jvp and
    one vjp. The first attempt is the longest step whose quadratic KL is `radius`; every further attempt halves its KL. A step is
    accepted if the *measured* path KL (on all transitions, not the quadratic model) is at most `radius` and the loss is lower. If
    `backtracks` halvings find none, the parameters do not change. Schulman et al. 2015, appendix C.

    Args:
        radius: path KL of an update, nats.
        iterations: number of conjugate-gradient iterations.
        damping: added to the diagonal of `F`, nats per squared parameter.
        backtracks: largest number of halvings.
        fisher_transitions: number of transitions that `F` is averaged over, evenly spread over times and samples; `None`: all. If they
            are far fewer than the parameters, `F` is blind to many directions: steps along them are too long, and the line search
            shortens the whole step. With `Training.accumulation` every part has the same number of them.
    """

    once: ClassVar[bool] = True
    radius: float = eqx.field(static=True)
    iterations: int = eqx.field(static=True, default=10)
    damping: float = eqx.field(static=True, default=1e-3)
    backtracks: int = eqx.field(static=True, default=10)
    fisher_transitions: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if not self.radius > 0:
            raise ValueError(f"radius={self.radius} must be positive: it is the path KL of an update, in nats.")
        if not self.damping >= 0 or self.iterations < 1 or self.backtracks < 0:
            raise ValueError(
                f"damping={self.damping} and backtracks={self.backtracks} must be at least 0, iterations={self.iterations} at least 1."
            )

    def init(self, params: Params) -> Any:
        return ()

    def minibatch(self, loss: Loss, params: Params, state: Any, transitions: Transitions):
        return params, state, {}

    def loss_evaluations(self, transitions: int, epochs: int) -> int:
        """The gradient, a jvp and a vjp per conjugate-gradient iteration, and the first attempt of the line search (three forwards).

        Further attempts, at most `backtracks`, are not counted.
        """
        fisher = transitions if self.fisher_transitions is None else min(transitions, self.fisher_transitions)
        return 2 * transitions + 2 * (self.iterations + 1) * fisher

    def finish(
        self,
        objective: Objective,
        loss: Loss,
        params: Params,
        transitions: Transitions,
        layout: Layout = ONE_DEVICE,
        parts: int = 1,
    ) -> tuple[Params, dict[str, Any]]:
        mean = partial(mean_in_parts, layout=layout, parts=parts)
        (before, loss_metrics), gradient = mean(partial(jax.value_and_grad(loss, has_aux=True), params), transitions)
        states = per_path(transitions)[0] if transitions.j.ndim == 2 else transitions
        count = len(states.j)
        fisher_transitions = max(min(self.fisher_transitions or count, count) // parts, 1) * parts
        spread = np.linspace(0, count - 1, fisher_transitions).round().astype(int)
        by_time = jnp.argsort(states.j)
        some = jax.tree.map(lambda v: v[by_time[spread]], states)

        def damped(v):
            product = mean(lambda part: fisher_product(objective, params, part, v), some)
            return optax.tree.add_scale(product, self.damping, v)

        direction, _ = jax.scipy.sparse.linalg.cg(damped, gradient, maxiter=self.iterations)
        curvature = optax.tree.vdot(direction, damped(direction))
        # a hair inside the radius, so that rounding does not cost a backtrack where the KL is quadratic
        longest = 0.99 * jnp.sqrt(2 * self.radius / jnp.maximum(curvature, jnp.finfo(before.dtype).tiny))

        def attempt(i):
            candidate = optax.tree.add_scale(params, -longest * 0.5 ** (0.5 * i), direction)
            kl = mean(lambda part: moved_kl(objective, candidate, params, part), states)
            return candidate, kl, mean(lambda part: loss(candidate, part)[0], transitions)

        def rejected(carry):
            i, _, kl, after = carry
            return (i <= self.backtracks) & ~((kl <= self.radius) & (after < before))

        def halve(carry):
            i = carry[0] + 1
            return (i, *attempt(i))

        i, candidate, kl, after = jax.lax.while_loop(rejected, halve, (jnp.zeros((), jnp.int32), *attempt(0)))
        taken = i <= self.backtracks
        params = jax.tree.map(lambda new, old: jnp.where(taken, new, old), candidate, params)
        metrics = loss_metrics | {
            "policy_loss": before,
            "update_kl": jnp.where(taken, kl, 0.0),
            "backtracks": i.astype(before.dtype),
            "surrogate_gain": jnp.where(taken, before - after, 0.0),
            "gradient_norm": optax.tree.norm(gradient),
        }
        return params, metrics


def moved_kl(objective: Objective, params: Params, old: Params, transitions: Transitions) -> Float[Array, ""]:
    """Path KL from the policy `old` to `params`, nats: the weighted mean KL of transitions `[m]`, times the number of steps."""
    a, a_old = (objective.control(p, transitions.j, transitions.x, transitions.cond) for p in (params, old))
    z = shift(objective.scales[transitions.j], a, a_old)
    return objective.intervals * jnp.mean(transitions.weight * 0.5 * jnp.sum(z**2, axis=tuple(range(1, z.ndim))))


def fisher_product(objective: Objective, params: Params, transitions: Transitions, vector: Params) -> Params:
    """`F v`, with `F` the Hessian of `moved_kl(params, old)` at `params = old`."""

    def scaled(params):
        return shift(
            objective.scales[transitions.j], objective.control(params, transitions.j, transitions.x, transitions.cond), 0.0
        )

    _, tangent = jax.jvp(scaled, (params,), (vector,))
    _, vjp = jax.vjp(scaled, params)
    return vjp(objective.intervals / tangent.shape[0] * expand(transitions.weight, tangent) * tangent)[0]
