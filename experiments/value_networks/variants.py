"""The variants of the ablation: form and inputs of the value, its target and its loss."""

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import ctrl_diffusion as cd
from ctrl_diffusion.critics import (
    MartingaleCritic,
    kl_to_go,
    log_ratio_to_go,
    returns,
    soft_error,
    squared_error,
)
from ctrl_diffusion.values import AbstractValue, ValueNetwork, identity, one, one_minus, one_minus_cosine

soft: Callable[[Any], Any] = attrgetter("soft")  # V*
mean: Callable[[Any], Any] = attrgetter("mean")  # E[r | x] under the law of the states
reference: Callable[[Any], Any] = attrgetter("reference")
optimum: Callable[[Any], Any] = attrgetter("optimum")

SOFT = partial(cd.Critic, target=returns, loss=soft_error)
MEAN = partial(cd.Critic, target=returns, loss=squared_error)


def plain(network: ValueNetwork, t0: float, t1: float) -> AbstractValue:
    """`F(t, x)`."""
    return cd.PlainValue(network, t0, t1)


def x0_prediction(network: ValueNetwork, t0: float, t1: float) -> AbstractValue:
    """`r(x_hat)`, and no network."""
    return cd.X0RewardValue(t0, t1)


class Variant(NamedTuple):
    """One variant. Defaults are those of the baseline.

    Attributes:
        name: of its file and its row.
        label: in figures, within the panel.
        form: `(network, t0, t1) -> value`.
        critic: `value -> critic`.
        noisy_reward: the reward branch sees the state `x` itself, `r(x)`, instead of its posterior mean, `r(x_hat)`.
        law: whose states it is trained and evaluated on: the `reference` or the `optimum` of a case.
        converges_to: the exact value that its loss is smallest at: `soft` or `mean`.
    """

    name: str
    label: str
    form: Callable[[ValueNetwork, float, float], AbstractValue] = cd.StructuredValue
    critic: Callable[[AbstractValue], cd.Critic] = SOFT
    noisy_reward: bool = False
    law: Callable[[Any], Any] = reference
    converges_to: Callable[[Any], Any] = soft


structured = partial(partial, cd.StructuredValue)

VARIANTS: tuple[Variant, ...] = (
    Variant("structured", "structured"),
    Variant("plain", "plain network", plain),
    Variant("x0_prediction", "r(x̂), not trained", x0_prediction, cd.Critic),
    Variant("cos_1-cos", "cos, 1 − cos", structured(c_out=one_minus_cosine)),
    Variant("linear", "1 − s, s", structured(c_skip=one_minus, c_out=identity)),
    Variant("constant", "1, sin", structured(c_skip=one)),
    Variant("noisy_network", "r(x̂), F(x)", structured(denoised=False)),
    Variant("noisy_reward", "r(x), F(x̂)", noisy_reward=True),
    Variant("noisy", "r(x), F(x)", structured(denoised=False), noisy_reward=True),
    Variant("mean", "mean", critic=MEAN, converges_to=mean),
    Variant("martingale", "martingale", critic=partial(MartingaleCritic, target=returns), converges_to=mean),
    Variant("td", "TD, horizon 0.1", critic=partial(MEAN, horizon=0.1), converges_to=mean),
    Variant("td_0", "TD, one step", critic=partial(MEAN, horizon=0.0), converges_to=mean),
    Variant("optimum_mean", "mean", critic=MEAN, law=optimum, converges_to=mean),
    Variant("optimum_kl", "mean, KL-to-go", critic=partial(MEAN, target=kl_to_go), law=optimum),
    Variant("optimum_soft", "soft, log-ratio-to-go", critic=partial(SOFT, target=log_ratio_to_go), law=optimum),
)
BY_NAME: dict[str, Variant] = {variant.name: variant for variant in VARIANTS}


class Panel(NamedTuple):
    """What is compared in one panel: names of variants, one factor varied; `labels` where the variants' own do not fit there."""

    title: str
    names: tuple[str, ...]
    labels: tuple[tuple[str, str], ...] = ()


PANELS: tuple[Panel, ...] = (
    Panel("Form", ("structured", "plain", "x0_prediction")),
    Panel("Coefficients", ("structured", "cos_1-cos", "linear", "constant"), (("structured", "cos, sin"),)),
    Panel("Inputs", ("structured", "noisy_network", "noisy_reward", "noisy"), (("structured", "r(x̂), F(x̂)"),)),
    Panel("Target, states of the reference", ("structured", "mean"), (("structured", "soft"),)),
    Panel("Target, states of the optimum", ("optimum_mean", "optimum_kl", "optimum_soft")),
    Panel("Loss, mean target", ("mean", "martingale", "td", "td_0"), (("mean", "regression"),)),
)
