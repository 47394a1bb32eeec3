"""Rewards by the size of an image as a JPEG file. They are black boxes: use `ctrl_diffusion.pooled(jpeg_compressibility)`."""

import io

import numpy as np

FAR = 16.0
"""Decoders overshoot [-1, 1], by far less than this."""


def as_eight_bits(images: np.ndarray) -> np.ndarray:
    """Images `[b, h, w, 3]` as uint8: floats in [-1, 1] are clipped and rounded, uint8 stays.

    Raises:
        ValueError: for another shape, images that are not finite, or floats far outside of [-1, 1], such as 0 to 255.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images of shape {images.shape} must be [b, h, w, 3], in [-1, 1].")
    if images.dtype != np.uint8:
        largest = np.max(np.abs(images.astype(np.float64)), initial=0)
        if not largest <= FAR:
            raise ValueError(
                f"images reach {largest:g}, but floats must be in [-1, 1] (or pass uint8): divide by 127.5, subtract 1."
            )
        images = np.clip(np.round(127.5 * (images.astype(np.float64) + 1)), 0, 255).astype(np.uint8)
    return images


def jpeg_bytes(images: np.ndarray, quality: int = 95) -> np.ndarray:
    """Size of each image's JPEG file in bytes, `[b]`. Images `[b, h, w, 3]` in [-1, 1] are clipped and rounded to 8 bits.

    See `as_eight_bits` for other types and ranges. The files are made by Pillow. Other versions of it or of its JPEG library can differ
    by a few bytes.
    """
    try:
        from PIL import Image  # not needed for anything else in the library
    except ImportError as error:
        raise ImportError("the size of a JPEG file needs Pillow: pip install pillow.") from error
    sizes = []
    for image in as_eight_bits(images):
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=quality)
        sizes.append(file.tell())
    return np.asarray(sizes, np.int64).reshape(len(images))


def jpeg_compressibility(images: np.ndarray) -> np.ndarray:
    """`-(bytes of the JPEG file of quality 95) / 1000` of each image in [-1, 1] (Black et al. 2023)."""
    return -jpeg_bytes(images) / 1000


def jpeg_incompressibility(images: np.ndarray) -> np.ndarray:
    """`(bytes of the JPEG file of quality 95) / 1000` of each image in [-1, 1] (Black et al. 2023)."""
    return jpeg_bytes(images) / 1000
