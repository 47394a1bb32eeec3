"""Diffusion models: a network with its parameters and sampler, saved to and loaded from a folder."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from . import predictions, schedules
from .folders import local, replaced
from .networks import NetworkScore, ResidualMLP, score_control, split
from .predictions import Prediction, V
from .process import DiffusionProcess, Params
from .sampler import Sampler
from .solvers import sample_keys
from .summaries import summary

FORMAT = 1


class DiffusionModel(NamedTuple):
    """A network with the process, grid and solver it samples with.

    `network` gives the architecture only; `params` are the parameters in use.
    """

    network: nnx.Module
    params: Params
    sampler: Sampler
    prediction: Prediction = V

    def __repr__(self) -> str:
        """Network, count of parameters, process, grid and solver, in about fifteen lines; parameters are not listed."""
        return summary(self)

    @property
    def process(self) -> DiffusionProcess:
        """The diffusion process that the network was made for."""
        process = self.sampler.process
        if not isinstance(process, DiffusionProcess):
            raise TypeError(f"a DiffusionModel needs a Sampler with a DiffusionProcess, not {type(process).__name__}.")
        return process

    def sample(self, key: Key[Array, ""], n: int) -> Float[Array, "n *x"]:
        """`n` samples; sample `i` depends only on `fold_in(key, i)`."""
        return _sample(self.sampler, self.params, sample_keys(key, n))


def _sample(sampler: Sampler, params, keys):
    return jax.jit(sampler.sample)(params, keys)


def make_model(
    network: nnx.Module,
    process: DiffusionProcess,
    shape: tuple[int, ...],
    *,
    grid=None,
    solver=None,
    prediction: Prediction = V,
) -> DiffusionModel:
    """A model from a network `network(x [b, *x], t [b], cond) -> [b, *x]` that predicts `prediction`."""
    control, params = score_control(network, process, prediction)
    return DiffusionModel(network, params, Sampler(process, control, shape, grid=grid, solver=solver), prediction)


def _flat(params) -> dict[str, Array]:
    return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(params)}


def save(directory: str | os.PathLike, model: DiffusionModel) -> None:
    """Write `model.json` and `params.safetensors` into `directory`. The folder is replaced as a whole and is never half-written.

    Only the name of the solver is saved: `load` must be given any other than the default `ExponentialEuler` again.

    Raises:
        ValueError: if the sampler's control is not the network's score (guidance, a frozen reference): `load` could not restore it.
    """
    from safetensors.flax import save_file  # needed for nothing else

    process, schedule = model.process, model.process.schedule
    if not isinstance(control := model.sampler.control, NetworkScore):
        name = getattr(control, "__name__", type(control).__name__)
        raise ValueError(
            f"the model's control, {name}, is not the score of its network, and a model folder holds a network alone: save the model that "
            "make_model made with the new params, and make the control anew after loading it."
        )
    description = {
        "format": FORMAT,
        "network": type(model.network).__name__,
        "network_arguments": getattr(model.network, "arguments", None),
        "prediction": model.prediction.name,
        "frozen": process.frozen.name,
        "schedule": type(schedule).__name__,
        "schedule_arguments": {f.name: getattr(schedule, f.name) for f in dataclasses.fields(schedule)},
        "eta": process.eta,
        "shape": list(model.sampler.shape),
        "grid": list(model.sampler.times),
        "solver": type(model.sampler.solver).__name__,
    }
    with replaced(Path(directory)) as temporary:
        (temporary / "model.json").write_text(json.dumps(description, indent=2) + "\n")
        save_file(_flat(model.params), str(temporary / "params.safetensors"))


def load(directory: str | os.PathLike, *, network: nnx.Module | None = None, solver: Any = None, grid=None) -> DiffusionModel:
    """Read a model that `save` wrote.

    Args:
        directory: the folder.
        network: the architecture; required unless it is a `ResidualMLP` of this library.
        solver: any diffrax solver (default: `ExponentialEuler`); required if the model was saved with another.
        grid: control times (default: the saved ones).

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if a required argument is missing, or the file does not fit the network.
    """
    directory = local(directory)
    for name in ("model.json", "params.safetensors"):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} holds no {name}: it is not a model folder written by ctrl_diffusion.save.")
    description = json.loads((directory / "model.json").read_text())
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{directory}/model.json has format {description.get('format')!r}, but this version reads format {FORMAT}: load it with the "
            "version that wrote it."
        )
    if network is None:
        if description["network"] != "ResidualMLP" or description["network_arguments"] is None:
            raise ValueError(
                f"the model uses the network {description['network']!r}: pass network=... with the same architecture."
            )
        arguments: dict[str, Any] = {k: _tuple(v) for k, v in description["network_arguments"].items()}
        network = ResidualMLP(**arguments, rngs=nnx.Rngs(0))
    if solver is None and description["solver"] != "ExponentialEuler":
        raise ValueError(f"the model was saved with the solver {description['solver']}: pass solver=... (that one or another).")
    schedule_class = _find(schedules, description["schedule"], "schedule")
    schedule = schedule_class(**{k: _tuple(v) for k, v in description["schedule_arguments"].items()})
    frozen, prediction = (_find(predictions, description[name].upper(), name) for name in ("frozen", "prediction"))
    process = DiffusionProcess(schedule, description["eta"], frozen)
    grid = np.asarray(description["grid"]) if grid is None else grid
    model = make_model(network, process, tuple(description["shape"]), grid=grid, solver=solver, prediction=prediction)
    return model._replace(params=_read(directory / "params.safetensors", split(network)[1]))


def _find(module: Any, name: str, what: str) -> Any:
    if not hasattr(module, name):
        raise ValueError(
            f"the model uses the {what} {name!r}, which is not one of ctrl_diffusion's: build the model with make_model, and read its "
            "parameters from params.safetensors."
        )
    return getattr(module, name)


def _tuple(v: Any) -> Any:
    return tuple(v) if isinstance(v, list) else v


def _read(path: Path, expected: Params) -> Params:
    """Read parameters from a file. Their names, shapes and types must be the expected ones."""
    from safetensors.flax import load_file

    try:
        found = load_file(str(path))
    except Exception as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    wanted = _flat(expected)
    for name in sorted(set(wanted) | set(found)):
        have = found.get(name)
        if name not in wanted or have is None:
            raise ValueError(f"{path}: parameter {name!r} is {'missing' if have is None else 'not part of the network'}.")
        if have.shape != wanted[name].shape or have.dtype != wanted[name].dtype:
            raise ValueError(
                f"{path}: parameter {name!r} is {have.dtype}{list(have.shape)}, the network has "
                f"{wanted[name].dtype}{list(wanted[name].shape)}."
            )
    flat = [(p, leaf.replace(jnp.asarray(found["/".join(map(str, p))]))) for p, leaf in nnx.to_flat_state(expected)]
    return nnx.from_flat_state(flat)
