"""The UNet of Stable Diffusion 1.5 at full size. It takes 12 GB and minutes, and runs when it is asked for:

CTRL_DIFFUSION_FULL_SIZE=1 python -m pytest tests/test_stable_diffusion_full_size.py
"""

import gc
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ctrl_diffusion.stable_diffusion import UNet, load_network
from tests.stable_diffusion_reference import call, diffusers, normal, perturbed, relative, saved

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    "CTRL_DIFFUSION_FULL_SIZE" not in os.environ, reason="12 GB and minutes: set CTRL_DIFFUSION_FULL_SIZE=1 to run it"
)
INPUTS = normal(0, 1, 64, 64, 4), jnp.asarray([501.0]), normal(1, 1, 77, 768)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of a model that diffusers has written, and its output."""
    model = perturbed(diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768))
    expected, folder = call(model, *INPUTS), saved(model, tmp_path_factory.mktemp("unet"))
    del model
    gc.collect()
    return folder, expected


LOAD = """
    import re, sys, time
    from pathlib import Path
    import jax, jax.numpy as jnp
    from flax import nnx
    from ctrl_diffusion.stable_diffusion import UNet, load_network

    def held():  # the most bytes in memory so far (Linux); what getrusage says is inherited from the process that started this one
        return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

    jax.block_until_ready(jnp.zeros(1))
    before, start = held(), time.monotonic()
    network = load_network(UNet, sys.argv[1])
    jax.block_until_ready(nnx.state(network))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(network)))
    print((held() - before) / size, time.monotonic() - start)
"""


def test_loading_takes_little_more_memory_than_the_network(reference, capsys):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOAD), reference[0]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    ratio, seconds = map(float, done.stdout.split())
    with capsys.disabled():
        print(f"\nfull-size UNet: loaded in {seconds:.1f} s with {ratio:.2f} times its size")
    assert ratio < 1.3


def test_parity_with_diffusers(reference, capsys):
    folder, expected = reference
    error = relative(jax.jit(UNet.__call__)(load_network(UNet, folder), *INPUTS), expected)
    with capsys.disabled():
        print(f"\nfull-size UNet: max |difference| / std(reference) = {error:.2e}")
    assert error < 1e-4
