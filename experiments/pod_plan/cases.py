"""The experiments that `experiments.pod_plan` can plan for: each a function from its settings to a `Case`."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx

import ctrl_diffusion as cd
from ctrl_diffusion.parallel import ONE_DEVICE, Layout

from ..algorithm_registry import choose
from ..classifier import Classifier
from ..digits import experiment as digits
from ..reward_registry import OF_DIGITS, Settings as RewardSettings
from ..text_to_image.config import Config as TextToImage
from .text_to_image import planned_config, text_to_image_programs


class Case(NamedTuple):
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


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an experiment is told; `None` is the experiment's own choice."""

    algorithm: str | None = None
    """How to fine-tune, by the names of experiments.digits."""
    accumulation: int | None = None
    """Parts that the rows of an update are worked through in."""
    rollouts: int | None = None
    """Parts that the paths of an iteration are sampled in (only text_to_image)."""
    times: int | None = None
    """Timesteps of every path that are trained on (only text_to_image)."""
    attention: Literal["xla", "cudnn"] | None = None
    """What computes attention (only text_to_image): cudnn for GPUs."""
    attention_chunk: int | None = None
    """Pixels that attend to all others at a time (only text_to_image)."""
    stratified: bool = False
    """Transitions stay on their chips: each group of consecutive ones is dealt out to the minibatches."""
    steps: int | None = None
    """Control intervals between noise and data."""
    minibatches: int | None = None
    """Updates per pass."""
    epochs: int | None = None
    """Passes over the paths of an iteration."""
    width: int | None = None
    """Features of the network."""
    depth: int | None = None
    """Blocks of the network."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Of the network's matrix products (default: float32; text_to_image: bfloat16)."""


def _given(settings: Settings, config: type[Any], experiment: str) -> dict[str, Any]:
    """The settings that are given, for an experiment's `config`; `ValueError` for the first one that it does not have."""
    given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Settings)}
    given = {name: value for name, value in given.items() if value not in (None, False)}
    known = {field.name for field in dataclasses.fields(config)}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{name}={value}: experiments.{experiment} has no such option. Leave it out.")
    return given


def digits_case(settings: Settings) -> Case:
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
    return Case(algorithm, shapes[0], shapes[1], config.batch, config.steps)


def text_to_image_case(settings: Settings) -> Case:
    """`experiments.text_to_image`: LoRA of Stable Diffusion 1.5 at 512x512, for a reward on the host."""
    config = planned_config(_given(settings, TextToImage, "text_to_image"))
    algorithm, params, value_params = text_to_image_programs(config)
    return Case(algorithm, params, value_params, config.batch, config.steps)


EXPERIMENTS: dict[str, Callable[[Settings], Case]] = {"digits": digits_case, "text_to_image": text_to_image_case}
"""By name. Another experiment is another function here."""
