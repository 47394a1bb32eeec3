"""The parity gate is sharp: each of these mistakes, some of them made in published ports, goes past it.

Not collected by default, as other mutations: `python -m pytest tests/mistakes_in_stable_diffusion.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ctrl_diffusion.pretrained import layers, resnet, transformer, vae as vae_module
from ctrl_diffusion.stable_diffusion import (
    VAE,
    CLIPText,
    UNet,
    blocks,
    load_network,
    unet as unet_module,
)
from tests.stable_diffusion_reference import (
    GATE,
    call,
    nchw,
    nhwc,
    normal,
    relative,
    saved,
    tensor,
    text_encoder,
    torch,
    unet,
    vae,
)

LATENTS, CONTEXT, IMAGES = (jnp.asarray(normal(*shape)) for shape in ((0, 2, 8, 8, 4), (1, 2, 7, 24), (2, 1, 16, 16, 3)))
TIMESTEPS, IDS = jnp.asarray([1.0, 981.0]), jnp.asarray([[514, 5, 6, 515, 515, 515]])


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """By class: the folder of a model, and its outputs."""
    folder = tmp_path_factory.mktemp("references")
    models = {UNet: unet(), VAE: vae(), CLIPText: text_encoder()}
    with torch.no_grad():
        posterior = models[VAE].encode(nchw(IMAGES)).latent_dist
        outputs = {
            UNet: [call(models[UNet], LATENTS, TIMESTEPS, CONTEXT)],
            VAE: [nhwc(posterior.mean), nhwc(models[VAE].decode(posterior.mean).sample)],
            CLIPText: list(models[CLIPText](tensor(np.asarray(IDS, np.int64))).to_tuple()[:2]),
        }
    return {cls: (saved(model, folder / cls.__name__), outputs[cls]) for cls, model in models.items()}


def run(network):
    """Not compiled: compilation would take longer than the few operations, and would miss patches."""
    if isinstance(network, UNet):
        return [network(LATENTS, TIMESTEPS, CONTEXT)]
    if isinstance(network, VAE):
        mean = network.encode(IMAGES).mean
        return [mean, network.decode(mean)]
    return list(network(IDS))


def difference(references, cls, network) -> float:
    return max(relative(got, expected) for got, expected in zip(run(network), references[cls][1]))


def modules(network, kind):
    return [module for _, module in nnx.iter_modules(network) if isinstance(module, kind)]


# --- mistakes in the code: patches that are made before the network is


def tanh_gelu(patch):
    patch.setattr(blocks, "erf_gelu", functools.partial(jax.nn.gelu, approximate=True))


def exact_gelu_for_quick_gelu(patch):
    patch.setitem(transformer.ACTIVATIONS, "quick_gelu", layers.erf_gelu)


def group_norm_eps(patch):
    """1e-5 for 1e-6 in front of the transformers."""
    correct = layers.Layers.group_norm
    patch.setattr(layers.Layers, "group_norm", lambda self, n, groups, eps: correct(self, n, groups, 1e-5))


def layer_norm_eps(patch):
    correct = layers.Layers.layer_norm
    patch.setattr(layers.Layers, "layer_norm", lambda self, n, eps: correct(self, n, 1e-6))


def symmetric_padding(patch):
    correct = layers.Layers.conv
    patch.setattr(layers.Layers, "conv", lambda self, *a, padding=None, **options: correct(self, *a, **options))


def same_padding(patch):
    """What `SAME` means to XLA at a stride of 2: nothing on the left and on top."""
    correct = layers.Layers.conv
    patch.setattr(
        layers.Layers,
        "conv",
        lambda self, n, m, size=3, stride=1, padding=None: correct(
            self, n, m, size, stride, (0, 1) if stride == 2 else padding
        ),
    )


def queries_for_keys(patch):
    swap = ((r"\bto_q\b", "to_x"), (r"\bto_k\b", "to_q"), (r"\bto_x\b", "to_k"))
    patch.setattr(vae_module, "NAMES", vae_module.NAMES._replace(renamed=swap + vae_module.NAMES.renamed))


def halves_of_the_gate(patch):
    def swapped(self, x):
        gate, a = jnp.split(self.enter(x), 2, axis=-1)
        return self.leave(a * layers.erf_gelu(gate))

    patch.setattr(blocks.FeedForward, "__call__", swapped)


def bilinear_upsampling(patch):
    def bilinear(h, height, width):
        return jax.image.resize(h, (h.shape[0], height, width, h.shape[3]), "bilinear")

    patch.setattr(unet_module, "upsample", bilinear)
    patch.setattr(vae_module, "upsample", bilinear)


def time_without_silu(patch):
    def call(self, h, time=None):
        return correct(self, h, None if time is None else time * (1 + jnp.exp(-time)))  # silu of which is about time

    correct = resnet.ResNetBlock.__call__
    patch.setattr(resnet.ResNetBlock, "__call__", call)


# --- mistakes in the network: changes made after loading


def without(name):
    """Zero for a bias, one for a scale."""

    def change(network):
        *path, leaf = name.split(".")
        module = functools.reduce(lambda m, part: m[int(part)] if part.isdigit() else getattr(m, part), path, network)
        variable = getattr(module, leaf)
        variable[...] = jnp.full_like(variable[...], leaf == "scale")

    change.__name__ = f"without {name}"
    return change


def configured(**changes):
    def change(network):
        network.config = dataclasses.replace(network.config, **changes)

    change.__name__ = f"configured {changes}"
    return change


def another_number_of_heads(network):
    for module in modules(network, transformer.Attention):
        module.heads = 2 if module.heads == 4 else 1 if module.heads == 3 else 2


def attention_without_scale(network):
    for module in modules(network, transformer.Attention):
        module.attention = functools.partial(jax.nn.dot_product_attention, scale=1.0)


def swapped_queries_and_keys(network):
    for module in modules(network, transformer.Attention):
        if module.to_q.kernel.shape == module.to_k.kernel.shape:
            module.to_q, module.to_k = module.to_k, module.to_q


def attention_that_sees_the_future(network):
    for module in modules(network, transformer.Attention):
        module.causal = False


IN_CODE = [
    (UNet, tanh_gelu),
    (CLIPText, exact_gelu_for_quick_gelu),
    (UNet, group_norm_eps),
    (VAE, group_norm_eps),
    (UNet, layer_norm_eps),
    (CLIPText, layer_norm_eps),
    (VAE, symmetric_padding),
    (UNet, same_padding),
    (VAE, queries_for_keys),
    (UNet, halves_of_the_gate),
    (UNet, bilinear_upsampling),
    (VAE, bilinear_upsampling),
    (UNet, time_without_silu),
]
IN_NETWORK = [
    (UNet, without("conv_out.bias")),
    (UNet, without("conv_norm_out.bias")),
    (UNet, without("conv_norm_out.scale")),
    (UNet, without("down_blocks.0.downsampler.bias")),
    (UNet, without("down_blocks.0.attentions.0.transformer_blocks.0.norm2.bias")),
    (UNet, without("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.bias")),
    (UNet, without("up_blocks.1.resnets.0.conv_shortcut.bias")),
    (VAE, without("quant_conv.bias")),
    (VAE, without("post_quant_conv.bias")),
    (VAE, without("encoder.mid_block.attentions.0.attention.to_q.bias")),
    (VAE, without("decoder.conv_norm_out.bias")),
    (CLIPText, without("embeddings.position_embedding.embedding")),
    (CLIPText, without("final_layer_norm.bias")),
    (UNet, configured(flip_sin_to_cos=False)),
    (UNet, configured(freq_shift=1.0)),
    (CLIPText, configured(eos_token_id=5)),
    (UNet, another_number_of_heads),
    (VAE, another_number_of_heads),
    (CLIPText, another_number_of_heads),
    (UNet, attention_without_scale),
    (VAE, attention_without_scale),
    (CLIPText, attention_without_scale),
    (UNet, swapped_queries_and_keys),
    (VAE, swapped_queries_and_keys),
    (CLIPText, swapped_queries_and_keys),
    (CLIPText, attention_that_sees_the_future),
]


def label(value):
    return value.__name__


@pytest.mark.parametrize("cls", [UNet, VAE, CLIPText], ids=label)
def test_without_a_mistake(references, cls):
    assert difference(references, cls, load_network(cls, references[cls][0])) < GATE


@pytest.mark.parametrize(("cls", "mistake"), IN_CODE, ids=label)
def test_mistake_in_the_code(references, cls, mistake, monkeypatch):
    mistake(monkeypatch)
    assert difference(references, cls, load_network(cls, references[cls][0])) > GATE


@pytest.mark.parametrize(("cls", "mistake"), IN_NETWORK, ids=label)
def test_mistake_in_the_network(references, cls, mistake):
    network = load_network(cls, references[cls][0])
    mistake(network)
    assert difference(references, cls, network) > GATE
