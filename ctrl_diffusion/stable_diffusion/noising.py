"""The noising that a model was trained with, read from `scheduler_config.json`, as a schedule and time grids of this library."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..predictions import EPSILON, X0, Prediction, V
from ..pretrained.config import Fixed, check_supported, parse_config, read_json
from ..process import DiffusionProcess
from ..schedules import VPTable
from ..solvers import from_timesteps, leading, linspaced, trailing

PREDICTIONS = {"epsilon": EPSILON, "v_prediction": V, "sample": X0}
# what an absent set_alpha_to_one means
ENDS_AT_DATA = {"DDIMScheduler": True, "DDPMScheduler": True, "PNDMScheduler": False}
MAX_BETA = 0.999  # where the cosine table is cut
SD15_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
# other samplers of the same noise: what their absent entries mean, where that is not what it means here
OTHER_SAMPLERS: dict[str, dict[str, Any]] = {
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "HeunDiscreteScheduler": SD15_BETAS,
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "DEISMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "LCMScheduler": SD15_BETAS | {"beta_schedule": "scaled_linear", "timestep_spacing": "leading"},
}
# entries of theirs that say how they step, which a solver of this library does instead
STEPPING = {
    "algorithm_type", "disable_corrector", "dynamic_thresholding_ratio", "euler_at_final", "flow_shift", "interpolation_type",
    "lambda_min_clipped", "lower_order_final", "original_inference_steps", "predict_x0", "sample_max_value", "sigma_max",
    "sigma_min", "shift_terminal", "solver_order", "solver_p", "solver_type", "time_shift_type", "timestep_scaling",
    "timestep_type", "use_beta_sigmas", "use_dynamic_shifting", "use_exponential_sigmas", "use_karras_sigmas",
    "use_lu_lambdas", "variance_type", "clip_sample_range", "final_sigmas_type",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Noising:
    """Discrete noising, in diffusers' names; the defaults are Stable Diffusion 1.5.

    Only the noise and the timesteps are read from a file. The class of its scheduler, `scheduler`, determines the default of missing
    entries, but not the sampler: that is a solver of this library.

    Timestep `i` is noising time `(i + 1) / num_train_timesteps`. With `set_alpha_to_one` sampling ends at zero noise, else at the first
    entry of the table, noising time `1 / num_train_timesteps`.
    """

    scheduler: str = "PNDMScheduler"
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = False

    absent: ClassVar[Mapping[str, Any]] = {
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "steps_offset": 0,
    }
    fixed: ClassVar[Fixed] = {
        "trained_betas": (None,),
        "clip_sample": (False,),
        "thresholding": (False,),
        "rescale_betas_zero_snr": (False,),
        "use_flow_sigmas": (False,),
    }
    ignored: ClassVar[tuple[str, ...]] = (
        *("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"),  # of clipping, which is refused
        *("skip_prk_steps", "variance_type"),  # of solvers
    )

    def __post_init__(self):
        check_supported("_class_name", {self.scheduler}, set(ENDS_AT_DATA))
        check_supported("beta_schedule", {self.beta_schedule}, set(TABLES))
        check_supported("prediction_type", {self.prediction_type}, set(PREDICTIONS))
        check_supported("timestep_spacing", {self.timestep_spacing}, {"leading", "trailing", "linspace"})
        for name in ("beta_start", "beta_end"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1: it is the variance that a step adds.")
        for name, least in (("num_train_timesteps", 2), ("steps_offset", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")

    @property
    def betas(self) -> np.ndarray:
        """The table, float64 `[num_train_timesteps]`."""
        return TABLES[self.beta_schedule](self.beta_start, self.beta_end, self.num_train_timesteps)

    @property
    def prediction(self) -> Prediction:
        """The prediction of the network."""
        return PREDICTIONS[self.prediction_type]

    @property
    def end(self) -> float:
        """Noising time at which sampling ends."""
        return 0.0 if self.set_alpha_to_one else 1 / self.num_train_timesteps

    def timesteps(self, steps: int) -> np.ndarray:
        """The timesteps at which the network is called, the noisiest first.

        There are `steps` of them, or one less if the last is the end of sampling: that step would change nothing.
        """
        if self.timestep_spacing == "leading":
            table = leading(steps, self.num_train_timesteps, self.steps_offset)
        else:
            table = (trailing if self.timestep_spacing == "trailing" else linspaced)(steps, self.num_train_timesteps)
        table = table if self.set_alpha_to_one else table[table > 0]
        if not len(table):
            raise ValueError(f"steps={steps}: the only timestep is 0, where sampling ends. Take more steps.")
        return table

    def grid(self, steps: int) -> np.ndarray:
        """Control times of these timesteps and the end."""
        return from_timesteps(self.timesteps(steps), self.num_train_timesteps, end=self.end)

    def schedule(self, steps: int) -> VPTable:
        """The table as a schedule, restricted to the times of `steps` steps. "Leading" steps leave out the noisiest times."""
        first = (int(self.timesteps(steps)[0]) + 1) / self.num_train_timesteps
        return VPTable(betas=tuple(self.betas.tolist()), tau_min=self.end, tau_max=first)

    def process(self, steps: int, eta: float = 1.0) -> DiffusionProcess:
        """The diffusion process on `grid(steps)`."""
        return DiffusionProcess(self.schedule(steps), eta=eta)

    def timestep(self, tau: Float[Array, "..."]) -> Float[Array, "..."]:
        """The network's timestep at noising time `tau`, rounded to 1/1024.

        Control times in float32 give whole timesteps with an error of 1e-4 only; this rounding removes it.
        """
        return jnp.round(1024 * (self.num_train_timesteps * tau - 1)) / 1024


def _linear(start: float, end: float, count: int) -> np.ndarray:
    return np.linspace(start, end, count)


def _scaled_linear(start: float, end: float, count: int) -> np.ndarray:
    return np.linspace(start**0.5, end**0.5, count) ** 2


def _cosine(start: float, end: float, count: int) -> np.ndarray:
    """The betas of Nichol and Dhariwal 2021, eq. 17; `start` and `end` are not used."""
    products = np.cos(0.5 * np.pi * (np.arange(count + 1) / count + 0.008) / 1.008) ** 2
    return np.minimum(1 - products[1:] / products[:-1], MAX_BETA)


TABLES = {"linear": _linear, "scaled_linear": _scaled_linear, "squaredcos_cap_v2": _cosine}


def read_noising(path: Path) -> Noising:
    """Read the noising in a `scheduler_config.json`. A file of another sampler of the same noise is read with a warning."""
    values = read_json(path)
    try:
        noising = parse_noising(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if (name := values.get("_class_name")) in OTHER_SAMPLERS:
        warnings.warn(
            f"{path}: {name} is a sampler. Its noise is taken ({noising.beta_schedule} betas from {noising.beta_start:g} to "
            f"{noising.beta_end:g}, prediction {noising.prediction_type}, {noising.timestep_spacing} timesteps, the end at "
            f"{'zero noise' if noising.set_alpha_to_one else 'the least noise of the table'}); how it steps is not: choose a solver.",
            stacklevel=2,
        )
    return noising


def parse_noising(values: Mapping[str, Any]) -> Noising:
    """Read a noising from a dictionary; see `read_noising`. That of another sampler is written as a `DDIMScheduler`'s."""
    name = str(values.get("_class_name"))
    check_supported("_class_name", {name}, {*ENDS_AT_DATA, *OTHER_SAMPLERS})
    given = {key: value for key, value in values.items() if not key.startswith("_")}
    if name in OTHER_SAMPLERS:
        ends = given.get("final_sigmas_type", "zero") == "zero"
        if name == "LCMScheduler":  # of the others the entry says nothing
            ends = given.get("set_alpha_to_one", True)
        absent = {"timestep_spacing": "linspace"} | OTHER_SAMPLERS[name]
        kept = {key: value for key, value in given.items() if key not in STEPPING}
        return parse_config(Noising, absent | kept | {"scheduler": "DDIMScheduler", "set_alpha_to_one": ends})
    absent = {"set_alpha_to_one": ENDS_AT_DATA[name], "clip_sample": name != "PNDMScheduler"}
    return parse_config(Noising, absent | given | {"scheduler": name})


def noising_values(noising: Noising) -> dict[str, Any]:
    """The entries to write into a `scheduler_config.json`."""
    values = dataclasses.asdict(noising)
    name = values.pop("scheduler")
    if name == "DDPMScheduler":  # always ends at zero noise
        del values["set_alpha_to_one"]
    extra = {"skip_prk_steps": True} if name == "PNDMScheduler" else {"clip_sample": False}
    return {"_class_name": name, **values, **extra, "trained_betas": None}
