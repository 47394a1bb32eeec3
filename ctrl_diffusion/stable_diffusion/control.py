r"""A text-to-image model as a controlled process. The action is the *guided* score, and the condition is a prompt.

    a(t, x; p) = score of   e_empty + w (e_p - e_empty),      e_p = UNet(x, timestep(t), context of prompt p)

Guidance is part of the policy: paths are sampled with it, path KL is computed with it, and gradients pass through both branches.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ..chunks import in_chunks
from ..pretrained.vae import VAE
from ..process import DiffusionProcess, Params, State
from .folder import StableDiffusion
from .noising import Noising

Denoiser = Callable[..., Float[Array, "b h w c"]]


class GuidedScore(eqx.Module):
    """The guided score as a control, `(params, t, x [b, h, w, 4], prompt [b]) -> [b, h, w, 4]`; a prompt is given by its number.

    Args:
        denoise: the UNet's prediction `denoise(params, base, x, timesteps [b], context [b, n, e]) -> [b, h, w, 4]`, from `split_lora` or
            `split_full`.
        base: parameters of the UNet that are not trained.
        contexts: contexts of all prompts, `[p, n, e]`.
        empty: the context of the empty prompt or of a negative prompt, `[n, e]`.
        guidance: the guidance scale `w`; 1 is no guidance, at half the cost.
        noising: the noising that the network was trained with.
        process: the process of this score, from `noising.process`.
    """

    denoise: Denoiser = eqx.field(static=True)
    base: Any
    contexts: Any  # [p, n, e]; a shape where programs are planned only
    empty: Any  # [n, e]
    guidance: float = eqx.field(static=True)
    noising: Noising = eqx.field(static=True)
    process: DiffusionProcess

    def __call__(self, params: Params, t, x: State, prompt: Int[Array, " b"]) -> State:
        tau = jnp.broadcast_to(self.process.tau(t), x.shape[:1])
        timesteps, context = self.noising.timestep(tau), self.contexts[prompt]
        if self.guidance == 1:
            prediction = self.denoise(params, self.base, x, timesteps, context)
        else:
            # the branches of a row one after the other, so that both are on its device
            both = jnp.stack([context, jnp.broadcast_to(self.empty, context.shape)], 1).reshape(-1, *self.empty.shape)
            found = self.denoise(params, self.base, jnp.repeat(x, 2, 0), jnp.repeat(timesteps, 2), both)
            text, empty = jnp.moveaxis(found.reshape(-1, 2, *x.shape[1:]), 1, 0)
            prediction = empty + self.guidance * (text - empty)
        return self.noising.prediction.to_score(self.process.schedule, tau, x, prediction)


class Decoder(eqx.Module):
    """Decodes latents of the diffusion model `[b, h, w, 4]` to images `[b, H, W, 3]`, clipped to [-1, 1], `chunk` at a time.

    Memory is that of one chunk, also for the gradient: the backward pass decodes again.
    """

    graphdef: Any = eqx.field(static=True)
    params: Any
    chunk: int = eqx.field(static=True)

    def __call__(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        vae = nnx.merge(self.graphdef, self.params)
        return jnp.clip(in_chunks(vae.to_images, self.chunk)(latents), -1, 1)


def decoder(vae: VAE, chunk: int = 8) -> Decoder:
    """The decoder of a VAE, as a function of latents that holds its parameters."""
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1: it is the number of images that are decoded together.")
    return Decoder(*nnx.split(vae), chunk)


def encode_prompts(
    model: StableDiffusion, prompts: Sequence[str], *, chunk: int = 32, truncate: bool = False
) -> Float[Array, "p n e"]:
    """Contexts of prompts, float32 `[p, n, e]`, computed `chunk` at a time. Prompts that are too long are refused unless `truncate`."""
    graphdef, params = nnx.split(model.text_encoder)
    length = model.text_encoder.config.max_position_embeddings
    encode = jax.jit(lambda params, ids: nnx.merge(graphdef, params)(ids).last_hidden_state.astype(jnp.float32))
    found = []
    for i in range(0, len(prompts), chunk):
        ids = model.tokens([*prompts[i : i + chunk]], truncate=truncate)
        padded = np.concatenate([ids, np.zeros((chunk - len(ids), length), ids.dtype)])
        found.append(encode(params, jnp.asarray(padded))[: len(ids)])
    if not found:
        raise ValueError("prompts is empty: give at least one.")
    return jnp.concatenate(found)


def drawn_prompts(
    count: int, per_prompt: int, weights: Sequence[int | float] | None = None
) -> Callable[[Any, int], Int[Array, " n"]]:
    """A function that draws the conditions of an iteration: random prompts out of `count`, each for `per_prompt` consecutive paths.

    If there are enough prompts, none is drawn twice. With `weights` they are drawn in proportion (those that are left, if none is drawn
    twice).
    """
    if count < 1 or per_prompt < 1:
        raise ValueError(f"count={count} and per_prompt={per_prompt} must be at least 1.")
    p = None
    if weights is not None and len(set(weights)) > 1:
        p = jnp.asarray(weights, jnp.float32) / sum(weights)

    def law(key, n):
        if n % per_prompt:
            raise ValueError(f"per_prompt={per_prompt} must divide the number of paths, {n}.")
        groups = n // per_prompt
        chosen = jax.random.choice(key, count, (groups,), replace=groups > count, p=p)
        return jnp.repeat(chosen, per_prompt)

    return law
