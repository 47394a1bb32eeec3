"""Time and memory of the gradient through the whole chain, fast and in small memory, for `experiments.benchmark`."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

import ctrl_diffusion as cd
from ctrl_diffusion.algorithms.iteration import one_update
from ctrl_diffusion.algorithms.programs import running
from ctrl_diffusion.parallel import ONE_DEVICE

from ..reward_registry import ink
from .unet import SHAPE, moved, record

MEMORY_STEPS = (25, 100, 400)


def _draft(
    steps: int, batch: int, width: int, depth: int, small_memory: bool
) -> tuple[cd.Objective, cd.algorithms.Algorithm, Any]:
    process = cd.DiffusionProcess(cd.VPCosine(tau_min=0.02))
    network = cd.ResidualMLP(SHAPE, SHAPE, width=width, depth=depth, rngs=nnx.Rngs(0))
    control, params = cd.score_control(network, process)
    objective = cd.Objective(cd.Sampler(process, control, SHAPE, grid=process.grid(steps)), cd.differentiable(ink, "ink"), 0.0)
    algorithm = cd.draft(objective, cd.Training(optax.adam(1e-4), batch), small_memory=small_memory)
    return objective, algorithm, params


def update_of_whole_chain(steps: int, batch: int, width: int, depth: int, small_memory: bool) -> Callable[[], Any]:
    """One DRaFT update through all `steps` steps, with the network of `experiments.digits`."""
    objective, algorithm, params = _draft(steps, batch, width, depth, small_memory)
    params = moved(params, jax.random.key(1), 1e-2)
    recorded, state = record(algorithm, params, params, jax.random.key(0)), algorithm.init(params)
    call, held = running(algorithm.programs, ONE_DEVICE), [state.learned]

    def update():
        held[0], metrics = one_update(call, algorithm.fixed, held[0], state, recorded.rows, recorded.order, 0)
        return held[0], metrics

    return update


def memory(batch: int, width: int, depth: int) -> dict[str, dict[str, int]]:
    """Bytes of temporary memory of the update at 25, 100 and 400 steps, by the compiler's own account."""
    found: dict[str, dict[str, int]] = {"fast": {}, "small": {}}
    for name, sizes in found.items():
        for steps in MEMORY_STEPS:
            _, algorithm, params = _draft(steps, batch, width, depth, name == "small")
            analysis = cd.algorithms.lower(algorithm, params)["update"].compile().memory_analysis()
            if analysis is None:
                raise ValueError("gradient=True: this backend does not report the memory of a program; pass --no-gradient.")
            sizes[str(steps)] = int(analysis.temp_size_in_bytes)
    return found
