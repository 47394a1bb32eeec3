"""Preprocessing: Pillow's resizing to the bit, torch's to rounding, and the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_diffusion.image_rewards import Preprocess, antialiased, half_down, half_even, interpolated, pillow
from ctrl_diffusion.image_rewards.pixels import antialiased_weights, eight_bits, interpolating_weights
from tests.pictures import centre_crop, in_range, normalised, photographs, resized_by_pillow, shortest_edge

SIZES = {
    "smaller": ((64, 64), (24, 24)),
    "half": ((96, 144), (48, 72)),
    "larger": ((17, 29), (40, 68)),
    "tall": ((90, 41), (49, 22)),
    "much smaller": ((300, 250), (7, 5)),
    "the same": ((30, 30), (30, 30)),
    "of 512": ((512, 512), (224, 224)),
}
each_size = pytest.mark.parametrize("before, after", SIZES.values(), ids=list(SIZES))


@each_size
def test_pillow_to_the_bit(before, after):
    image = photographs(0, 1, *before)
    got = jax.jit(pillow, static_argnums=(1, 2))(jnp.asarray(image, jnp.float32), *after)[0]
    np.testing.assert_array_equal(got, resized_by_pillow(image[0], *after))


@each_size
@pytest.mark.parametrize("resize", [antialiased, interpolated], ids=["antialiased", "interpolated"])
def test_torch(before, after, resize):
    torch = pytest.importorskip("torch", reason="parity with torch: pip install 'ctrl-diffusion[torch]'")
    image = photographs(1, 2, *before).astype(np.float32) / 255
    options = dict(mode="bicubic", align_corners=False, antialias=resize is antialiased)
    expected = torch.nn.functional.interpolate(torch.from_numpy(image).permute(0, 3, 1, 2), after, **options)
    # torch places the four pixels in float32: an error of 512 * 2^-24 in place, at a slope of at most 1 per pixel
    np.testing.assert_allclose(resize(jnp.asarray(image), *after), expected.permute(0, 2, 3, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("before, after", [(64, 24), (24, 64), (512, 224), (7, 7), (5, 3)])
def test_weights(before, after):
    """Each row sums to one, lines reverse with their weights, and constants and (inside) straight lines stay what they are."""
    for weights in (antialiased_weights(before, after), interpolating_weights(before, after)):
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)
        np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-12)
    inside = slice(after // 3, after - after // 3)
    centres = (np.arange(after) + 0.5) * before / after - 0.5
    if before <= after or before % after == 0:  # elsewhere the stretched cubic sums to one only after division
        np.testing.assert_allclose((antialiased_weights(before, after) @ np.arange(before))[inside], centres[inside], atol=1e-9)


def test_how_far_the_pipeline_without_rounding_is_from_the_references():
    """Three roundings by half a level, of which the first goes through two filters and the second through one."""
    images = jnp.asarray(in_range(photographs(2, 2, 512, 512))) * 0.41
    exact, smooth = (Preprocess(rounded=rounded, std=(1 / 255,) * 3)(images) for rounded in (True, False))
    gain = np.abs(antialiased_weights(512, 224)).sum(1).max()  # of the largest error of a line, 1.2
    largest = np.max(np.abs(exact - smooth))
    assert 1 < largest < 0.5 * (gain**2 + gain + 1)  # levels of 255; where overshoots are clipped, more


# --- the pipeline


@pytest.mark.parametrize("before", [(64, 64), (61, 83), (90, 40), (24, 24), (17, 30)], ids=str)
def test_pipeline_of_openai(before):
    images = photographs(3, 3, *before)
    got = Preprocess(24)(jnp.asarray(in_range(images)))
    cropped = [centre_crop(resized_by_pillow(image, *shortest_edge(image, 24)), 24) for image in images]
    np.testing.assert_allclose(got, normalised(np.float32(cropped) / 255), atol=2e-6)


@pytest.mark.parametrize("resize", [antialiased, interpolated], ids=["antialiased", "interpolated"])
@pytest.mark.parametrize("before", [(64, 64), (61, 83), (90, 40)], ids=str)
def test_pipeline_of_hps(before, resize):
    """To floating point first, then resize."""
    torch = pytest.importorskip("torch", reason="parity with torch: pip install 'ctrl-diffusion[torch]'")
    images = photographs(4, 2, *before)
    pixels = torch.from_numpy(images.astype(np.float32) / 255).permute(0, 3, 1, 2)
    options = dict(mode="bicubic", align_corners=False, antialias=resize is antialiased)
    pixels = torch.nn.functional.interpolate(pixels, shortest_edge(images[0], 24), **options).permute(0, 2, 3, 1).numpy()
    expected = normalised(np.stack([centre_crop(image, 24) for image in pixels]))
    np.testing.assert_allclose(Preprocess(24, resize=resize)(jnp.asarray(in_range(images))), expected, atol=5e-5)


def test_where_a_crop_begins():
    assert [half_down(n) for n in range(6)] == [0, 0, 1, 1, 2, 2]  # transformers
    assert [half_even(n) for n in range(6)] == [0, 0, 1, 2, 2, 2]  # torchvision


def test_images_are_read_as_eight_bits_and_clipped():
    images = jnp.asarray([-3.0, -1.0, -0.9999, 0.0, 1 / 255, 0.999, 1.0, 1.2]).reshape(1, 1, 8, 1) * jnp.ones((1, 8, 1, 3))
    got = Preprocess(8, mean=(0.0,) * 3, std=(1 / 255,) * 3)(images)[0, 0, :, 0]
    np.testing.assert_allclose(got, [0, 0, 0, 128, 128, 255, 255, 255], atol=1e-4)  # 127.5 rounds to even


# --- the gradient


def test_gradient_is_that_of_the_smooth_steps():
    """Nothing is clipped in the middle of the range, so that there the gradient is the resizing's transpose."""
    images = jnp.asarray(in_range(photographs(5, 1, 40, 52))) * 0.4
    probe = jnp.asarray(np.random.default_rng(0).standard_normal((1, 24, 24, 3)), jnp.float32)
    exact, smooth = (
        jax.grad(lambda x, rounded=rounded: jnp.vdot(Preprocess(24, rounded=rounded)(x), probe))(images)
        for rounded in (True, False)
    )
    np.testing.assert_allclose(exact, smooth, atol=1e-5)
    rows, columns = antialiased_weights(40, 24), antialiased_weights(52, 31)[4:28]  # round(7 / 2) = 4 columns are cut off
    expected = np.einsum("hi,wj,hwc->ijc", rows, columns, probe[0] / 2 / np.asarray([0.26862954, 0.26130258, 0.27577711]))
    np.testing.assert_allclose(smooth[0], expected, atol=1e-5)


def test_no_gradient_where_images_are_clipped():
    images = jnp.asarray([[-1.2, -0.5, 0.5, 1.2]]).reshape(1, 2, 2, 1) * jnp.ones(3)
    gradient = jax.grad(lambda x: jnp.sum(eight_bits(127.5 * (x + 1))))(images)
    np.testing.assert_allclose(gradient[0, :, :, 0], [[0, 127.5], [127.5, 0]])


def test_forward_derivatives_agree_with_backward_ones():
    images, tangent = (jnp.asarray(in_range(photographs(seed, 1, 30, 30))) * 0.4 for seed in (6, 7))
    preprocess = Preprocess(24)
    _, forward = jax.jvp(preprocess, (images,), (tangent,))
    (backward,) = jax.vjp(preprocess, images)[1](jnp.ones((1, 24, 24, 3)))
    rounding = jnp.finfo(jnp.float32).eps * jnp.sum(jnp.abs(forward))  # of terms of both signs, which cancel to a thousandth
    np.testing.assert_allclose(jnp.sum(forward), jnp.vdot(backward, tangent), rtol=0, atol=rounding)
