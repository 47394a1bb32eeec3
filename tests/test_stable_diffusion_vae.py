"""The autoencoder and the text encoder against diffusers' and transformers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ctrl_diffusion.stable_diffusion import VAE, CLIPText, CLIPTextConfig, load_network, parse_config
from tests.stable_diffusion_reference import (
    GATE,
    TEXT,
    compiled,
    nchw,
    nhwc,
    normal,
    relative,
    saved,
    tensor,
    text_encoder,
    torch,
    vae,
)

SIZES = [(16, 16), (8, 20), (18, 10)]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    model = vae()
    return model, load_network(VAE, saved(model, tmp_path_factory.mktemp("vae")))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_encode(autoencoder, size):
    model, network = autoencoder
    images = normal(0, 2, *size, 3)
    posterior = compiled(VAE.encode)(network, images)
    with torch.no_grad():
        expected = model.encode(nchw(images)).latent_dist
    assert posterior.mean.shape == (2, size[0] // 2, size[1] // 2, 4)
    assert relative(posterior.mean, nhwc(expected.mean)) < GATE
    assert relative(posterior.logvar, nhwc(expected.logvar)) < GATE


def test_log_variance_is_cut_off(autoencoder):
    """At diffusers' bounds."""
    _, network = autoencoder
    images, bias = jnp.asarray(normal(0, 1, 4, 4, 3)), network.quant_conv.bias[...]
    network.quant_conv.bias[...] = bias.at[4:6].set(jnp.asarray([100.0, -100.0]))
    logvar = network.encode(images).logvar
    network.quant_conv.bias[...] = bias
    assert jnp.all(logvar[..., 0] == 20) and jnp.all(logvar[..., 1] == -30)


@pytest.mark.parametrize("size", [(8, 8), (4, 10)], ids=str)
def test_decode(autoencoder, size):
    model, network = autoencoder
    z = normal(1, 2, *size, 4)
    with torch.no_grad():
        expected = model.decode(nchw(z)).sample
    assert relative(compiled(VAE.decode)(network, z), nhwc(expected)) < GATE


@pytest.mark.slow
def test_latents_are_scaled(autoencoder):
    _, network = autoencoder
    images = jnp.asarray(normal(0, 1, 8, 8, 3))
    latents = network.to_latents(images)
    np.testing.assert_allclose(latents, 0.18215 * network.encode(images).mean, rtol=1e-6)
    np.testing.assert_allclose(network.to_images(latents), network.decode(latents / 0.18215), rtol=1e-6)


@pytest.mark.slow
def test_gradient_through_the_decoder_with_remat(autoencoder, tmp_path):
    model, network = autoencoder
    recomputing = load_network(VAE, saved(model, tmp_path), remat=True)
    z = jnp.asarray(normal(1, 1, 4, 4, 4))
    gradients = [compiled(jax.grad(lambda z, n=n: jnp.sum(n.decode(z) ** 2)))(z) for n in (network, recomputing)]
    assert relative(gradients[1], gradients[0]) < GATE
    assert "remat" in str(jax.make_jaxpr(recomputing.decode)(z)) and "remat" not in str(jax.make_jaxpr(network.decode)(z))


IDS = np.full((3, 77), 515, np.int32)
IDS[0, :4] = [514, 5, 6, 515]
IDS[1, :2] = [514, 515]
IDS[2, :76] = np.arange(76)

TEXTS = {
    "SD 1": {},
    "SD 2": dict(hidden_act="gelu", num_hidden_layers=3, num_attention_heads=2),
    "an old file": dict(eos_token_id=2),  # which is a word of the last row
}


@pytest.mark.parametrize("length", [77, 5])
@pytest.mark.parametrize("name", TEXTS)
def test_text_encoder(name, length, tmp_path):
    model, ids = text_encoder(**TEXTS[name]), IDS[:, :length]
    got = compiled(CLIPText.__call__)(load_network(CLIPText, saved(model, tmp_path)), ids)
    with torch.no_grad():
        expected = model(tensor(ids.astype(np.int64)))
    assert relative(got.last_hidden_state, expected.last_hidden_state) < GATE
    assert relative(got.pooled, expected.pooler_output) < GATE


def test_text_options(tmp_path):
    """bfloat16 is close, remat exact."""
    folder = saved(text_encoder(), tmp_path)
    options = [{}, dict(dtype=jnp.bfloat16), dict(remat=True)]
    run = compiled(lambda network: network(jnp.asarray(IDS)).last_hidden_state)
    exact, half, recomputed = (run(load_network(CLIPText, folder, **option)) for option in options)
    assert half.dtype == jnp.float32 and 1e-4 < relative(half, exact) < 0.1
    assert relative(recomputed, exact) < GATE


def test_random_parameters():
    config = parse_config(CLIPTextConfig, TEXT)
    first, again, other = (jax.tree.leaves(nnx.state(CLIPText(config, rngs=nnx.Rngs(seed)))) for seed in (0, 0, 1))
    assert all(map(jnp.array_equal, first, again)) and not all(map(jnp.array_equal, first, other))


def test_too_many_tokens(tmp_path):
    network = load_network(CLIPText, saved(text_encoder(), tmp_path))
    with pytest.raises(ValueError, match="78 tokens a row, but the text encoder has 77 positions"):
        network(jnp.zeros((1, 78), jnp.int32))
