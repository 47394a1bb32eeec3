"""TPU chips by the numbers, slices described without any being there, and what a program would take on one at best."""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from .pod_plan_hlo import Account, Collective

GIB = 2**30
HOP_SECONDS = 1e-6
"""Assumed time from a chip to its neighbour: what a collective of a few bytes costs."""

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What libtpu reads where there is no TPU: ask no metadata server; be one host of some slice, whichever; other processes of this
machine may have it loaded too."""


class Chip(NamedTuple):
    """One chip, by the vendor's published numbers except for `usable`.

    Attributes:
        name: of the generation, as in `v5e:4x4`.
        hbm: memory, bytes.
        usable: memory that the compiler leaves to programs, bytes: what it says when it refuses one.
        flops: peak of the matrix units in bfloat16, 1/s.
        hbm_bandwidth: bytes/s.
        ici_bandwidth: bytes/s that a chip can send over all links between chips together.
        axes: of a slice: two (4 links per chip) or three (6 links).
        options: of the description of a slice.
    """

    name: str
    hbm: int
    usable: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    axes: int
    options: dict[str, str] = {}

    @property
    def links(self) -> int:
        """To neighbouring chips."""
        return 2 * self.axes


def _gib(number: float) -> int:
    return round(number * GIB)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v4", _gib(32), _gib(30.75), 275e12, 1228e9, 2400e9 / 8, 3, {"chip_config_name": "megacore"}
        ),  # one device per chip
        Chip("v5e", _gib(16), _gib(15.75), 197e12, 819e9, 1600e9 / 8, 2),
        Chip("v5p", _gib(95), _gib(95.74), 459e12, 2765e9, 4800e9 / 8, 3),
        Chip("v6e", _gib(32), _gib(31.25), 918e12, 1640e9, 3584e9 / 8, 2),
    )
}


class Slice(NamedTuple):
    """So many chips of one generation, in a rectangle or a box."""

    chip: Chip
    sides: tuple[int, ...]

    @property
    def name(self) -> str:
        """As `v5e:4x4`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.sides))}"

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.sides)


def parse_slice(name: str, text: str) -> Slice:
    """The slice that the setting `name` gives as `text`."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if not found or found[1] not in CHIPS:
        raise ValueError(f"{name}={text!r} must be a generation ({', '.join(CHIPS)}) and sides, as v5e:4x4 or v5p:2x2x4.")
    chip, sides = CHIPS[found[1]], tuple(map(int, found[2].split("x")))
    if len(sides) != chip.axes or any(side < 1 for side in sides) or any(side % 2 for side in sides[:2]):
        example = "x".join(["4"] * chip.axes)
        raise ValueError(
            f"{name}={text!r}: a slice of {chip.name} has {chip.axes} sides, the first two even, as {chip.name}:{example}."
        )
    return Slice(chip, sides)


def usual_slices(chip: Chip) -> list[Slice]:
    """Slices of 4, 8, ..., 256 chips, as near to square as they go."""
    sides, found = [2, 2, 1][: chip.axes], []
    for _ in range(7):
        found.append(Slice(chip, tuple(sorted(sides)) if 1 not in sides else tuple(sides)))
        sides[sides.index(min(sides))] *= 2
    return found


def describe(where: Slice) -> list[Any]:
    """The devices of a slice, to compile for. Needs `libtpu`, and no TPU.

    The environment is changed while the slice is described, and only then. JAX itself is kept on the CPU, unless it has been told
    otherwise: with libtpu installed it would look for a TPU first.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "libtpu is not installed, and it is the compiler for TPUs: pip install -c constraints.txt -e '.[experiments,tpu]' "
            "(Linux on x86-64; no TPU is needed)."
        )
    if not jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_platforms", "cpu")
    with _environment():
        try:
            return list(topologies.get_topology_desc(where.name, platform="tpu", **where.chip.options).devices)
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"topology={where.name!r} is none that libtpu knows: {error}. Choose other sides.") from error


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Seconds(NamedTuple):
    """Least times of one run of a program: of its parts, each alone at the chip's peak."""

    products: float
    hbm: float
    collectives: float

    @property
    def total(self) -> float:
        """Products and memory traffic at the same time, collectives after them."""
        return max(self.products, self.hbm) + self.collectives


def roofline(account: Account, where: Slice) -> Seconds:
    """The least times of a program whose account this is, on a chip of `where`."""
    chip = where.chip
    exchanged = sum(c.times * collective_seconds(c, where) for c in account.collectives)
    return Seconds(account.bf16_flops / chip.flops, account.hbm_bytes / chip.hbm_bandwidth, exchanged)


def collective_seconds(c: Collective, where: Slice) -> float:
    """One collective at best: all links busy all the time, and a hop's time for every chip that a byte passes by on its way.

    Rings over all axes: each chip sends `(n - 1) / n` of the array for a gather or a scatter, and twice that for a sum. In an exchange
    of all with all a byte travels a quarter of each side on average.
    """
    chip, n = where.chip, c.chips
    if n == 1:
        return 0.0
    hops = sum(side - 1 for side in where.sides) if n == where.chips else n - 1
    part = (n - 1) / n * c.bytes / chip.ici_bandwidth
    if c.kind == "collective-permute":
        return c.bytes / chip.ici_bandwidth * chip.links + HOP_SECONDS
    if c.kind == "all-to-all":
        return part * max(1.0, sum(where.sides) / 4) + HOP_SECONDS * hops
    return (1 + (c.kind == "all-reduce")) * (part + HOP_SECONDS * hops)
