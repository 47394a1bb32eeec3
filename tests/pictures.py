"""8-bit images, and what Pillow and torchvision do to them."""

import importlib

import numpy as np

Image = importlib.import_module("PIL.Image")


def photographs(seed: int, batch: int, height: int, width: int) -> np.ndarray:
    """8-bit images: waves, a hard edge, noise, and areas that are black and white."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    images = []
    for _ in range(batch):
        a, b, c = rng.uniform(0.02, 0.4, (3, 1, 1, 1))
        wave = 127 + 200 * np.sin(a * x[..., None] + b * y[..., None] + rng.uniform(0, 6, 3))
        wave = wave + 30 * rng.standard_normal((height, width, 3))
        wave[: height // 3, : width // 3] = 255 * (rng.random((height // 3, width // 3, 1)) > 0.5)
        images.append(np.where((x + c[0] * y > 0.7 * width)[..., None], 255 - wave, wave))
    return np.clip(np.round(images), 0, 255).astype(np.uint8)


def in_range(images: np.ndarray) -> np.ndarray:
    """8-bit images in [-1, 1]."""
    return (images.astype(np.float32) / 255 * 2 - 1).astype(np.float32)


def resized_by_pillow(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic, the width first; Pillow 13 takes the height first for some tall images, and no version before it did."""
    picture = Image.fromarray(image).resize((width, image.shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def shortest_edge(image: np.ndarray, size: int) -> tuple[int, int]:
    """What torchvision's Resize(size) resizes to."""
    height, width = image.shape[:2]
    return (size, int(size * width / height)) if height <= width else (int(size * height / width), size)


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """torchvision's CenterCrop."""
    top, left = (round((n - size) / 2) for n in image.shape[:2])
    return image[top : top + size, left : left + size]


def normalised(pixels: np.ndarray) -> np.ndarray:
    """Of images in [0, 1], by CLIP's mean and standard deviation."""
    return (pixels - np.float32([0.48145466, 0.4578275, 0.40821073])) / np.float32([0.26862954, 0.26130258, 0.27577711])
