"""What a policy is worth under another discretisation: samplers that one compilation serves at every step count.

A compiled sampler takes its grid as an argument, padded with repeats of its last time. Solvers with one Gaussian transition per
step run as the affine chain that they are where there is noise, which gives the path KL along the way.
"""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

import ctrl_diffusion as cd
from ctrl_diffusion.parallel import ONE_DEVICE, Layout, whole
from ctrl_diffusion.solvers import KeyedPath, levy_area_for, sample_keys, standard_normal, terms_for


class PaddedGrid(dfx.AbstractStepSizeController):
    """Steps to the times `ts` until the end of the solve, which may come before the end of `ts`."""

    ts: Float[Array, " n"]

    def wrap(self, direction):
        return type(self)(self.ts * direction)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return self.ts[1], 2

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state):
        return True, t1, self.ts[controller_state], False, controller_state + 1, dfx.RESULTS.successful


def padded(grid: np.ndarray, length: int) -> np.ndarray:
    """`grid` `[length]` in single precision, with its last time repeated up to `length` times."""
    return np.append(grid, np.full(length - len(grid), grid[-1])).astype(np.float32)


Draw = Callable[[Any, Any, np.ndarray, Key[Array, " b"]], tuple[Float[Array, "b *x"], Float[Array, " b"] | None]]


class Samplers:
    """`draw(params, reference, grid, keys)`: final states, and path KLs where they are defined, at any step count.

    The samples are those of `ctrl_diffusion.Sampler` with the same solver, grid and keys, up to rounding.
    """

    def __init__(self, control, schedule: cd.schedules.AbstractSchedule, shape: tuple[int, ...], max_steps: int):
        self.control, self.schedule, self.shape, self.length = control, schedule, shape, max_steps + 1
        self._chain = {with_kl: self._compile_chain(with_kl) for with_kl in (True, False)}

    def process(self, eta: float) -> cd.DiffusionProcess:
        return cd.DiffusionProcess(self.schedule, eta)

    def draw(self, solver: dfx.AbstractSolver, eta: float) -> Draw:
        """For any solver; no path KL."""
        process, control, shape = self.process(eta), self.control, self.shape

        @jax.jit
        def solve(params, ts, keys):
            keys = jax.vmap(jax.random.split)(keys)
            path = KeyedPath(ts=ts, keys=keys[:, 1], shape=shape, levy_area=levy_area_for(solver)) if eta > 0 else None
            solution = dfx.diffeqsolve(
                terms_for(solver, process.term(control, path)), solver, ts[0], ts[-1], None,
                process.initial(keys[:, 0], shape, ts.dtype), (params, None), saveat=dfx.SaveAt(t1=True),
                stepsize_controller=PaddedGrid(ts), adjoint=dfx.ForwardMode(), max_steps=len(ts), throw=False,
            )  # fmt: skip
            return jnp.asarray(solution.ys)[0]

        return lambda params, reference, grid, keys: (solve(params, padded(grid, self.length), keys), None)

    def draw_chain(self, solver: dfx.AbstractSolver, eta: float, with_kl: bool = True) -> Draw:
        """For solvers with a Gaussian transition at `eta > 0`: `x' = phi x + psi a + std xi`, and the KL of every step."""
        process = self.process(eta)
        transition = jax.jit(jax.vmap(lambda t0, t1: process.transition(solver, t0, t1)))

        def draw(params, reference, grid, keys):
            ts = padded(grid, self.length)
            rows = np.stack([ts[:-1], *transition(ts[:-1], ts[1:])], axis=1)  # those of the padding are not used
            x, kl = self._chain[with_kl](params, reference, rows, len(grid) - 1, keys)
            return x, kl if with_kl else None

        return draw

    def _compile_chain(self, with_kl: bool):
        control, shape, initial = self.control, self.shape, self.process(1.0).initial

        @jax.jit
        def chain(params, reference, rows, count, keys):
            keys = jax.vmap(jax.random.split)(keys)

            def step(i, carry):
                x, kl = carry
                t, phi, psi, std = rows[i]
                a = control(params, t, x, None)
                if with_kl:
                    a_ref = control(reference, t, x, None)
                    kl = kl + cd.sampler.step_kl((psi / std)[None], a[None], a_ref[None])[0]
                return phi * x + psi * a + std * standard_normal(keys[:, 1], 2 * i, shape, x.dtype), kl  # KeyedPath's noise

            x = initial(keys[:, 0], shape)
            return jax.lax.fori_loop(0, count, step, (x, jnp.zeros(len(x), x.dtype)))

        return chain


def collect(
    draw: Draw, params, reference, grid: np.ndarray, key, n: int, chunk: int, layout: Layout = ONE_DEVICE
) -> tuple[np.ndarray, np.ndarray | None]:
    """`n` samples and path KLs, `chunk` at a time, divided over the devices; sample `i` depends on `fold_in(key, i)` alone.

    Parameters are on all devices; every process gets all samples.
    """
    keys, xs, kls = sample_keys(key, n), [], []
    for i in range(0, n, chunk):
        rows = jnp.minimum(jnp.arange(i, i + chunk), n - 1)
        x, kl = whole(layout.paced(draw(params, reference, grid, layout.put(keys[rows], layout.batch))))
        xs.append(x[: n - i])
        if kl is not None:
            kls.append(kl[: n - i])
    return np.concatenate(xs), np.concatenate(kls) if kls else None


def bandwidth_of(images: np.ndarray) -> float:
    """Half the median distance between pairs of 512 images: the scale of the Vendi score."""
    flat = images[np.random.default_rng(0).permutation(len(images))[:512]].reshape(min(512, len(images)), -1)
    half = len(flat) // 2
    return float(np.median(np.linalg.norm(flat[:half] - flat[half : 2 * half], axis=1))) / 2
