"""UniPC: a predictor and a corrector that share every evaluation."""

from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp

from .exponential import AbstractSemilinearSolver, standard_increment
from .multistep import History, bootstrap, no_history
from .quadrature import integrate_interpolant


class UniPCState(NamedTuple):
    """The quantities that the next step needs to correct its start."""

    past: History
    base: Any  # phi x + std xi of the last step, from its corrected start
    moments: tuple  # of the last step
    steps_made: Any


class UniPC(AbstractSemilinearSolver):
    r"""Predict `x1 = phi x^c + int Phi B p + std xi` from the last p controls; correct it once `u(t1, x1)` is known.

        x1^c = phi x^c + int Phi B p^+ + std xi,     p^+ through u(t1, x1) and the last p controls

    As in the paper's sampler, the state is the prediction, and each control is evaluated at a prediction. The step that evaluates it
    then corrects its start, `x -> x^c`. Every step takes one evaluation; the last state is not corrected. Deterministic order
    `steps + 1`, weak order 2, strong order 1 (the corrector uses the step's own noise). With x0 frozen it is UniPC with data
    prediction, with epsilon frozen UniPC with noise prediction (Zhao et al. 2023, Algorithms 1 and 2).

    For a single difference the paper does not solve for its weight but uses half of `B(h)`. `half_rule=True` does the same with
    `B_2(h) = e^h - 1` ("bh2"); `False` uses the exact moment. For two or more differences both are the same.

    Args:
        steps: p, the number of controls of the predictor, 1 to 3.
        half_rule: whether to use the paper's weight of a single difference.
        bootstrap: for `steps = 3`, compute a starting history by four evaluations before the first step (see
            `ExponentialAdamsBashforth`).

    ??? cite "Reference"
        ```bibtex
        @inproceedings{zhao2023unipc, author={Zhao, Wenliang and Bai, Lujia and Rao, Yongming and Zhou, Jie and Lu, Jiwen},
          title={{UniPC}: A unified predictor-corrector framework for fast sampling of diffusion models},
          booktitle={NeurIPS}, year={2023}}
        ```
    """

    steps: int = eqx.field(static=True, default=2)
    half_rule: bool = eqx.field(static=True, default=True)
    bootstrap: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        if not (isinstance(self.steps, int) and 1 <= self.steps <= 3):
            raise ValueError(f"steps={self.steps} must be 1, 2 or 3: it is the number of controls of the predictor.")

    @property
    def weak_order(self) -> int:
        return 2

    def order(self, terms) -> int | None:
        return self.steps + 1

    def init(self, terms, t0, t1, y0, args) -> UniPCState:
        past = no_history(self.steps, t0, y0)
        if self.bootstrap and self.steps > 2:
            early = bootstrap(self.steps - 1, terms, t0, t1, y0, args)
            past = History(early.count, (*early.clocks, past.clocks[0]), (*early.values, past.values[0]))
        return UniPCState(past, jnp.zeros_like(y0), (jnp.zeros_like(t0),) * (self.steps + 1), jnp.zeros((), jnp.int32))

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        past, base, moments, steps_made = solver_state
        past = past._replace(count=jnp.where(made_jump, 0, past.count))
        steps_made = jnp.where(made_jump, 0, steps_made)
        interval = terms.contr(t0, t1, moments=self.steps + 1, whole_step=True)
        u = terms.vf(t0, y0, args).control

        corrected = base + self._corrector(moments, interval.clock[0], u, past)
        y = jnp.where(steps_made > 0, corrected, y0)

        c0, c1 = interval.clock
        h = c1 - c0
        nodes = [jnp.zeros_like(h), *((c - c0) / h for c in past.clocks[: self.steps - 1])]
        known = jnp.where(jnp.isfinite(h), jnp.minimum(past.count + 1, self.steps), 1)
        phi, _, std = interval.transition
        base = phi * y + std * standard_increment(interval)
        weights = self._weights(interval.moments[:-1], known)
        y1 = base + integrate_interpolant(weights, nodes, [u, *past.values[: self.steps - 1]], known)
        state = UniPCState(past.push(c0, u), base, interval.moments, steps_made + 1)
        return y1, None, dict(y0=y0, y1=y1), state, dfx.RESULTS.successful

    def _corrector(self, moments, clock, u, past: History):
        """The corrected end of the last step, from `past.clocks[0]` to `clock`, by the polynomial through `u` and the last p controls."""
        h = clock - past.clocks[0]
        h = jnp.where(h > 0, h, 1)
        nodes = [jnp.zeros_like(h), jnp.ones_like(h), *((c - past.clocks[0]) / h for c in past.clocks[1:])]
        known = jnp.minimum(past.count, self.steps) + 1
        weights = self._weights(moments, known)
        return integrate_interpolant(weights, nodes, [past.values[0], u, *past.values[1:]], known)

    def _weights(self, moments, known):
        if not self.half_rule or len(moments) < 2:
            return moments
        return (moments[0], jnp.where(known == 2, 0.5 * moments[0], moments[1]), *moments[2:])
