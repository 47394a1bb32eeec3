"""Every algorithm on images: one iteration with a differentiable reward and with a black box, or a refusal that helps."""

import jax
import numpy as np
import pytest
from flax import nnx

import ctrl_diffusion as cd
from experiments.algorithm_registry import ALGORITHMS
from experiments.digits import experiment as digits
from experiments.digits.__main__ import main

CONFIG = dict(width=16, depth=1, steps=4, batch=8, epochs=1, minibatches=2, iterations=2)


def one_iteration(name, reward):
    config = digits.Config(algorithm=name, **CONFIG)
    process = cd.DiffusionProcess(cd.VPCosine(tau_min=0.02))
    network = cd.ResidualMLP((8, 8, 1), (8, 8, 1), width=16, depth=1, rngs=nnx.Rngs(0))
    model = cd.make_model(network, process, (8, 8, 1), grid=process.grid(config.steps))
    kl_weight = 1.0 if ALGORITHMS[name].penalised else 0.0
    algorithm, value_params = digits._algorithm(config, model.sampler, reward, kl_weight)
    state = algorithm.init(model.params, value_params)
    start = jax.tree.map(np.asarray, state.params)
    for i in range(2):  # the learning rate warms up from zero
        state, info = algorithm.step(jax.random.key(i), state)
    moved = [np.max(np.abs(np.asarray(a) - b)) for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(start))]
    return info, max(moved)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_differentiable_reward(name):
    info, moved = one_iteration(name, cd.differentiable(lambda x: x.mean(axis=(1, 2, 3)), "ink"))
    assert all(np.isfinite(float(v)) for v in info.metrics.values())
    assert 0 < moved < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_black_box_reward(name):
    reward = cd.black_box(lambda x: (np.asarray(x) > 0).mean(axis=(1, 2, 3)), "inked")
    if ALGORITHMS[name].differentiates:
        with pytest.raises(ValueError, match=f"algorithm='{name}' differentiates the reward, .*Use one of score_as_action"):
            one_iteration(name, reward)
        return
    _, moved = one_iteration(name, reward)
    assert 0 < moved < 0.1


def test_what_does_not_fit_an_algorithm_is_refused(tmp_path, capsys):
    assert main(["--algorithm", "draft", "--reward", "holes", "--out", str(tmp_path / "run")]) == 1
    assert "reward='holes' is a black box" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
