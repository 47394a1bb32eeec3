"""The UNet of Stable Diffusion 1.5 at full size; selected by an environment variable, because it takes 12 GB and minutes:

CTRL_DIFFUSION_FULL_SIZE=1 python -m pytest tests/test_stable_diffusion_full_size.py
"""

import gc
import os
import resource

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    "CTRL_DIFFUSION_FULL_SIZE" not in os.environ, reason="12 GB and minutes: set CTRL_DIFFUSION_FULL_SIZE=1 to run it"
)


def peak() -> float:
    """The most memory this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def test_unet_of_full_size(tmp_path, capsys):
    from ctrl_diffusion.stable_diffusion import UNet, load_network
    from tests.stable_diffusion_reference import call, diffusers, normal, perturbed, relative

    config = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    x, timesteps, context = normal(0, 1, 64, 64, 4), np.asarray([501.0], np.float32), normal(1, 1, 77, 768)
    model = perturbed(diffusers.UNet2DConditionModel(**config))
    expected = call(model, x, timesteps, context)
    model.save_pretrained(tmp_path, safe_serialization=True)
    del model
    gc.collect()

    network = load_network(UNet, tmp_path)
    got = jax.jit(UNet.__call__)(network, x, timesteps, context)
    error = relative(got, expected)
    with capsys.disabled():
        print(f"\nfull-size UNet: max |difference| / std = {error:.2e}")
    assert error < 1e-4
