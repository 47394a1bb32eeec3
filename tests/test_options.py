"""Options that an algorithm or an experiment does not have are refused by name, and those that it has arrive."""

import dataclasses
from types import SimpleNamespace

import optax
import pytest

import ctrl_diffusion as cd
from ctrl_diffusion import exact
from experiments import data
from experiments.algorithm_registry import ALGORITHMS, AlgorithmSettings, make_algorithm
from experiments.digits.checks import check as check_digits
from experiments.digits.config import Config as Digits
from experiments.pod_plan.cases import digits_case, text_to_image_case
from experiments.pod_plan.config import ExperimentOptions as Plan
from experiments.text_to_image.checks import check
from experiments.text_to_image.config import Config as TextToImage

PROBLEM = exact.ring_linear()
SAMPLER = cd.Sampler(PROBLEM.process, PROBLEM.reference_action, (2,), grid=PROBLEM.process.grid(4))
OTHER = {"clip": 0.1, "horizon": 0.3, "kl_radius": 0.02}


def settings(name):
    objective = cd.Objective(SAMPLER, cd.differentiable(PROBLEM.reward), 1.0 if ALGORITHMS[name].penalised else 0.0)
    value = cd.StructuredValue(lambda params, t, x, cond: x[:, 0], PROBLEM.process.t0, PROBLEM.process.t1)
    return AlgorithmSettings(objective, value, cd.Training(optax.sgd(0.1), 8, value=optax.sgd(0.1)))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_has_the_options_that_change_it(name):
    """What an algorithm is made of differs from the default exactly for the options that it says it has."""

    def recipe(**options):
        found = make_algorithm(name, settings(name), SimpleNamespace(**dict.fromkeys(OTHER) | options)).recipe
        region = found.training.policy if isinstance(found.training.policy, cd.trust.NaturalGradient) else None
        return str(found.estimator), str(region)

    for option, value in OTHER.items():
        if option in ALGORITHMS[name].options:
            assert recipe(**{option: value}) != recipe()
            assert str(value) in "".join(recipe(**{option: value}))
        else:
            with pytest.raises(ValueError, match=f"{option}={value}: {name} has no such option"):
                recipe(**{option: value})


DROPPED = {
    "clip of a method without one": (
        lambda: check(TextToImage(algorithm="adjoint_matching", clip=0.1)),
        "clip=0.1: adjoint_matching has no such option",
    ),
    "strength of Brownian noise": (
        lambda: check_digits(Digits(exploration_strength=0.2), None, data.digits()),
        "exploration_strength=0.2 belongs to action noise: pass --exploration action",
    ),
    "width of Stable Diffusion": (
        lambda: text_to_image_case(Plan(width=64)),
        "width=64: experiments.text_to_image has no such option",
    ),
    "times of the digits": (lambda: digits_case(Plan(times=3)), "times=3: experiments.digits has no such option"),
    "attention of the digits": (
        lambda: digits_case(Plan(attention="cudnn")),
        "attention=cudnn: experiments.digits has no such option",
    ),
}


@pytest.mark.parametrize("name", DROPPED)
def test_nothing_is_dropped_without_a_word(name):
    make, message = DROPPED[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_plan_of_text_to_image_has_the_options_of_its_run():
    case = text_to_image_case(Plan(stratified=True, minibatches=2, steps=4, accumulation=1))
    training = case.algorithm(cd.Layout(), 8).recipe.training
    assert training.stratified and training.minibatches == 2 and not training.scan_minibatches
    fields = {field.name for field in dataclasses.fields(TextToImage)}
    assert {"stratified", "scan_minibatches", "accumulation"} <= fields
