"""Rewards on the host: in parallel, in sums, within a time limit, and with errors that name the samples."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ctrl_diffusion as cd
from ctrl_diffusion.rewards import RewardError, compute_reward_terms, compute_rewards

X = jnp.arange(20, dtype=jnp.float32).reshape(10, 2)


def first(x):
    return x[:, 0]


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_a_pool_gives_what_the_function_gives(processes, chunk):
    np.testing.assert_array_equal(compute_rewards(cd.pooled(first, workers=2, chunk=chunk, processes=processes), X), X[:, 0])


def test_a_pool_works_on_parts_at_the_same_time():
    """Two calls that wait for each other end only if both are under way."""
    barrier = threading.Barrier(2, timeout=10)

    def together(x):
        barrier.wait()
        return first(x)

    np.testing.assert_array_equal(compute_rewards(cd.pooled(together, workers=2, chunk=5), X), X[:, 0])


def test_a_reward_that_hangs_is_given_up_and_the_samples_are_named():
    def hangs(x):
        if 6 in x[:, 0]:
            time.sleep(60)
        return first(x)

    begin = time.monotonic()
    reward = cd.pooled(hangs, workers=2, chunk=2, time_limit=0.5)
    with pytest.raises(RewardError, match="'hangs' raised TimeoutError .* no value for samples 2 to 3 within time_limit=0.5 s"):
        compute_rewards(reward, X)
    assert time.monotonic() - begin < 10
    with pytest.raises(RewardError, match="samples 2 to 3"):  # and again: the pool is made anew
        compute_rewards(reward, X)


def test_errors_name_the_samples():
    def raises(x):
        if 8 in x:
            raise OSError("disk gone")
        return first(x)

    with pytest.raises(RewardError, match="samples 4 to 4: OSError: disk gone"):
        compute_rewards(cd.pooled(raises), X)
    with pytest.raises(RewardError, match=r"samples 0 to 2: shape \(\) instead of one number per sample"):
        compute_rewards(cd.pooled(lambda x: x.sum(), chunk=3), X)
    with pytest.raises(ValueError, match="workers=0"):
        cd.pooled(first, workers=0)
    with pytest.raises(ValueError, match="time_limit=-1"):
        cd.pooled(first, time_limit=-1.0)


def test_a_weighted_sum_is_evaluated_part_by_part():
    reward = cd.weighted_sum(
        (2.0, cd.differentiable(lambda x: x[:, 0], "left")), (-1.0, cd.black_box(lambda x: x[:, 1], "right"))
    )
    assert not reward.differentiable and reward.name == "2 left + -1 right"
    total, parts = compute_reward_terms(reward, X)
    np.testing.assert_array_equal(total, 2 * X[:, 0] - X[:, 1])
    np.testing.assert_array_equal(parts["left"], X[:, 0])
    np.testing.assert_array_equal(parts["right"], X[:, 1])
    np.testing.assert_array_equal(compute_rewards(reward, X), total)


def test_a_sum_of_differentiable_rewards_is_differentiable():
    square = cd.differentiable(lambda x: jnp.sum(x**2, axis=1), "square")
    reward = cd.weighted_sum((0.5, square), (3.0, cd.differentiable(lambda x: x[:, 0], "left")))
    assert reward.differentiable
    gradient = jax.grad(lambda x: jnp.sum(reward.fn(x)))(X)
    np.testing.assert_allclose(gradient, X + jnp.asarray([3.0, 0.0]))


def test_parts_have_names_of_their_own():
    with pytest.raises(ValueError, match=r"weighted_sum of \['first', 'first'\]: give at least one reward, and each a name"):
        cd.weighted_sum((1.0, first), (2.0, first))
    with pytest.raises(ValueError, match=r"weighted_sum of \[\]"):
        cd.weighted_sum()


class Tensor:
    """What a torch tensor that needs a gradient does."""

    def __init__(self, values):
        self.values = values

    def detach(self):
        return Plain(self.values)

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")


class Plain:
    def __init__(self, values):
        self.values = values

    def cpu(self):
        return self

    def is_floating_point(self):
        return True

    def float(self):
        return np.asarray(self.values, np.float32)

    def tolist(self):
        return self.values


FIRST = [float(v) for v in X[:, 0]]
RETURNED = {
    "pair": lambda x: (FIRST, {"judge": "a"}),
    "list": lambda x: FIRST,
    "float16": lambda x: np.asarray(FIRST, np.float16),
    "bfloat16": lambda x: np.asarray(jnp.asarray(FIRST, jnp.bfloat16)),
    "integers": lambda x: np.asarray(FIRST, np.int64),
    "objects": lambda x: np.asarray(FIRST, object),
    "no masked value": lambda x: np.ma.masked_less(FIRST, -1.0),
    "a tensor that needs a gradient": lambda x: Tensor(FIRST),
    "a list of tensors": lambda x: [Tensor(v) for v in FIRST],
}


@pytest.mark.parametrize("name", RETURNED)
def test_numbers_are_taken_in_whatever_form_they_come(name):
    np.testing.assert_array_equal(compute_rewards(cd.black_box(RETURNED[name]), X), X[:, 0])


def test_truth_is_one():
    np.testing.assert_array_equal(compute_rewards(cd.black_box(lambda x: x[:, 0] > 5), X), X[:, 0] > 5)


REFUSED = {
    "ragged": (lambda x: [[1.0], *[1.0, 2.0]], "which is no array of numbers"),
    "none": (lambda x: None, "returned None, which is no array of numbers"),
    "objects": (lambda x: [object()] * len(x), "which is no array of numbers"),
    "one number": (lambda x: 1.0, r"returned shape \(\) for a batch of 10"),
    "column": (lambda x: x[:, :1], r"returned shape \(10, 1\)"),
    "text": (lambda x: ["good"] * len(x), "return real numbers"),
    "complex": (lambda x: x[:, 0] + 1j, "returned complex64 values: return real numbers"),
    "masked": (lambda x: np.ma.masked_equal(FIRST, 4.0), "returned a masked value for sample 2"),
    "beyond float32": (
        lambda x: np.where(x[:, 0] == 4, 1e300, 0),
        r"returned 1e\+300 for sample 2, which is beyond .* float32",
    ),
    "not finite": (lambda x: np.where(x[:, 0] == 4, np.nan, 0), "returned nan for sample 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_number_for_each_sample_is_refused_by_name(name):
    fn, message = REFUSED[name]
    with pytest.raises(RewardError, match=f"reward 'odd' .*{message}"):
        compute_rewards(cd.black_box(fn, "odd"), X)


def test_a_differentiable_reward_may_be_in_half_precision():
    reward = cd.differentiable(lambda x: x[:, 0].astype(jnp.bfloat16))
    found = compute_rewards(reward, X)
    assert found.dtype == X.dtype
    np.testing.assert_array_equal(found, X[:, 0])
    with pytest.raises(RewardError, match="return real numbers"):
        compute_rewards(cd.differentiable(lambda x: x[:, 0] + 1j), X)


@pytest.mark.parametrize("make", [cd.black_box, cd.differentiable])
def test_samples_that_are_not_finite_are_not_judged(make):
    with pytest.raises(RewardError, match="sample 3 is not finite .1 of 10 are not., so it has no reward 'first'"):
        compute_rewards(make(first), X.at[3, 1].set(jnp.nan))
