"""Before anything of `experiments.benchmark` is timed: all sides give the same samples, loss and gradient.

All sides are compared with the hand-written one in float64 on the same noise. The tolerance is measured, not chosen: in float64, times
are moved by a rounding, and every output of the network by `ROUNDING` of its standard deviation, with signs that do not change from step
to step. What this does to samples, loss and gradient is how far float32 may be off. The library's actions are scores, which hold the
image only to `SCORE |x| / alpha`: for it the outputs are moved by that, too.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .unet import Predict, Task, coefficients, predict, relative, rollout, surrogates

ULP = 2.0**-23
ROUNDING = 1e-5  # what tests/test_stable_diffusion_unet.py holds the U-Net to; PyTorch's own is 2e-6 to 7e-6
QUICK = {"xla_backend_optimization_level": 0}  # half the time of compilation, for programs that run once or twice
SCORE = 2.0**-19  # alpha is the exponential of -6 at the first step, so good to 2^-21, and enters four times
BACKWARD = 3  # a gradient is rounded once forward and twice backward


class ExactResult(NamedTuple):
    """Results in float64, and relative errors that float32 accounts for, without and with scores in between."""

    samples: np.ndarray
    loss: float
    gradient: Any
    tolerance: dict[str, float]
    score_tolerance: dict[str, float]


def exact(task: Task, paths: int) -> ExactResult:
    """Samples of the first `paths` recorded paths made anew, and the loss with its gradient on the first minibatch."""
    path, rows = task.recorded.path, task.minibatch(0)
    with jax.enable_x64(True):
        params, behaviour, rows = (_wide(tree) for tree in (task.params, task.behaviour, rows))
        start, noise = _wide(path.x[0, :paths]), _wide(path.noise[:, :paths])
        c = coefficients(task.process, _wide(task.objective.sampler.ts))

        def evaluated(params, behaviour, rounding, score):
            network = _disturbed(predict(task.graphdef), task.process.schedule, rounding, score)
            ends = rollout(network, c, behaviour, start, lambda i: noise[i])[0][-1]

            def loss(params):
                terms = surrogates(network, c, params, rows)
                return jnp.mean(terms), terms

            gradient, terms = jax.grad(loss, has_aux=True)(params)
            return ends, terms, gradient

        once = jax.jit(evaluated, compiler_options=QUICK)
        (samples, terms, gradient), *others = (
            jax.device_get(once(params, behaviour, *map(jnp.float64, sizes))) for sizes in ((0, 0), (1, 0), (1, 1))
        )
    reference = ExactResult(np.asarray(samples), float(np.mean(terms)), gradient, {}, {})
    for tolerance, (other, other_terms, other_gradient) in zip((reference.tolerance, reference.score_tolerance), others):
        tolerance.update(errors(reference, other, np.mean(other_terms), other_gradient))
        tolerance["loss"] = float(np.mean(np.abs(other_terms - terms))) / abs(reference.loss)  # transitions do not cancel
        tolerance["gradient"] *= BACKWARD
    return reference


def _wide(tree: Any) -> Any:
    return jax.tree.map(
        lambda v: jnp.asarray(np.asarray(v), jnp.float64 if jnp.issubdtype(v.dtype, jnp.floating) else None), tree
    )


def _disturbed(network: Predict, schedule, rounding, score) -> Predict:
    def moved(params, x, t):
        v = network(params, x, t - rounding * ULP)
        tau = (schedule.horizon - t)[:, None, None, None]
        size = rounding * ROUNDING * jnp.std(v) + score * SCORE * jnp.std(x) / (schedule.alpha(tau) * schedule.sigma(tau))
        return v + size * jnp.where(jnp.cos(jnp.arange(v[0].size).reshape(v.shape[1:])) > 0, 1.0, -1.0)

    return moved


def errors(reference: ExactResult, samples, loss, gradient) -> dict[str, float]:
    """Of the samples, `max |x - reference| / std(reference)`; of loss and gradient, relative."""
    x = np.asarray(samples, np.float64)[: len(reference.samples)]
    return {
        "samples": float(np.max(np.abs(x - reference.samples)) / np.std(reference.samples)),
        "loss": abs(float(loss) - reference.loss) / abs(reference.loss),
        "gradient": relative(gradient, reference.gradient),
    }


def check(name: str, reference: ExactResult, tolerance: dict[str, float], samples, loss, gradient) -> dict[str, float]:
    """Errors of one side, beside their tolerances; `ValueError` if one is beyond."""
    found = errors(reference, samples, loss, gradient)
    for what, error in found.items():
        if not error <= tolerance[what]:
            raise ValueError(
                f"{name}: the error of the {what} is {error:.1e}, more than the {tolerance[what]:.1e} of float32: nothing is timed."
            )
    return {f"{what}_error": v for what, v in found.items()} | {f"{what}_tolerance": v for what, v in tolerance.items()}
