"""A text-to-image model as a problem: the model from its folder, prompts, reward, sampler, algorithm."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ctrl_diffusion as cd
from ctrl_diffusion import stable_diffusion as sd
from ctrl_diffusion.parallel import Layout
from ctrl_diffusion.runs import is_first, wait_for_all

from .. import algorithm_registry as registry
from ..algorithm_registry import AlgorithmSettings, choose, require_gradient
from ..random_model.config import TINY, Config as RandomModel
from ..random_model.writer import write_random_model
from ..reward_registry import RewardSettings, make_reward
from ..solver_registry import SOLVERS
from .checks import kl_weight_of
from .config import Config
from .prompts import Prompt, read_prompts


class Parts(NamedTuple):
    """Everything that a run is made of.

    Attributes:
        model: from the folder; its UNet has LoRA, if that is trained.
        params: what is trained, `base`: the rest of the UNet, `denoise(params, base, ...)`: what it predicts.
        prompts: to train on, then those held out, of which there are `held_out`; `weights`: how often each is to be drawn.
        contexts: of all prompts, `empty`: of the negative one.
        decode: latents to images.
        reward: of latents, conditional on the number of a prompt.
    """

    model: sd.StableDiffusion
    params: Any
    base: Any
    denoise: Any
    prompts: list[str]
    weights: list[int]
    held_out: int
    contexts: jax.Array
    empty: jax.Array
    decode: Any
    reward: cd.rewards.Reward

    @property
    def trained(self) -> int:
        """Number of prompts that are trained on."""
        return len(self.prompts) - self.held_out


def load_parts(config: Config, layout: Layout) -> Parts:
    """Read the model and the reward, and encode the prompts."""
    folder = config.out / TINY if config.model == TINY else sd.find_folder(config.model)
    if config.model == TINY:
        if is_first() and not folder.is_dir():
            write_random_model(RandomModel(folder, seed=config.seed))
        wait_for_all("the model is written")
    trained, held_out = read_prompts(config)
    prompts = [*trained, *held_out]
    check_lengths(folder, prompts, config.truncate)

    def place(name: str, shape: tuple[int, ...]):
        return None if layout.mesh is None else layout.parameters(jax.ShapeDtypeStruct(shape, jnp.float32))

    model = sd.load_folder(folder, **network_options(config), cast=True, sharding=place)
    if config.train == "lora":
        sd.add_lora(
            model.unet, config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets, rngs=nnx.Rngs(config.seed)
        )
    denoise, params, base = (sd.split_lora if config.train == "lora" else sd.split_full)(model.unet)
    params = jax.tree.map(lambda v: v, params)  # apart from the network, which results are put into
    texts = [prompt.text for prompt in prompts]
    contexts = sd.encode_prompts(model, [*texts, config.negative_prompt], truncate=config.truncate)
    decode = sd.decoder(model.vae, config.decode_chunk)
    metadata = [prompt.metadata for prompt in prompts]
    reward_settings = RewardSettings(prompts=texts, metadata=metadata, folder=config.reward_folder, chunk=config.decode_chunk)
    of_images = make_reward(config.reward, config.reward_weights, reward_settings)
    reward = cd.seen_through(decode, of_images, chunk=config.decode_chunk)
    require_gradient(config.algorithm, reward)
    weights = [prompt.weight for prompt in prompts]
    return Parts(model, params, base, denoise, texts, weights, len(held_out), contexts[:-1], contexts[-1], decode, reward)


def check_lengths(folder: Path, prompts: list[Prompt], truncate: bool) -> None:
    """Refuse prompts that the text encoder cannot take, by file and line, before the networks are read."""
    if truncate or not (folder / "tokenizer").is_dir():  # without one load_folder says so
        return
    tokenizer = sd.load_tokenizer(folder / "tokenizer")
    limit = min(tokenizer.model_max_length, 77)
    for prompt, ids in zip(prompts, tokenizer([prompt.text for prompt in prompts])["input_ids"]):
        if len(ids) > limit:
            raise ValueError(
                f"{prompt.place or 'prompts'}: {prompt.text[:60]!r}... has {len(ids)} tokens, over {limit}: shorten it, or pass "
                "--truncate to drop what is over."
            )


def network_options(config: Config) -> dict[str, Any]:
    """How the networks compute, as keyword arguments of them all."""
    dtype = jnp.bfloat16 if config.precision == "bfloat16" and config.train == "lora" else jnp.float32
    attention = make_attention(config.attention, config.precision, config.attention_chunk)
    return dict(dtype=config.precision, param_dtype=dtype, remat=config.remat, attention=attention)


def suited_attention(precision: str, chunk: int | None = None, device: Any = None) -> str:
    """The name of the attention that suits the device (default: the first): flash kernels where there are some."""
    device = jax.devices()[0] if device is None else device
    if device.platform == "cpu":
        return "by-head"
    flash = device.platform == "gpu" and "cuda" in device.client.platform_version and float(device.compute_capability) >= 8
    return "cudnn" if flash and precision == "bfloat16" and chunk is None else "xla"


def make_attention(name: str | None, precision: str, chunk: int | None = None) -> sd.AttentionFn:
    """The function of `--attention`, by default what suits the device, and of `--attention-chunk`."""
    name = name or suited_attention(precision, chunk)
    if name == "by-head":
        return sd.head_by_head(chunk)
    attention = sd.flash_attention if name == "cudnn" else jax.nn.dot_product_attention
    return attention if chunk is None else sd.chunked_attention(chunk, attention)


def make_sampler(config: Config, parts: Parts, *, steps: int, eta: float, solver: str = "ExponentialEuler") -> cd.Sampler:
    """The sampler of the guided score at the timesteps that the model's scheduler would take.

    It ends at the first entry of the noise table instead of at zero noise, where a step has no likelihood.
    """
    noising = dataclasses.replace(parts.model.noising, set_alpha_to_one=False)
    process = noising.process(steps, eta)
    control = sd.GuidedScore(parts.denoise, parts.base, parts.contexts, parts.empty, config.guidance, noising, process)
    return cd.Sampler(
        process, control, latent_shape(config, parts.model), grid=noising.grid(steps), solver=SOLVERS[solver].solver
    )


def latent_shape(config: Config, model: sd.StableDiffusion) -> tuple[int, int, int]:
    """Height, width and channels of the latents."""
    factor = 2 ** (len(model.vae.config.block_out_channels) - 1)
    halved = 2 ** (len(model.unet.config.block_out_channels) - 1)
    own = model.unet.config.sample_size
    if config.size is None:
        if own is None:
            raise ValueError("size=None: the model's folder does not say its size: set it, in pixels.")
        height, width = own if isinstance(own, tuple) else (own, own)
    else:
        if config.size % (factor * halved):
            raise ValueError(f"size={config.size} must be a multiple of {factor * halved} pixels for this model.")
        height = width = config.size // factor
    return height, width, model.unet.config.in_channels


def make_algorithm(config: Config, parts: Parts, sampler: cd.Sampler, layout: Layout) -> tuple[cd.algorithms.Algorithm, Any]:
    """The algorithm by its name, and initial parameters of its value."""
    prompts = sd.drawn_prompts(parts.trained, config.samples_per_prompt, parts.weights[: parts.trained])
    objective = cd.Objective(sampler, parts.reward, kl_weight_of(config), conditions=prompts)
    network = sd.LatentValue(sampler.shape[-1], parts.trained, rngs=nnx.Rngs(config.seed + 1))
    value_fn, value_params = cd.value_network(network)
    form = cd.StructuredValue if config.value == "structured" else cd.PlainValue
    value = form(value_fn, sampler.process.t0, sampler.process.t1)
    times = None if config.times is None else cd.algorithms.TimeSampling(config.times)
    training = cd.Training(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.learning_rate)), config.batch, config.epochs,
        config.minibatches, optax.adam(config.value_learning_rate), times, config.rollouts, layout, config.accumulation,
        config.average, config.stratified, config.scan_minibatches,
    )  # fmt: skip
    choice = choose(config.algorithm)
    algorithm = registry.make_algorithm(config.algorithm, AlgorithmSettings(objective, value, training), config)
    return algorithm, value_params if choice.learns_value else ()


def save_trained(parts: Parts, params: Any, folder: Path, train: str) -> None:
    """Write LoRA (or the whole UNet) with these parameters, as diffusers reads it; never half-written."""
    state = jax.tree.map(jnp.asarray, params)
    nnx.update(parts.model.unet, state)
    folder.parent.mkdir(parents=True, exist_ok=True)
    (sd.save_lora if train == "lora" else sd.save_network)(parts.model.unet, folder)


def rows_of_prompts(first: int, count: int, n: int) -> np.ndarray:
    """Numbers of prompts for `n` images: `count` prompts from `first` on, in turn."""
    return (first + np.arange(n) % count).astype(np.int32)
