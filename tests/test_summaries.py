"""Text of models and states: short, and with the right counts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ctrl_diffusion as cd
from ctrl_diffusion.summaries import summary


def model(width: int = 32):
    process = cd.DiffusionProcess(cd.VPCosine(), eta=1.0)
    return cd.make_model(cd.ResidualMLP((3,), (3,), width=width, depth=3, rngs=nnx.Rngs(0)), process, (3,))


def test_a_model_fits_on_a_screen_and_says_what_it_is():
    made = model()
    text = repr(made)
    assert len(text.splitlines()) <= 20 and max(map(len, text.splitlines())) <= 100
    numbers = sum(leaf.size for leaf in jax.tree.leaves(made.params))
    assert text.count(f"{numbers:,} numbers of float32, {4 * numbers / 1e6:.3g} MB") == 2  # the network's own, and those in use
    for part in (
        "ResidualMLP(",
        "DiffusionProcess(schedule=VPCosine(), eta=1.0)",
        "ExponentialEuler()",
        "51 numbers from 0.002 to 0.99",
    ):
        assert part in text


def test_the_text_does_not_grow_with_the_network():
    small, large = (len(repr(model(width))) for width in (4, 256))
    assert large <= small + 20


class Holder(eqx.Module):
    """Its own `repr` is never asked, so that it can be this text."""

    few: dict
    many: dict
    compiled: object

    def __repr__(self):
        return summary(self)


def test_what_is_short_is_written_out_and_what_is_long_is_counted():
    many = {str(i): jnp.zeros((2, i), jnp.bfloat16) for i in range(8)} | {"count": np.zeros((), np.int32)}
    holder = Holder({"a": jnp.zeros((4, 2)), "key": jax.random.key(0)}, many, jax.jit(model))
    assert [line.strip(" ,") for line in repr(holder).splitlines()] == [
        "Holder(",
        "few={'a': f32[4,2], 'key': key<fry>[]}",
        "many=dict(9 arrays, 57 numbers of bfloat16 and int32, 0.000116 MB)",
        "compiled=<compiled model>",
        ")",
    ]
    assert summary([1.0] * 8) == str([1.0] * 8) and summary([0.25] * 8 + [1]) == "list(9 numbers from 0.25 to 1)"
    assert summary({}) == "{}" and summary(()) == "()"


def test_abstract_arrays_are_counted_as_real_ones():
    params = model().params
    state = (params, optax.adam(1e-3).init(params))
    assert summary(state) == summary(jax.eval_shape(lambda: state))
