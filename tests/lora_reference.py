"""A UNet in miniature with LoRA that matters."""

import jax.numpy as jnp
from flax import nnx

from ctrl_diffusion.stable_diffusion import add_lora, lora_parameters
from tests.stable_diffusion_reference import normal

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# linear layers, 1x1 convolutions, and inputs and outputs of different widths
TARGETS = ("to_q", "to_k", "to_out.0", "proj_in", "net.0.proj", "time_emb_proj", "conv_shortcut")
RANK, ALPHA = 4, 6.0
DIFFUSERS, PEFT, CONFIG = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"
INPUTS = jnp.asarray(normal(0, 2, 8, 6, 4)), jnp.asarray([1.0, 981.0]), jnp.asarray(normal(1, 2, 7, 24))


def leaves(state):
    """Arrays by their path."""
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def randomised(network):
    """Every parameter of LoRA moved, so that all of them matter."""
    for i, (_, parameter) in enumerate(sorted(nnx.to_flat_state(lora_parameters(network)))):
        parameter[...] = jnp.asarray(normal(i, *parameter.shape) * 0.5 * parameter.shape[0] ** -0.5)
    return network


def changed(network):
    """A copy with LoRA of two ranks and alphas, none of which are the same."""
    network = nnx.clone(network)
    add_lora(network, RANK, alpha=ALPHA, targets=TARGETS, rngs=nnx.Rngs(0))
    add_lora(network, 3, alpha=1.5, targets=["attn2.to_v"], rngs=nnx.Rngs(1))
    return randomised(network)
