"""The plan of `experiments.text_to_image` with Stable Diffusion 1.5, of whose networks only the shapes are made."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import ctrl_diffusion as cd
from ctrl_diffusion import stable_diffusion as sd
from ctrl_diffusion.parallel import ONE_DEVICE, Layout

from ..random_model.writer import SIZES
from ..text_to_image.checks import kl_weight_of
from ..text_to_image.config import Config
from ..text_to_image.parts import Parts, make_algorithm, make_sampler, network_options
from ..text_to_image.prompts import read_prompts


def planned_config(given: dict[str, Any]) -> Config:
    """Settings of a LoRA run in bfloat16 with layers recomputed; `given` are those that differ."""
    own: dict[str, Any] = dict(
        precision="bfloat16",
        remat=True,
        steps=50,
        batch=64,
        samples_per_prompt=1,
        minibatches=4,
        accumulation=50,
        attention="xla",
    )
    return Config(**(own | given))


def abstract_parts(config: Config, size: str = "sd15") -> Parts:
    """What `load_parts` gives, in shapes: a random model's descriptions, LoRA, contexts; the reward is a black box on the host."""
    networks = SIZES[size]
    options = network_options(config)
    unet = sd.abstract_network(lambda rngs: sd.UNet(networks.unet, **options, rngs=rngs))
    vae = sd.abstract_network(lambda rngs: sd.VAE(networks.vae, **options, rngs=rngs))
    if config.train == "lora":
        sd.add_lora(unet, config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets, rngs=nnx.Rngs(0))
    denoise, params, base = (sd.split_lora if config.train == "lora" else sd.split_full)(unet)
    trained, held_out = read_prompts(config)
    prompts = [prompt.text for prompt in (*trained, *held_out)]
    weights = [prompt.weight for prompt in (*trained, *held_out)]
    shape = (networks.text.max_position_embeddings, networks.text.hidden_size)
    model = sd.StableDiffusion(unet, vae, None, None, sd.Noising())  # pyright: ignore[reportArgumentType]
    reward = cd.black_box(lambda x: x.mean(axis=(1, 2, 3)), "reward")
    contexts: Any = jax.ShapeDtypeStruct((len(prompts), *shape), jnp.float32)
    empty: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    return Parts(model, params, base, denoise, prompts, weights, len(held_out), contexts, empty, None, reward)


def text_to_image_programs(config: Config, size: str = "sd15") -> tuple[Any, Any, Any]:
    """`algorithm(layout, batch)`, and the shapes of what is trained and of the value."""
    parts = abstract_parts(config, size)
    sampler = make_sampler(config, parts, steps=config.steps, eta=config.eta)

    def algorithm(layout: Layout, batch: int) -> cd.algorithms.Algorithm:
        return make_algorithm(dataclasses.replace(config, batch=batch), parts, sampler, layout)[0]

    _, value_params = make_algorithm(config, parts, sampler, ONE_DEVICE)
    assert kl_weight_of(config) >= 0
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), (parts.params, value_params))
    return algorithm, *shapes
