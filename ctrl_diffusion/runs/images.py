"""Batches of images as one picture, and pictures as PNG files, with numpy and zlib only."""

import struct
import zlib

import numpy as np
from jaxtyping import Float, UInt8


def mosaic(images: np.ndarray) -> Float[np.ndarray, "h w 3"]:
    """Images `[n, h, w, c]`, floats in [-1, 1] or bytes, as one RGB picture in [0, 1]: about square, with white lines between them.

    Three channels are colours; for any other number their mean is shown. Entries that are not finite are shown as 0.
    """
    bytes_given = np.asarray(images).dtype == np.uint8
    x = np.nan_to_num(np.asarray(images, np.float64))
    x = np.clip(x / 255 if bytes_given else (x + 1) / 2, 0, 1)
    n, h, w, c = x.shape
    x = x if c == 3 else np.repeat(x.mean(axis=-1, keepdims=True), 3, axis=-1)
    columns, gap = int(np.ceil(np.sqrt(n))), max(1, round(max(h, w) / 12))
    rows = -(-n // columns)
    result = np.ones((rows * (h + gap) - gap, columns * (w + gap) - gap, 3))
    for i, image in enumerate(x):
        top, left = (i // columns) * (h + gap), (i % columns) * (w + gap)
        result[top : top + h, left : left + w] = image
    return result


def as_bytes(picture: Float[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """A picture in [0, 1] at 256 levels."""
    return np.round(255 * picture).astype(np.uint8)


def png(picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """The picture as a PNG file (ISO/IEC 15948): 8 bits a channel, no filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = picture.shape
    rows = b"".join(b"\0" + row.tobytes() for row in picture)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
