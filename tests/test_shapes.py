"""A control or network whose output has not the shape of the states is refused, where it would have been broadcast."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import ctrl_diffusion as cd

PROCESS = cd.DiffusionProcess(cd.VPLinear(tau_min=0.02))
GRID = PROCESS.grid(3)


def test_a_network_of_one_channel_is_no_network_of_colour_images():
    network = cd.ResidualMLP((2, 2, 3), (2, 2, 1), width=8, depth=1, rngs=nnx.Rngs(0))
    model = cd.make_model(network, PROCESS, (2, 2, 3), grid=GRID)
    with pytest.raises(ValueError, match=r"the network returned shape \(5, 2, 2, 1\) for states of shape \(5, 2, 2, 3\)"):
        model.sample(jax.random.key(0), 5)


@pytest.mark.parametrize("process", [PROCESS, cd.DriftProcess(1.0)], ids=["score", "drift"])
def test_a_control_gives_a_number_for_each_entry(process):
    sampler = cd.Sampler(process, lambda params, t, x, cond: -x[:, :1], (2,), grid=process.grid(3))
    for run in (sampler.sample, sampler.trajectory):
        with pytest.raises(ValueError, match=r"the control returned shape \(5, 1\) for states of shape \(5, 2\)"):
            run(None, cd.sample_keys(jax.random.key(0), 5))


def test_a_class_is_no_instance():
    with pytest.raises(TypeError, match=r"solver=UniPC is a class: pass an instance, UniPC\(...\)"):
        cd.Sampler(PROCESS, lambda params, t, x, cond: -x, (2,), grid=GRID, solver=cd.solvers.UniPC)


def test_a_model_whose_control_would_be_lost_is_not_saved(tmp_path):
    model = cd.make_model(cd.ResidualMLP((2,), (2,), width=8, depth=1, rngs=nnx.Rngs(0)), PROCESS, (2,), grid=GRID)
    score = model.sampler.control

    def guided(params, t, x, cond=None):
        return 2 * score(params, t, x, cond)

    other = model._replace(sampler=cd.Sampler(PROCESS, guided, (2,), grid=GRID))
    with pytest.raises(ValueError, match="the model's control, guided, is not the score of its network"):
        cd.save(tmp_path / "model", other)
    assert not (tmp_path / "model").exists()
    cd.save(tmp_path / "model", model)
    loaded = cd.load(tmp_path / "model")
    assert jnp.array_equal(loaded.sample(jax.random.key(0), 3), model.sample(jax.random.key(0), 3))


def test_what_step_is_given_is_named():
    """A state that was overwritten, results in place of a state, and keys that are none."""
    sampler = cd.Sampler(PROCESS, lambda params, t, x, cond: -params * x, (2,), grid=GRID)
    algorithm = cd.ddpo(cd.Objective(sampler, lambda x: x[:, 0], 0.0), cd.Training(optax.sgd(1e-3), 4))
    key, first = jax.random.key(0), algorithm.init(jnp.ones(2))
    results = algorithm.step(key, first)
    with pytest.raises(ValueError, match="state was given to step before, .*pass the state that step returned, or a copy"):
        algorithm.step(key, first)
    with pytest.raises(TypeError, match="state is a tuple: pass what init returned, or the first of the two"):
        algorithm.step(key, results)
    for wrong, about in (
        (jax.random.split(key, 2), r"key<fry> of shape \(2,\)"),
        (jax.random.PRNGKey(0), "uint32"),
        (0, "int"),
    ):
        with pytest.raises(TypeError, match=f"key is {about}.*: pass one key, such as"):
            algorithm.step(wrong, results[0])
