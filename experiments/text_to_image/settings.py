"""Settings of papers for `experiments.text_to_image`, by name: `--settings NAME`, which other options change."""

from typing import Any, NamedTuple

from ctrl_diffusion.conversions import sqdf_kl_weight, summed_clip

from .config import Config

LATENTS = 64 * 64 * 4
SD = "stable-diffusion-v1-5"


class Published(NamedTuple):
    """A paper's settings.

    Attributes:
        link: where they are from.
        settings: in terms of `Config`.
        differs: what `Config` cannot express, or what is done differently here.
        known: numbers that the paper or its code reports.
    """

    link: str
    settings: dict[str, Any]
    differs: str
    known: str

    @property
    def config(self) -> Config:
        return Config(**self.settings)


COMMON: dict[str, Any] = dict(model=SD, steps=50, eta=1.0, precision="bfloat16", remat=True, checkpoint_every=5)

PUBLISHED: dict[str, Published] = {
    "score_as_action": Published(
        "https://arxiv.org/abs/2502.01819",
        COMMON | dict(
            reward=("imagereward",), algorithm="score_as_action_published", guidance=7.0, learning_rate=5e-5,
            clip=summed_clip(1.5e-5, LATENTS), batch=512, samples_per_prompt=1, rollouts=8, minibatches=2, accumulation=400,
            iterations=100, value="structured", value_learning_rate=1e-7, evaluation_steps=(25, 100),
        ),
        "The paper's value has two ImageReward networks, of which the second is trained in part; here the second is a small "
        "convolutional one, which learns from nothing (raise --value-learning-rate). Adam without its weight decay of 1e-4. "
        "Advantages are not clamped.",
        "Evaluated at 25 and 100 steps after training at 50, with the gain kept.",
    ),
    "sqdf": Published(
        "https://arxiv.org/abs/2512.04559",
        COMMON | dict(
            reward=("aesthetic",), algorithm="sqdf", guidance=5.0, learning_rate=1e-3, lora_rank=4, batch=64,
            samples_per_prompt=1, kl_weight=sqdf_kl_weight(2.0, LATENTS), times=1, minibatches=1, accumulation=4,
            iterations=240,
        ),
        "The x0 prediction is the posterior mean; the paper's is a step of a consistency model. The buffer holds eight "
        "batches (512 paths; the paper: 1024). Adam without its weight decay of 1e-4.",
        "Aesthetic score 7.87 in its black-box setting, with 15,360 calls of the reward.",
    ),
    "vard": Published(
        "https://arxiv.org/abs/2505.15791",
        COMMON | dict(
            reward=("jpeg_compressibility",), algorithm="vard", guidance=5.0, learning_rate=3e-4, batch=64, samples_per_prompt=1,
            kl_weight=0.01, times=5, minibatches=4, accumulation=5, iterations=100,
        ),
        "A reconstruction: the paper's loss and constants are not public in code, so that learning rates, batch and KL weight are ours.",
        "None that these settings could be held to.",
    ),
    "ddpo": Published(
        "https://arxiv.org/abs/2305.13301",
        COMMON | dict(
            reward=("aesthetic",), algorithm="ddpo", guidance=5.0, learning_rate=3e-4, lora_rank=4,
            clip=summed_clip(1e-4, LATENTS), batch=256, samples_per_prompt=4, rollouts=4, minibatches=2, accumulation=200,
            iterations=100,
        ),
        "Returns are compared among the images of a prompt in the same iteration; the code keeps statistics of every prompt over "
        "iterations instead. Advantages are not clamped.",
        "Rewards rise over 100 iterations; collapse of diversity is reported beyond.",
    ),
}  # fmt: skip
HARDWARE = "a TPU v5e-16 slice or a GPU of 80 GB"
