"""Settings of `experiments.text_to_image`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal, get_args

from tyro.constructors import PrimitiveConstructorSpec

from ..devices import Devices
from ..names import AlgorithmName, ImageReward, SolverName
from ..random_model.config import TINY

PaperName = Literal["score_as_action", "sqdf", "vard", "ddpo"]
"""Of `experiments.text_to_image.settings.PUBLISHED`."""


def _reward(words: list[str]) -> str:
    """The name of a reward, or `module:function`; tyro explains the error."""
    if ":" not in words[0] and words[0] not in get_args(ImageReward):
        raise ValueError(words[0])
    return words[0]


RewardName = Annotated[
    str, PrimitiveConstructorSpec(1, "NAME|MODULE:FUNCTION", _reward, lambda v: isinstance(v, str), lambda name: [name])
]


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run. Batches are global: those of all devices together. Everything random derives from `seed`."""

    out: Path = Path("runs/text_to_image")
    """Folder for LoRA, logs, images and the gallery."""
    model: str = TINY
    """A folder of Stable Diffusion 1.x or 2.x as diffusers writes it, or tiny-random: a random one of 32x32 pixels, for trying out."""
    prompts: Path | None = None
    """File with one prompt per line, or .jsonl, .json, .csv, .tsv with a field called prompt (default: 45 animals). Prompts that the file
    repeats are drawn in proportion; other fields are given to rewards of your own."""
    held_out_prompts: Path | None = None
    """File with prompts that are evaluated and not trained on (default: every fifth of `prompts`)."""
    truncate: bool = False
    """Drop what is over the text encoder's 77 tokens, instead of refusing a longer prompt."""
    reward: tuple[RewardName, ...] = ("jpeg_compressibility",)
    """What to fine-tune for: jpeg_compressibility, jpeg_incompressibility, brightness, aesthetic, clip, pickscore, hps, imagereward, or
    module:function of your own, called with images [b, h, w, 3] in [-1, 1], a list of b prompts and, if
    it takes three arguments, a list of their other fields; or the
    address of a server, http://... (docs/image_rewards.md). Several are summed."""
    reward_weights: tuple[float, ...] = ()
    """Weights of several rewards (default: 1 each)."""
    reward_folder: Path = Path("rewards")
    """Where files of reward models lie, one folder for each: see docs/text_to_image.md."""
    algorithm: AlgorithmName = "score_as_action"
    """How to fine-tune: any algorithm of experiments.digits."""
    kl_weight: float | None = None
    """Weight lambda of the KL penalty (the temperature), reward units per nat of path KL. Default: that of the first reward; 0 for ddpo,
    draft, draft_1, alignprop, refl, which are published without a KL penalty."""
    guidance: float = 5.0
    """Weight of classifier-free guidance, part of the policy; 1 is none."""
    negative_prompt: str = ""
    """Prompt that guidance leads away from."""
    steps: int = 20
    """Timesteps of the sampler, spaced as the model's scheduler says."""
    eta: float = 1.0
    """Noise level of the sampler: 1 is ancestral sampling (DDPM), 0 is DDIM (which fine-tuning cannot explore from)."""
    size: int | None = None
    """Height and width of images, pixels (default: the model's)."""
    train: Literal["lora", "full"] = "lora"
    """lora: train LoRA of the UNet; full: train the whole UNet."""
    lora_rank: int = 4
    """Rank of LoRA."""
    lora_alpha: float | None = None
    """LoRA is multiplied by alpha / rank (default: rank)."""
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Layers that have LoRA, by the ends of their names."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of frozen parameters and of the networks; latents, likelihoods, KL and LoRA are float32."""
    remat: bool = False
    """Recompute the activations of the UNet's layers for the gradient: less memory, a third more time."""
    attention: Literal["by-head", "xla", "cudnn"] | None = None
    """Implementation of attention (default: that for the device). by-head, for CPUs: one image and head at a time; xla: all at once; cudnn:
    flash attention of NVIDIA devices from compute capability 8.0 on, with bfloat16."""
    attention_chunk: int | None = None
    """Pixels that attend to all others at a time (default: all, by-head 2^21 over the pixels): less memory, where the device has no flash
    attention."""
    iterations: int = 10
    """Fine-tuning iterations: sample, evaluate, update."""
    batch: int = 16
    """Images per iteration."""
    samples_per_prompt: int = 4
    """Images of one prompt in an iteration, among which returns are compared."""
    rollouts: int = 1
    """Sample the images of an iteration in so many parts, one after the other: less memory."""
    times: int | None = None
    """Timesteps of every path that are trained on, drawn anew in every iteration (default: all)."""
    epochs: int = 1
    """Passes over the paths of an iteration."""
    minibatches: int = 4
    """Updates per pass."""
    accumulation: int = 1
    """Microbatches that an update is computed in, one after the other: less memory, the same update."""
    stratified: bool = False
    """Deal each group of consecutive transitions out to the minibatches instead of shuffling all: nothing moves between devices."""
    scan_minibatches: bool = False
    """Run a pass over the minibatches as one program: faster where updates are short."""
    learning_rate: float = 3e-4
    """Adam learning rate of the policy."""
    value_learning_rate: float = 1e-3
    """Adam learning rate of the value network."""
    value: Literal["plain", "structured"] = "plain"
    """plain: the value network alone; structured: added to the reward of the decoded x0 prediction, as published for Score as Action."""
    clip: float | tuple[float, float] | None = None
    """The likelihood ratio of a step is clipped to 1 +- clip (default: 0.2; inf: not clipped), where an algorithm has one; two numbers are
    how far below and above 1 it may go."""
    kl_radius: float | None = None
    """Path KL of an update, nats (default: 0.05; only with --algorithm score_as_action_trpo)."""
    horizon: float | None = None
    """Decay time of the advantages, control time (default: 0, single value increments; inf: Monte Carlo returns), where an algorithm has
    one."""
    kl_budget: float | None = None
    """Stop when the samples' path KL to the original model exceeds this many nats."""
    average: float | None = None
    """Evaluate and save a running average of the parameters, with this decay per update, as 0.99 (default: no average)."""
    decode_chunk: int = 8
    """Images that are decoded and rewarded together, of all devices: a multiple of their number keeps all of them busy."""
    evaluation_samples: int = 32
    """Images of each evaluation, for the training prompts and again for those held out: at least two per prompt."""
    evaluate_every: int = 10
    """Iterations between evaluations."""
    evaluation_solvers: tuple[SolverName, ...] = ("DPMSolverPP2M",)
    """Solvers of the probability-flow ODE that the result is evaluated with at the end, at `steps`."""
    evaluation_steps: tuple[int, ...] = (10,)
    """Other numbers of timesteps that the result is evaluated with at the end."""
    checkpoint_every: int = 5
    """Iterations between checkpoints, each with its LoRA."""
    seed: int = 0
    """Seed of everything random."""
    use_previous_checkpoint: bool = False
    """If the newest checkpoint cannot be read, delete it and resume from the one before."""
    devices: Devices = Devices()
    """Devices that share the run."""
