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
