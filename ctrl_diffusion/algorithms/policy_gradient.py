"""Policy gradients without a critic: every step is credited with the whole return, less the batch's own baseline."""

from collections.abc import Callable

import optax

from ..exploration import AbstractExploration
from ..rewards import Reward
from ..sampler import Sampler
from ..values import NoValue
from .score_as_action import Algorithm, score_as_action


def ddpo(
    sampler: Sampler,
    reward: Reward | Callable,
    *,
    batch: int,
    optimizer: optax.GradientTransformation,
    exploration: AbstractExploration | None = None,
    epochs: int = 1,
    minibatches: int = 1,
    clip: float = 0.2,
) -> Algorithm:
    r"""DDPO, importance-sampled: `sum_j min(rho_j A, clip(rho_j) A)` with `A = (r - mean r) / std r`, no price of the KL.

    The objective `E r` has no maximiser in general: read its reward against its path KL. Black et al. 2024, section 4.3;
    log-ratios are summed over state dimensions (their code averages them), and the statistics are those of the batch, because
    there are no prompts.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{black2024ddpo, title={Training Diffusion Models with Reinforcement Learning},
          author={Black, Kevin and Janner, Michael and Du, Yilun and Kostrikov, Ilya and Levine, Sergey},
          booktitle={ICLR}, year={2024}}
        ```
    """
    return score_as_action(
        sampler, reward, NoValue(sampler.process.t0, sampler.process.t1), kl_weight=0.0, horizon=float("inf"), normalise="time",
        batch=batch, optimizer=optimizer, value_optimizer=optax.identity(), exploration=exploration, epochs=epochs,
        minibatches=minibatches, clip=clip,
    )  # fmt: skip


def dpok(
    sampler: Sampler,
    reward: Reward | Callable,
    *,
    kl_weight: float,
    batch: int,
    optimizer: optax.GradientTransformation,
    exploration: AbstractExploration | None = None,
    epochs: int = 1,
    minibatches: int = 1,
    clip: float = float("inf"),
) -> Algorithm:
    r"""DPOK: likelihood ratio of the return, with the path KL priced: `A_j = r - lambda sum_{l >= j} kl_l`, less its batch mean.

    Fan et al. 2023, algorithm 1. Their gradient leaves out the KL of later steps, `kl_l` for `l > j`; it is part of the return
    here, as the maximiser of J needs. The baseline is the mean over the batch instead of a learned one.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{fan2023dpok, title={DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models},
          author={Fan, Ying and Watkins, Olivia and Du, Yuqing and Liu, Hao and Ryu, Moonkyung and Boutilier, Craig and Abbeel,
          Pieter and Ghavamzadeh, Mohammad and Lee, Kangwook and Lee, Kimin}, booktitle={NeurIPS}, year={2023}}
        ```
    """
    return score_as_action(
        sampler, reward, NoValue(sampler.process.t0, sampler.process.t1), kl_weight=kl_weight, horizon=float("inf"),
        normalise="centre", batch=batch, optimizer=optimizer, value_optimizer=optax.identity(), exploration=exploration,
        epochs=epochs, minibatches=minibatches, clip=clip,
    )  # fmt: skip
