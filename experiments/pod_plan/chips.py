"""TPU chips and GPUs by the numbers, slices described without any being there, and what a program would take on one at best."""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from ..tpu_library import WITHOUT_TPU
from .hlo import Account, Collective

GIB = 2**30
HOP_SECONDS = 1e-6
"""Assumed time from a chip to its neighbour: what a collective of a few bytes costs."""

ENVIRONMENT = WITHOUT_TPU | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
"""What libtpu reads where there is no TPU; other processes of this machine may have it loaded too."""


H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA asks of a GPU of this kind, as its `GpuTargetConfigProto`."""


class Chip(NamedTuple):
    """One chip, by the vendor's published numbers except for `usable`.

    Attributes:
        name: of the generation, as in `v5e:4x4`.
        hbm: memory, bytes.
        usable: memory that the compiler leaves to programs, bytes: what it says when it refuses one.
        flops: peak of the matrix units in bfloat16, 1/s.
        hbm_bandwidth: bytes/s.
        link_bandwidth: bytes/s that one link carries to a neighbouring chip; as much comes back at the same time.
        axes: of a slice: two (4 links per chip) or three (6 links); one: GPUs of one machine behind a switch.
        ring: sides that are multiples of it are closed to rings; all others have ends.
        options: of the description of a slice.
        platform: what it is to JAX.
    """

    name: str
    hbm: int
    usable: int
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    axes: int
    ring: int
    options: dict[str, str] = {}
    platform: str = "tpu"


def _gib(number: float) -> int:
    return round(number * GIB)


CHIPS = {
    chip.name: chip
    for chip in (
        # docs.cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB at 1200 GB/s, all-reduce 1.1 PB/s per pod of 4096 chips (which is
        # what their links carry one way: 45 GB/s for each of six; Jouppi et al. 2023, arXiv:2304.01433, have 50), a torus where all
        # sides are multiples of 4. One device per chip.
        Chip("v4", _gib(32), _gib(30.75), 275e12, 1200e9, 1.1e15 / 4096 / 6, 3, 4, {"chip_config_name": "megacore"}),
        # docs.cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB at 819 GB/s, ICI 400 GB/s both ways over four ports, a torus of 16x16
        Chip("v5e", _gib(16), _gib(15.75), 197e12, 819e9, 400e9 / 2 / 4, 2, 16),
        # docs.cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 96 GiB (95 for programs) at 2765 GB/s, ICI 1200 GB/s both ways; a torus from
        # 4x4x4 on
        Chip("v5p", _gib(96), _gib(95.74), 459e12, 2765e9, 1200e9 / 2 / 6, 3, 4),
        # docs.cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB at 1600 GB/s, ICI 800 GB/s both ways over four ports, a torus of 16x16
        Chip("v6e", _gib(32), _gib(31.25), 918e12, 1600e9, 800e9 / 2 / 4, 2, 16),
        # NVIDIA's data sheet of the H100 SXM: 989 TFLOP/s (dense), 80 GB at 3.35 TB/s, NVLink 900 GB/s both ways. JAX takes three
        # quarters of the memory unless told otherwise (XLA_PYTHON_CLIENT_MEM_FRACTION).
        Chip(
            "h100",
            84_929_347_584,
            84_929_347_584 * 3 // 4,
            989e12,
            3.35e12,
            900e9 / 2,
            1,
            2**30,
            {"target_config": H100},
            "cuda",
        ),
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

    @property
    def rings(self) -> tuple[bool, ...]:
        """Which sides are closed to rings; of a box, all or none."""
        closed = tuple(side % self.chip.ring == 0 for side in self.sides)
        return closed if self.chip.axes < 3 else (all(closed),) * 3

    @property
    def links(self) -> int:
        """Of the chip that has fewest, in a corner."""
        return sum((1 + ring) * (side > 1) for side, ring in zip(self.sides, self.rings))

    @property
    def hops(self) -> int:
        """Between the two chips farthest apart."""
        if self.chip.axes == 1:
            return 1
        return sum(side // 2 if ring else side - 1 for side, ring in zip(self.sides, self.rings))


def parse_slice(name: str, text: str) -> Slice:
    """The slice that the setting `name` gives as `text`."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if not found or found[1] not in CHIPS:
        raise ValueError(
            f"{name}={text!r} must be a generation ({', '.join(CHIPS)}) and sides, as v5e:4x4, v5p:2x2x4 or h100:8."
        )
    chip, sides = CHIPS[found[1]], tuple(map(int, found[2].split("x")))
    odd = chip.axes > 1 and any(side % 2 for side in sides[:2])
    if chip.axes == 1 and (len(sides) != 1 or not 1 <= sides[0] <= 8):
        raise ValueError(f"{name}={text!r}: a machine has 1 to 8 GPUs, as {chip.name}:8.")
    if len(sides) != chip.axes or any(side < 1 for side in sides) or odd:
        example = "x".join(["4"] * chip.axes)
        raise ValueError(
            f"{name}={text!r}: a slice of {chip.name} has {chip.axes} sides, the first two even, as {chip.name}:{example}."
        )
    return Slice(chip, sides)


def usual_slices(chip: Chip) -> list[Slice]:
    """Slices of 4, 8, ..., 256 chips, as near to square as they go; of GPUs 1, 2, 4, 8."""
    if chip.axes == 1:
        return [Slice(chip, (number,)) for number in (1, 2, 4, 8)]
    sides, found = [2, 2, 1][: chip.axes], []
    for _ in range(7):
        found.append(Slice(chip, tuple(sorted(sides)) if 1 not in sides else tuple(sides)))
        sides[sides.index(min(sides))] *= 2
    return found


def describe(where: Slice) -> list[Any]:
    """The devices of a slice, to compile for. Needs `libtpu` and no TPU, or JAX's plugin for CUDA and no GPU.

    The environment is changed while the slice is described, and only then. JAX itself is kept on the CPU, unless its platform has been
    set: with libtpu installed it would look for a TPU first.
    """
    chip, needed = where.chip, COMPILERS[where.chip.platform]
    if importlib.util.find_spec(needed.module) is None:
        raise ValueError(f"{needed.module} is not installed, and it is the compiler for {chip.name}: {needed.remedy}")
    if not jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_platforms", "cpu")
    options = dict(chip.options) | ({"topology": f"1x1x{where.chips}"} if chip.axes == 1 else {})
    with _environment():
        try:
            return list(topologies.get_topology_desc(where.name, platform=chip.platform, **options).devices)
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(
                f"topology={where.name!r} is none that the compiler knows: {error}. Choose other sides."
            ) from error


class Compiler(NamedTuple):
    """The compiler of a platform: the module that it needs, how to install that, and its options."""

    module: str
    remedy: str
    options: dict[str, str | bool]


COMPILERS = {
    "tpu": Compiler(
        "libtpu",
        "pip install -c constraints.txt -e '.[experiments,tpu]' (Linux on x86-64; no TPU is needed).",
        {},
    ),
    "cuda": Compiler(
        "jax_cuda12_plugin",
        "pip install -c constraints.txt -e '.[experiments]' 'jax[cuda12]' (Linux; no GPU is needed).",
        {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False},
    ),
}
"""Where no GPU is there to try kernels out on, products are those of the vendor's libraries."""


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
    """One collective at best, over `n` chips: the time of its bytes and that of its hops, and twice both for a sum that all get.

    Gathers and scatters: the chip with fewest links receives `(n - 1) / n` of the array. An exchange of all with all: as much, and a
    quarter of all bytes cross the middle of the longest side. A permutation: one link per chip.
    """
    n, link = c.chips, where.chip.link_bandwidth
    if n == 1:
        return 0.0
    hops = HOP_SECONDS * min(where.hops, n - 1)
    part = (n - 1) / n * c.bytes / (where.links * link)
    if c.kind == "collective-permute":
        return c.bytes / link + HOP_SECONDS
    if c.kind == "all-to-all":
        middle = max(side / (4 * (1 + ring)) for side, ring in zip(where.sides, where.rings)) if where.chip.axes > 1 else 0.0
        return max(part, middle * c.bytes / link if n == where.chips else 0.0) + hops
    return (1 + (c.kind == "all-reduce")) * (part + hops)
