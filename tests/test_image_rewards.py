"""Rewards of CLIP and the aesthetic predictor: parity, gradients, as rewards of the library."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ctrl_diffusion as cd
from ctrl_diffusion import image_rewards, rewards
from ctrl_diffusion.image_rewards import (
    CLIP,
    VIT_H_14,
    VIT_L_14,
    Aesthetic,
    CLIPImages,
    Loading,
    Preprocess,
    for_prompts,
    half_down,
    load_aesthetic,
    load_clip,
    load_clip_images,
    load_clip_similarity,
    load_hps,
    load_pickscore,
)
from ctrl_diffusion.pretrained import abstract_network, clip as clip_module, layers, transformer
from tests.image_reward_reference import CLIPS, clip, clip_folder, linear_layers, openai_names, processed, scores
from tests.pictures import in_range, photographs
from tests.stable_diffusion_reference import GATE, compiled, relative, tensor, torch

PROMPTS = ["a cat", "", "cats and cats", "dog", "x y z", "cat cat"]
PICTURES = photographs(0, 6, 61, 83)
IMAGES = jnp.asarray(in_range(PICTURES))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """By name: a model, its folder, and the pixels and features that it makes of the pictures."""
    made = {}
    for name, options in CLIPS.items():
        model = clip(**options)
        pixels = processed(PICTURES, model.config.vision_config.image_size)
        with torch.no_grad():
            features = model.get_image_features(tensor(pixels.transpose(0, 3, 1, 2))).pooler_output
        made[name] = model, clip_folder(tmp_path_factory.mktemp("clip") / "model", model), pixels, features
    return made


def small(reward, **options):
    """A reward on images of the size that the network in miniature takes."""
    size = reward.network.config.vision.image_size
    return dataclasses.replace(reward, preprocess=reward.preprocess._replace(size=size, **options))


@pytest.mark.parametrize("name", CLIPS)
def test_pickscore(clips, name):
    model, folder, pixels, _ = clips[name]
    reward = small(load_pickscore(folder))
    assert reward.preprocess == Preprocess(size=pixels.shape[1], margin=half_down)
    ids = reward.tokenize(PROMPTS)
    got = compiled(lambda reward, images, ids: reward(images, ids))(reward, IMAGES, ids)
    expected = scores(model, pixels, ids, scaled=True)
    assert np.std(expected) > 0.1 and relative(got, expected) < GATE


@pytest.mark.parametrize("name", CLIPS)
def test_clip_similarity(clips, name):
    model, folder, pixels, features = clips[name]
    reward = small(load_clip_similarity(folder), margin=half_down)
    ids = reward.tokenize(PROMPTS)
    assert relative(reward(IMAGES, jnp.asarray(ids)), scores(model, pixels, ids, scaled=False)) < GATE
    with torch.no_grad():
        text = model.get_text_features(tensor(ids.astype(np.int64))).pooler_output
    assert relative(reward.network.text_features(jnp.asarray(ids)), text) < GATE
    assert relative(load_clip_images(folder).image_features(jnp.asarray(pixels)), features) < GATE


def test_aesthetic(clips, tmp_path):
    _, folder, _, features = clips["ViT-L"]
    mlp = linear_layers(20)
    torch.save(mlp.state_dict(), tmp_path / "linear.pth")
    reward = small(load_aesthetic(folder, tmp_path / "linear.pth"), margin=half_down)
    assert isinstance(reward.network, CLIPImages) and reward.tokenize(PROMPTS) is None
    with torch.no_grad():
        expected = mlp.eval().layers(features / features.norm(dim=-1, keepdim=True))[:, 0]
    assert relative(compiled(lambda reward, images: reward(images))(reward, IMAGES), expected) < GATE
    both = Aesthetic(load_clip(folder), reward.mlp, reward.preprocess)  # the vision tower of a whole CLIP will do
    np.testing.assert_array_equal(both(IMAGES), reward(IMAGES))


@pytest.mark.parametrize("name", ["ViT-H", "ViT-L"])
def test_hps(clips, name, tmp_path):
    model, folder, _, _ = clips[name]
    torch.save({"state_dict": openai_names(model), "epoch": 10}, tmp_path / "hps.pt")
    config = load_clip(folder).config
    reward = small(load_hps(tmp_path / "hps.pt", folder, config=config))
    same = load_clip(folder)
    for a, b in zip(*(jax.tree.leaves(nnx.state(network)) for network in (reward.network, same)), strict=True):
        np.testing.assert_array_equal(a, b)
    pixels, ids = reward.preprocess(IMAGES), reward.tokenize(PROMPTS)  # of the pixels see test_image_reward_pixels.py
    assert relative(reward(IMAGES, jnp.asarray(ids)), scores(model, np.asarray(pixels), ids, scaled=False)) < GATE


def test_hps_in_half_precision(clips, tmp_path):
    """As the published files are."""
    model, folder, _, _ = clips["ViT-H"]
    torch.save({"state_dict": {name: x.half() for name, x in openai_names(model).items()}}, tmp_path / "hps.pt")
    config = load_clip(folder).config
    with pytest.raises(ValueError, match="hps.pt: tensor '.*' is float16, the parameters are float32: pass cast=True"):
        load_hps(tmp_path / "hps.pt", folder, config=config)
    reward = load_hps(tmp_path / "hps.pt", folder, Loading(cast=True), config=config)
    exact = load_clip(folder)
    for a, b in zip(*(jax.tree.leaves(nnx.state(network)) for network in (reward.network, exact)), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b).astype(np.float16).astype(np.float32))


def test_sizes_of_the_published_networks():
    """303 million parameters in ViT-L/14's vision tower; 986.1 million in ViT-H/14."""

    def size(cls, config):
        return sum(x.size for x in jax.tree.leaves(nnx.state(abstract_network(lambda rngs: cls(config, rngs=rngs)))))

    assert size(CLIPImages, VIT_L_14) == 303_179_776 + 768 * 1024
    assert size(CLIP, VIT_L_14) == 427_616_513
    assert size(CLIP, VIT_H_14) == 986_109_441


# --- the gate is sharp


def exact_gelu_for_quick_gelu(patch):
    patch.setitem(transformer.ACTIVATIONS, "quick_gelu", layers.erf_gelu)


def layer_norm_eps(patch):
    correct = layers.Layers.layer_norm
    patch.setattr(layers.Layers, "layer_norm", lambda self, n, eps: correct(self, n, 1e-6))


def positions_without_the_class(patch):
    correct = clip_module.PatchEmbeddings.__call__

    def call(self, pixels):
        return correct(self, pixels) - jnp.eye(1, 10)[0][:, None] * self.position_embedding(jnp.arange(1))

    patch.setattr(clip_module.PatchEmbeddings, "__call__", call)


def causal_vision(patch):
    correct = transformer.TransformerEncoder.__init__
    patch.setattr(transformer.TransformerEncoder, "__init__", lambda self, *a, causal=True: correct(self, *a, causal=True))


def patches_by_columns(patch):
    correct = clip_module.PatchEmbeddings.__call__
    patch.setattr(clip_module.PatchEmbeddings, "__call__", lambda self, pixels: correct(self, jnp.swapaxes(pixels, 1, 2)))


@pytest.mark.parametrize(
    "mistake",
    [exact_gelu_for_quick_gelu, layer_norm_eps, positions_without_the_class, causal_vision, patches_by_columns],
    ids=lambda mistake: mistake.__name__,
)
def test_mistakes_go_past_the_gate(clips, mistake, monkeypatch):
    mistake(monkeypatch)
    _, folder, pixels, features = clips["ViT-L"]
    assert relative(load_clip_images(folder).image_features(jnp.asarray(pixels)), features) > GATE


def heads(network):
    for _, module in nnx.iter_modules(network.vision_model):
        if isinstance(module, transformer.Attention):
            module.heads = 3


def without(*path):
    def change(network):
        module = functools.reduce(getattr, path[:-1], network)
        variable = getattr(module, path[-1])
        variable[...] = jnp.full_like(variable[...], path[-1] == "scale")

    change.__name__ = ".".join(path)
    return change


@pytest.mark.parametrize(
    "mistake",
    [
        heads,
        without("vision_model", "embeddings", "class_embedding"),
        without("vision_model", "pre_layrnorm", "bias"),
        without("vision_model", "post_layernorm", "scale"),
    ],
    ids=lambda mistake: mistake.__name__,
)
def test_mistakes_in_the_network_go_past_the_gate(clips, mistake):
    _, folder, pixels, features = clips["ViT-L"]
    network = load_clip_images(folder)
    mistake(network)
    assert relative(network.image_features(jnp.asarray(pixels)), features) > GATE


# --- gradients and types


@pytest.fixture(scope="module")
def pickscore(clips):
    return small(load_pickscore(clips["ViT-L"][1]))


def test_gradient_is_that_of_the_reference(clips, pickscore):
    """Of the pixels by torch; what is before them has tests of its own."""
    model, _, pixels, _ = clips["ViT-L"]
    ids = pickscore.tokenize(PROMPTS)
    given = tensor(pixels.transpose(0, 3, 1, 2)).requires_grad_()
    image = model.get_image_features(given).pooler_output
    text = model.get_text_features(tensor(ids.astype(np.int64))).pooler_output.detach()
    cosine = torch.nn.functional.cosine_similarity(image, text)
    (expected,) = torch.autograd.grad(cosine.sum(), given)
    got = compiled(jax.grad(lambda pixels: jnp.sum(pickscore.network.cosine(pixels, jnp.asarray(ids)))))(jnp.asarray(pixels))
    assert relative(got, expected.numpy().transpose(0, 2, 3, 1)) < GATE
    through = jax.grad(lambda images: jnp.sum(pickscore(images, jnp.asarray(ids))))(0.5 * IMAGES)
    assert bool(jnp.all(jnp.any(through != 0, axis=(1, 2, 3)))) and bool(jnp.all(jnp.isfinite(through)))


def test_options_of_loading(clips):
    _, folder, pixels, features = clips["ViT-L"]
    run = compiled(lambda network, pixels: network.image_features(pixels))
    half = run(load_clip(folder, Loading(dtype=jnp.bfloat16)), jnp.asarray(pixels))
    assert half.dtype == jnp.bfloat16 and 1e-4 < relative(half.astype(jnp.float32), features) < 0.2
    recomputing = load_clip(folder, Loading(remat=True))
    assert relative(run(recomputing, jnp.asarray(pixels)), features) < GATE
    assert "remat" in str(jax.make_jaxpr(recomputing.image_features)(jnp.asarray(pixels)))
    seen = {}
    network = load_clip(folder, Loading(sharding=lambda name, shape: seen.update({name: shape})))
    assert seen == {".".join(map(str, path)): x.shape for path, x in nnx.to_flat_state(nnx.state(network))}


# --- as a reward of this library


def test_parameters_are_arguments_of_what_is_compiled(clips, pickscore):
    ids = pickscore.tokenize(["a cat"])
    text = jax.jit(lambda reward, images, ids: reward(images, ids)).lower(pickscore, IMAGES, jnp.repeat(ids, 6, 0)).as_text()
    parameters = len(jax.tree.leaves(pickscore))
    assert f"%arg{parameters + 1}:" in text


def test_as_a_reward_of_fixed_prompts(pickscore):
    prompt = jnp.asarray([2, 0, 1, 1, 0, 2])
    expected = pickscore(IMAGES, jnp.asarray(pickscore.tokenize(PROMPTS))[prompt])
    for chunk in (None, 4):
        reward = for_prompts(pickscore, PROMPTS, "PickScore", chunk=chunk)
        assert reward.differentiable and reward.conditional and reward.name == "PickScore"
        assert relative(rewards.compute_rewards(reward, IMAGES, prompt), expected) < GATE
    size = cd.pooled(image_rewards.jpeg_compressibility, chunk=2)
    total, parts = rewards.compute_reward_terms(cd.weighted_sum((1.0, reward), (0.1, size)), IMAGES, prompt)
    np.testing.assert_allclose(total, parts["PickScore"] + 0.1 * rewards.compute_rewards(size, IMAGES), rtol=1e-6)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(pickscore.network)))
    assert sum(leaf.size for leaf in jax.tree.leaves(reward) if eqx.is_array(leaf)) > parameters  # arguments, not constants


def test_networks_do_not_compute_in_float16(clips):
    """Parameters may be float16 beside another type of the computation."""
    _, folder, *_ = next(iter(clips.values()))
    for loading in (Loading(dtype=jnp.float16), Loading(param_dtype=jnp.float16, cast=True)):
        with pytest.raises(ValueError, match="dtype=float16: networks do not compute in float16, .*dtype=jnp.bfloat16"):
            load_clip(folder, loading)
    assert load_clip(folder, Loading(jnp.float32, jnp.float16, cast=True)).logit_scale.dtype == jnp.float16


def test_what_rewards_refuse(pickscore):
    with pytest.raises(ValueError, match=r"ids=None: this reward reads the prompts: pass reward.tokenize\(prompts\)"):
        pickscore(IMAGES)
    with pytest.raises(ValueError, match="has 102 tokens, over 77: shorten it or pass truncate=True"):
        pickscore.tokenize(["cat " * 100])
    assert pickscore.tokenize(["cat " * 100], truncate=True).shape == (1, 77)
    with pytest.warns(UserWarning, match=r"'PickScore' reads 77 tokens: of 1 of 2 prompts it does not see the end \(.* 102\)"):
        for_prompts(pickscore, ["cat " * 100, "a cat"], "PickScore")
    with pytest.raises(ValueError, match=r"pixels of shape \(6, 61, 83, 3\) must be \[b, 24, 24, 3\]"):
        pickscore.network.image_features(IMAGES)
