"""Estimates of the final state from an intermediate one, which values and rewards build on."""

from collections.abc import Callable

from .predictions import expand
from .process import Cond, DiffusionProcess, Params, State
from .sampler import Sampler
from .solvers import ExponentialEuler

X0Prediction = Callable[..., State]  # (sampler, params, t, x, action, cond) -> an estimate of the final state


def posterior_mean(sampler: Sampler, reference: Params, t, x: State, action: State, cond: Cond = None) -> State:
    """Mean of the final state under the noising law of the score `action` (Tweedie); `x` itself at `t1`."""
    return sampler.process.terminal_mean(t, x, action)


def present_state(sampler: Sampler, reference: Params, t, x: State, action: State, cond: Cond = None) -> State:
    """No look ahead: `x` itself."""
    return x


def few_step_ode(steps: int) -> X0Prediction:
    """The end of the reference's probability-flow ODE from `(t, x)`, by `steps` DDIM steps of equal time.

    A flow map, as a consistency model is; not a posterior mean. One step is the posterior mean, up to `tau_min`.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")

    def x0_prediction(sampler: Sampler, reference: Params, t, x: State, action: State, cond: Cond = None) -> State:
        process = sampler.process
        if not isinstance(process, DiffusionProcess):
            raise TypeError(f"few_step_ode follows a probability flow, which {type(process).__name__} does not have.")
        flow = DiffusionProcess(process.schedule, 0.0)
        h = (process.t1 - t) / steps
        for i in range(steps):
            if i > 0:
                action = sampler.control(reference, t + i * h, x, cond)
            phi, psi, _ = flow.transition(ExponentialEuler(), t + i * h, t + (i + 1) * h)
            x = expand(phi, x) * x + expand(psi, x) * action
        return x

    return x0_prediction
