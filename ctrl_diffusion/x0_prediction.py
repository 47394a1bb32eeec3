"""x0 predictions: estimates of the final state from an intermediate one, for values and for rewards of intermediate states."""

from collections.abc import Callable

from .predictions import expand
from .process import Cond, DiffusionProcess, Params, State
from .sampler import Sampler
from .solvers import ExponentialEuler

X0Prediction = Callable[..., State]  # (sampler, params, t, x, action, cond) -> an estimate of the final state


def posterior_mean(sampler: Sampler, reference: Params, t, x: State, action: State, cond: Cond = None) -> State:
    """Mean of the final state given `x`, under the noising law of the score `action` (Tweedie); `x` itself at `t1`."""
    return sampler.process.terminal_mean(t, x, action)


def present_state(sampler: Sampler, reference: Params, t, x: State, action: State, cond: Cond = None) -> State:
    """`x` itself: no prediction."""
    return x


def few_step_ode(steps: int) -> X0Prediction:
    """The end of the reference's probability-flow ODE from `(t, x)`, by `steps` DDIM steps of equal time.

    It is a flow map, like a consistency model, and not a posterior mean. With one step the two agree, up to `tau_min`.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1: it is the number of DDIM steps to the end.")

    def x0_prediction(sampler: Sampler, reference: Params, t, x: State, action: State, cond: Cond = None) -> State:
        process = sampler.process
        if not isinstance(process, DiffusionProcess):
            raise TypeError(
                f"few_step_ode follows a probability flow, which {type(process).__name__} does not have: use a DiffusionProcess, or "
                "Objective(x0_prediction=posterior_mean)."
            )
        flow = DiffusionProcess(process.schedule, 0.0)
        h = (process.t1 - t) / steps
        for i in range(steps):
            if i > 0:
                action = sampler.control(reference, t + i * h, x, cond)
            phi, psi, _ = flow.transition(ExponentialEuler(), t + i * h, t + (i + 1) * h)
            x = expand(phi, x) * x + expand(psi, x) * action
        return x

    return x0_prediction
