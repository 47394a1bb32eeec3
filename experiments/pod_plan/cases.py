"""The experiments that `experiments.pod_plan` can plan for: each a function from its settings to a `PlannedExperiment`."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

import ctrl_diffusion as cd
from ctrl_diffusion.parallel import ONE_DEVICE, Layout

from ..algorithm_registry import choose
from ..classifier import Classifier
from ..digits import experiment as digits
from ..reward_registry import OF_DIGITS, RewardSettings
from ..text_to_image.config import Config as TextToImage
from .config import ExperimentOptions
from .text_to_image import planned_config, text_to_image_programs


class PlannedExperiment(NamedTuple):
    """An experiment to be compiled.

    Attributes:
        algorithm: `(layout, batch) -> Algorithm` with a global batch; refuses with `ValueError` what does not fit together.
        params: shapes of the policy's parameters.
        value_params: shapes of the value's, `()` without one.
        batch: the experiment's own global batch.
        intervals: control intervals of a path.
    """

    algorithm: Callable[[Layout, int], cd.algorithms.Algorithm]
    params: Any
    value_params: Any
    batch: int
    intervals: int


def _given(settings: ExperimentOptions, config: type[Any], experiment: str) -> dict[str, Any]:
    """The settings that are given, for an experiment's `config`; `ValueError` for the first one that it does not have."""
    given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(ExperimentOptions)}
    given = {name: value for name, value in given.items() if value not in (None, False)}
    known = {field.name for field in dataclasses.fields(config)}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{name}={value}: experiments.{experiment} has no such option. Leave it out.")
    return given


def digits_case(settings: ExperimentOptions) -> PlannedExperiment:
    """`experiments.digits` with its reward "digit"."""
    config = digits.Config(**_given(settings, digits.Config, "digits"))
    shape = (8, 8, 1)
    dtype = None if config.precision == "float32" else config.precision
    network = nnx.eval_shape(
        lambda: cd.ResidualMLP(shape, shape, width=config.width, depth=config.depth, dtype=dtype, rngs=nnx.Rngs(0))
    )
    process = cd.DiffusionProcess(cd.VPCosine(tau_min=0.02), config.eta)
    model = cd.make_model(network, process, shape, grid=process.grid(config.steps))
    reward = OF_DIGITS["digit"].make(RewardSettings(Classifier(64, 128, nnx.Rngs(0)), config.digit))  # untrained: the same
    kl_weight = OF_DIGITS["digit"].kl_weight if choose(config.algorithm).penalised else 0.0

    def algorithm(layout: Layout, batch: int) -> cd.algorithms.Algorithm:
        return digits._algorithm(dataclasses.replace(config, batch=batch), model.sampler, reward, kl_weight, layout)[0]

    _, value_params = digits._algorithm(config, model.sampler, reward, kl_weight, ONE_DEVICE)
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), (model.params, value_params))
    return PlannedExperiment(algorithm, shapes[0], shapes[1], config.batch, config.steps)


def text_to_image_case(settings: ExperimentOptions) -> PlannedExperiment:
    """`experiments.text_to_image`: LoRA of Stable Diffusion 1.5 at 512x512, for a reward on the host."""
    config = planned_config(_given(settings, TextToImage, "text_to_image"))
    algorithm, params, value_params = text_to_image_programs(config)
    return PlannedExperiment(algorithm, params, value_params, config.batch, config.steps)


EXPERIMENTS: dict[str, Callable[[ExperimentOptions], PlannedExperiment]] = {
    "digits": digits_case,
    "text_to_image": text_to_image_case,
}
"""By name. Another experiment is another function here."""
