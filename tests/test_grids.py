"""Time grids: spacing, ends, and the timestep tables of discrete samplers."""

import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_diffusion.schedules import RectifiedFlow, VarianceExploding, VPCosine, VPLinear, VPTable
from ctrl_diffusion.solvers import (
    clock_uniform,
    cosine_spaced,
    from_timesteps,
    karras,
    leading,
    linspaced,
    power,
    trailing,
    uniform,
)

SCHEDULES = [VPLinear(), VPCosine(), VPTable(), VarianceExploding(), RectifiedFlow()]


def clock_of(schedule):
    return lambda t: schedule.log_snr(schedule.horizon - jnp.asarray(t))


def ends_of(schedule):
    return schedule.horizon - schedule.tau_max, schedule.horizon - schedule.tau_min


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_clock_uniform_has_equal_steps_of_the_log_snr(schedule):
    ts = clock_uniform(clock_of(schedule), *ends_of(schedule), 12)
    assert (ts[0], ts[-1]) == ends_of(schedule)
    steps = np.diff(clock_of(schedule)(ts))
    np.testing.assert_allclose(steps, np.mean(steps), rtol=2e-3)  # float32 log-SNR near the data end


def test_karras_is_the_published_sequence():
    schedule = VarianceExploding()
    ts = karras(clock_of(schedule), *ends_of(schedule), 17)
    i = np.arange(18) / 17
    published = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(schedule.horizon - ts, published, rtol=2e-3)
    wide = karras(clock_of(schedule), *ends_of(schedule), 17, rho=1.0)
    np.testing.assert_allclose(np.diff(wide), np.mean(np.diff(wide)), rtol=1e-3)


def test_power_steps_are_equal_in_a_root_of_what_is_left():
    ts = power(0.2, 0.9, 10, 1.5)
    assert ts[0] == 0.2 and ts[-1] == 0.9 and len(ts) == 11
    np.testing.assert_allclose(np.diff((0.9 - ts) ** (1 / 1.5)), -(0.7 ** (1 / 1.5)) / 10, rtol=1e-12)
    np.testing.assert_allclose(power(0.2, 0.9, 10, 1.0), uniform(0.2, 0.9, 10), rtol=1e-15)
    with pytest.raises(ValueError, match="exponent=0.0 must be positive"):
        power(0.2, 0.9, 10, 0.0)


def test_cosine_steps_shrink_towards_the_data():
    ts = cosine_spaced(0.2, 0.9, 10)
    assert (ts[0], ts[-1]) == pytest.approx((0.2, 0.9))
    assert np.all(np.diff(ts, 2) < 0)
    assert ts[5] == pytest.approx(0.2 + 0.7 * np.sin(np.pi / 4))


def test_timestep_tables():
    np.testing.assert_array_equal(leading(10), np.arange(900, -1, -100))
    np.testing.assert_array_equal(leading(10, offset=1), np.arange(901, 0, -100))
    np.testing.assert_array_equal(leading(3, drop_last=True), [750, 500, 250])
    np.testing.assert_array_equal(trailing(10), np.arange(999, 98, -100))
    np.testing.assert_array_equal(trailing(3), [999, 666, 332])
    np.testing.assert_array_equal(linspaced(10), np.arange(999, -1, -111))
    np.testing.assert_array_equal(linspaced(4, drop_last=True), [999, 749, 500, 250])


def test_timesteps_are_noising_times():
    schedule = VPTable()
    ts = from_timesteps(trailing(5))
    assert ts[0] == 0 and ts[-1] == 1
    alpha_bar = np.cumprod(1 - np.asarray(schedule.betas))[trailing(5)]
    np.testing.assert_allclose(schedule.alpha(1 - jnp.asarray(ts[:-1])) ** 2, alpha_bar, rtol=1e-4)
    assert from_timesteps([500, 3], end=1e-3)[-1] == pytest.approx(0.999)


def test_bad_grids_say_why():
    with pytest.raises(ValueError, match="infinite at zero"):
        clock_uniform(clock_of(VPLinear(tau_min=0.0)), 0.0, 1.0, 4)
    with pytest.raises(ValueError, match="rho=0.0"):
        karras(clock_of(VPLinear()), 0.0, 0.9, 4, rho=0.0)
    with pytest.raises(ValueError, match="decrease strictly"):
        from_timesteps([1, 5])
    with pytest.raises(ValueError, match="steps=0"):
        leading(0)
    with pytest.raises(ValueError, match="steps=2000"):
        trailing(2000)
    with pytest.raises(ValueError, match="steps=0"):
        uniform(0.0, 1.0, 0)
