"""The algorithms that the command lines know by name, with what each one needs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import ctrl_diffusion as cd
from ctrl_diffusion.advantages import Clip
from ctrl_diffusion.critics import returns
from ctrl_diffusion.values import AbstractValue


class AlgorithmSettings(NamedTuple):
    """What an algorithm is made from; it takes the options that it has (`AlgorithmChoice.options`)."""

    objective: cd.Objective
    value: AbstractValue
    training: cd.Training
    clip: Clip = 0.2
    horizon: float = 0.0
    kl_radius: float = 0.05


OPTIONS = ("clip", "horizon", "kl_radius")
"""Settings that only some algorithms have."""


class AlgorithmChoice(NamedTuple):
    """An algorithm by name: how it is made, and what it is.

    Attributes:
        make: from `AlgorithmSettings` to an `Algorithm`.
        learns_value: whether it trains the value network.
        penalised: whether the published method has a KL penalty; if not, its default kl_weight is 0.
        differentiates: whether it needs the reward's gradient (`vard` needs it only with a value that sees the reward).
        needs_several: whether it compares paths of one condition, and needs several of them.
        options: which of `OPTIONS` it has.
    """

    make: Callable[[AlgorithmSettings], cd.algorithms.Algorithm]
    description: str
    learns_value: bool = False
    penalised: bool = True
    differentiates: bool = False
    needs_several: bool = False
    options: tuple[str, ...] = ()


def _trpo(s: AlgorithmSettings) -> cd.algorithms.Algorithm:
    region = cd.trust.NaturalGradient(s.kl_radius, fisher_transitions=8192)
    return cd.score_as_action(s.objective, s.value, s.training._replace(policy=region), horizon=s.horizon)


ALGORITHMS: dict[str, AlgorithmChoice] = {
    "score_as_action": AlgorithmChoice(
        lambda s: cd.score_as_action(s.objective, s.value, s.training, clip=s.clip, horizon=s.horizon),
        "continuous-time PPO with a structured value",
        learns_value=True,
        options=("clip", "horizon"),
    ),
    "score_as_action_trpo": AlgorithmChoice(
        _trpo, "the same with a natural gradient in a KL radius", learns_value=True, options=("kl_radius", "horizon")
    ),
    "score_as_action_published": AlgorithmChoice(
        lambda s: cd.score_as_action(s.objective, s.value, s.training, clip=s.clip, target=returns),
        "the same with the value of the terminal reward alone, as published",
        learns_value=True,
        options=("clip",),
    ),
    "ddpo": AlgorithmChoice(
        lambda s: cd.ddpo(s.objective, s.training, clip=s.clip),
        "likelihood ratio of the return",
        penalised=False,
        options=("clip",),
    ),
    "dpok": AlgorithmChoice(
        lambda s: cd.dpok(s.objective, s.training, clip=s.clip), "the same with a KL penalty", options=("clip",)
    ),
    "flow_grpo": AlgorithmChoice(
        lambda s: cd.flow_grpo(s.objective, s.training, clip=s.clip),
        "group-relative returns and a KL penalty",
        options=("clip",),
    ),
    "vard": AlgorithmChoice(
        lambda s: cd.vard(s.objective, s.value, s.training),
        "gradient of a learned mean value through one step",
        learns_value=True,
    ),
    "soft_vard": AlgorithmChoice(
        lambda s: cd.soft_vard(s.objective, s.value, s.training), "the same with the learned soft value", learns_value=True
    ),
    "sqdf": AlgorithmChoice(
        lambda s: cd.sqdf(s.objective, s.training),
        "gradient of the posterior mean's reward, replayed states",
        differentiates=True,
    ),
    "draft": AlgorithmChoice(
        lambda s: cd.draft(s.objective, s.training), "gradient through the whole chain", penalised=False, differentiates=True
    ),
    "draft_1": AlgorithmChoice(
        lambda s: cd.draft(s.objective, s.training, steps=1),
        "gradient through the last step",
        penalised=False,
        differentiates=True,
    ),
    "alignprop": AlgorithmChoice(
        lambda s: cd.alignprop(s.objective, s.training), "draft in small memory", penalised=False, differentiates=True
    ),
    "refl": AlgorithmChoice(
        lambda s: cd.refl(s.objective, s.training), "reward of late x0 predictions", penalised=False, differentiates=True
    ),
    "adjoint_matching": AlgorithmChoice(
        lambda s: cd.adjoint_matching(s.objective, s.training), "regression on the lean adjoint", differentiates=True
    ),
    "rwr": AlgorithmChoice(lambda s: cd.rwr(s.objective, s.training), "reward-weighted likelihood of the reference's paths"),
    "vidd": AlgorithmChoice(lambda s: cd.vidd(s.objective, s.training), "value-weighted likelihood of the reference's steps"),
    "log_variance": AlgorithmChoice(
        lambda s: cd.log_variance(s.objective, s.training), "log-variance of path weights", needs_several=True
    ),
    "nabla_db": AlgorithmChoice(
        lambda s: cd.nabla_db(s.objective, s.value, s.training),
        "gradients of detailed balance",
        learns_value=True,
        differentiates=True,
    ),
    "path_consistency": AlgorithmChoice(
        lambda s: cd.path_consistency(s.objective, s.value, s.training),
        "soft consistency with a learned value",
        learns_value=True,
    ),
}


def choose(name: str) -> AlgorithmChoice:
    """The algorithm of this name; `ValueError` for an unknown one."""
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm={name!r} is not one of {', '.join(ALGORITHMS)}.")
    return ALGORITHMS[name]


def make_algorithm(name: str, settings: AlgorithmSettings, options: Any) -> cd.algorithms.Algorithm:
    """The algorithm of this name with those attributes of `options` that are in `OPTIONS` and not `None`; see `check_options`."""
    check_options(name, options)
    given = {option: getattr(options, option) for option in OPTIONS if getattr(options, option) is not None}
    return choose(name).make(settings._replace(**given))


def check_options(name: str, options: Any) -> None:
    """`ValueError` for the first attribute of `options` that is given (not `None`), and that the algorithm does not have."""
    for option in OPTIONS:
        value = getattr(options, option)
        if value is not None and option not in choose(name).options:
            others = ", ".join(other for other, choice in ALGORITHMS.items() if option in choice.options)
            raise ValueError(f"{option}={value}: {name} has no such option. Leave it out; it is one of {others}.")


def value_for(reward: cd.rewards.Reward, network, process) -> AbstractValue:
    """A structured value, or for a black-box reward, which has no gradient to give, a plain one."""
    form = cd.StructuredValue if reward.differentiable else cd.PlainValue
    return form(network, process.t0, process.t1)


def require_gradient(name: str, reward: cd.rewards.Reward) -> None:
    """Raise if the algorithm differentiates a reward that is a black box, and say what would work."""
    if choose(name).differentiates and not reward.differentiable:
        others = ", ".join(other for other, choice in ALGORITHMS.items() if not choice.differentiates)
        raise ValueError(
            f"algorithm={name!r} differentiates the reward, and reward={reward.name!r} is a black box. Use one of {others}; or a "
            "differentiable reward."
        )
