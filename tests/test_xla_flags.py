"""Which library computes convolutions in the commands, read off a compiled program in a process of its own."""

import os
import subprocess
import sys

import pytest

from experiments.xla_flags import YNNPACK, faster_convolutions

PROGRAM = """
import dataclasses, sys
import jax, jax.numpy as jnp
from experiments.commandline import execute

@dataclasses.dataclass(frozen=True)
class Config:
    pass

def run(config):
    pixels, kernel = jnp.ones((96, 8, 8, 32)), jnp.ones((3, 3, 32, 32))
    convolve = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    print(jax.jit(convolve).lower(pixels, kernel).compile().as_text())

sys.exit(execute(run, Config, None, "test", []))
"""


def uses_ynnpack(flags: str) -> bool:
    """Whether the convolution of `PROGRAM` is YNNPACK's."""
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert "convolution(" in done.stdout
    return "ynn_fusion" in done.stdout


@pytest.mark.slow
def test_commands_leave_convolutions_to_eigen_unless_told_otherwise():
    assert not uses_ynnpack("")
    assert not uses_ynnpack("--xla_force_host_platform_device_count=2")
    assert uses_ynnpack(f"{YNNPACK}=LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION")


@pytest.mark.parametrize("version", [(0, 9, 2), (0, 13, 0), (1, 0)])
def test_releases_that_may_not_know_the_flag_are_spared(monkeypatch, version):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    faster_convolutions(version)
    assert os.environ["XLA_FLAGS"] == "--xla_force_host_platform_device_count=2"


@pytest.mark.parametrize("version", [(0, 10, 2), (0, 12, 0, 1)])
def test_what_the_user_set_stays(monkeypatch, version):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    faster_convolutions(version)
    first, second = os.environ["XLA_FLAGS"].split()
    assert first == "--xla_force_host_platform_device_count=2" and second.startswith(YNNPACK)
    faster_convolutions(version)
    assert os.environ["XLA_FLAGS"].split() == [first, second]
