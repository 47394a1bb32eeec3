"""Event files for TensorBoard: numbers and pictures against steps.

The format is implemented here because other packages for it load torch or TensorFlow if those are installed. A file is a sequence of
records. A record is a length, its checksum, a message and its checksum. A message is a protocol buffer `Event`; few of its fields are
needed.
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .images import png

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_RGB = 3


class EventFile:
    """A file of events in `folder`, which is made if it is missing. Every call writes to the disk before it returns."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb")
        self._write(_text(3, "brain.Event:2"))

    def add(self, step: int, numbers: Mapping[str, int | float], pictures: Mapping[str, np.ndarray]) -> None:
        """Write numbers, and pictures `[h, w, 3]` of bytes, by tag, at a step."""
        values = [_text(1, tag) + _key(2, _FIXED32) + struct.pack("<f", number) for tag, number in numbers.items()]
        values += [_text(1, tag) + _bytes(4, _picture(picture)) for tag, picture in pictures.items()]
        self._write(_key(2, _VARINT) + _varint(step) + _bytes(5, b"".join(_bytes(1, value) for value in values)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: bytes) -> None:
        event = _key(1, _FIXED64) + struct.pack("<d", time.time()) + event
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))
        self._file.flush()


def _picture(picture: np.ndarray) -> bytes:
    height, width, _ = picture.shape
    sizes = (_key(field, _VARINT) + _varint(value) for field, value in ((1, height), (2, width), (3, _RGB)))
    return b"".join(sizes) + _bytes(4, png(picture))


def _varint(value: int) -> bytes:
    """Seven bits per byte, the lowest first. The highest bit is clear in the last byte only."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def _key(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _bytes(field: int, data: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(data)) + data


def _text(field: int, text: str) -> bytes:
    return _bytes(field, text.encode())


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC = _table()


def _checksum(data: bytes) -> bytes:
    """CRC-32C (Castagnoli), rotated and shifted as the format of records requires."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
