"""The fragments of docs/solvers.md run, one after the other, on a small problem."""

import re
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ctrl_diffusion as cd
from ctrl_diffusion.sampler import Sampler
from ctrl_diffusion.solvers import AbstractSemilinearTerm

PAGE = Path(__file__).resolve().parent.parent / "docs" / "solvers.md"


def score(params, t, x, cond):
    """Of standard normal data, which stays standard normal under a variance-preserving schedule."""
    return -params * x


@pytest.mark.slow
def test_the_code_of_the_page_runs():
    process = cd.DiffusionProcess(cd.VPLinear(), eta=1.0)
    keys = cd.sample_keys(jax.random.key(0), 256)
    names = dict(
        cd=cd, diffrax=diffrax, DiffusionProcess=cd.DiffusionProcess, AbstractSemilinearTerm=AbstractSemilinearTerm, process=process,
        score=score, params=jnp.asarray(1.0), cond=None, keys=keys[:2], key=keys[0], x0=process.initial(keys, (2,)),
    )  # fmt: skip
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert names["x"].shape == (2, 32, 32, 3)
    for result in (names["ode"], names["sde"]):
        assert result.succeeded and result.x.shape == (256, 2)
        assert abs(np.var(result.x) - 1) < 4 * (2 / 512) ** 0.5 + 0.02  # the sampling error of 512 values, and the solver's
    x = Sampler(process, score, (2,), solver=names["Mine"]()).sample(names["params"], keys)
    assert abs(np.var(x) - 1) < 4 * (2 / 512) ** 0.5 + 0.1
