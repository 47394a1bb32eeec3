"""Sizes of JPEG files."""

import io
import sys

import numpy as np
import pytest

from ctrl_diffusion import image_rewards
from tests.pictures import Image, in_range, photographs

PICTURES = photographs(0, 6, 61, 83)
IMAGES = in_range(PICTURES)


def test_jpeg_is_what_pillow_writes():
    for sign, reward in ((-1, image_rewards.jpeg_compressibility), (1, image_rewards.jpeg_incompressibility)):
        sizes = []
        for picture in PICTURES:
            file = io.BytesIO()
            Image.fromarray(picture).save(file, format="JPEG", quality=95)
            sizes.append(len(file.getvalue()) / 1000)
        np.testing.assert_allclose(reward(IMAGES), sign * np.asarray(sizes))
        assert reward(IMAGES[:0]).shape == (0,)
    flat = np.stack([np.full((64, 64, 3), value, np.float32) for value in (-2.0, -1.0, 0.0, 1.0, 2.0)])
    sizes = image_rewards.jpeg_bytes(flat)
    assert sizes[0] == sizes[1] and sizes[3] == sizes[4] and np.all(sizes < image_rewards.jpeg_bytes(IMAGES[:5]))
    assert np.all(image_rewards.jpeg_bytes(IMAGES, quality=50) < image_rewards.jpeg_bytes(IMAGES))
    with pytest.raises(ValueError, match=r"images of shape \(61, 83, 3\) must be \[b, h, w, 3\], in \[-1, 1\]"):
        image_rewards.jpeg_bytes(IMAGES[0])


def test_without_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="needs Pillow: pip install pillow"):
        image_rewards.jpeg_bytes(IMAGES)


def test_other_types_and_ranges_are_not_judged_as_if_they_were_in_range():
    eight_bits = np.clip(np.round(127.5 * (IMAGES.astype(np.float64) + 1)), 0, 255)
    np.testing.assert_array_equal(image_rewards.jpeg_bytes(eight_bits.astype(np.uint8)), image_rewards.jpeg_bytes(IMAGES))
    for wrong, reach in ((eight_bits, "255"), (np.full_like(IMAGES, np.nan), "nan")):
        with pytest.raises(ValueError, match=f"images reach {reach}, but floats must be in"):
            image_rewards.jpeg_bytes(wrong)
