"""Composed algorithms: stationary at the optimum, within their radius, from buffers in order, by a stranger, with clear refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ctrl_diffusion as cd
from ctrl_diffusion import exact
from ctrl_diffusion.critics import log_ratio_to_go, soft_error
from ctrl_diffusion.estimators import (
    GradientBalance,
    LeanAdjoint,
    LogVariance,
    Matching,
    PathConsistency,
    Pathwise,
    value_gradient,
)
from ctrl_diffusion.objective import chi_squared, squared_hellinger
from ctrl_diffusion.replay import positive_reward
from ctrl_diffusion.rollout import Rollout, Transitions
from ctrl_diffusion.solvers import power
from ctrl_diffusion.trust import fisher_product, moved_kl
from ctrl_diffusion.values import NoValue

SCHEDULE = cd.VPLinear(beta_min=4.0, beta_max=4.0, horizon=2.0, tau_min=2e-3, tau_max=2.0)
PROBLEM = exact.GaussianControl(
    exact.GaussianQuadratic(cd.DiffusionProcess(SCHEDULE), 1.0, 0.5, 1.0, -0.5, 0.7, noise_start=True)
)
PROCESS = PROBLEM.process


def control(params, t, x, cond=None):
    """`a_ref + w (a* - a_ref) + shift + slope x`: the optimum at `(1, 0, 0)`, the reference at zero."""
    a, a_ref = PROBLEM.optimal_action(None, t, x), PROBLEM.reference_action(None, t, x)
    return a_ref + params[0] * (a - a_ref) + params[1] + params[2] * x


def grid(steps):
    return power(PROCESS.t0, PROCESS.t1, steps, 2.0)


def objective(steps=100, **settings):
    sampler = cd.Sampler(PROCESS, control, (1,), grid=grid(steps))
    return cd.Objective(sampler, cd.differentiable(PROBLEM.reward), PROBLEM.kl_weight, **settings)


EXACT = cd.Critic(cd.GivenValue(PROBLEM.value, PROCESS.t0, PROCESS.t1))
NONE = cd.Critic(NoValue(PROCESS.t0, PROCESS.t1))
ESTIMATORS = {
    "pathwise through one step": (Pathwise(1), EXACT),
    "pathwise through ten steps": (Pathwise(10), EXACT),
    "matching the value's gradient": (Matching(value_gradient), EXACT),
    "matching the lean adjoint": (Matching(LeanAdjoint()), NONE),
    "matching the bootstrapped adjoint": (Matching(LeanAdjoint(0.2)), NONE),
    "gradients of detailed balance": (GradientBalance(), EXACT),
    "likelihood ratio": (cd.estimators.LikelihoodRatio(), EXACT),
    "log-variance": (LogVariance(), NONE),
    "path consistency": (PathConsistency(), EXACT),
    "path consistency over ten intervals": (PathConsistency(10), EXACT),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_stands_still_at_the_optimum(name):
    """Its gradient at a* is discretisation and noise: a few percent of that at the reference."""
    estimator, critic = ESTIMATORS[name]
    algorithm = cd.compose(objective(128), estimator, critic, cd.Training(optax.sgd(1.0), 2048))
    gradients = []
    for start in ([1.0, 0.0, 0.0], [0.0, 0.0, 0.0]):
        before = jnp.asarray(start)
        state = algorithm.init(before)._replace(reference=jnp.zeros(3))
        after = algorithm.step(jax.random.key(0), state)[0].params
        gradients.append(np.asarray(jnp.asarray(start) - after))
    at_optimum, at_reference = gradients
    assert at_reference[0] < 0  # towards the optimum
    assert np.linalg.norm(at_optimum) < 0.06 * np.linalg.norm(at_reference)


def test_reverse_detailed_balance_finds_the_value():
    """With the optimal policy, `V* + shift + w x^2` is fitted at w = 0: the reverse residual has mean zero given x there alone."""
    problem = objective(100)

    def tilted(params, t, x, x_hat, r_hat, cond=None):
        return PROBLEM.value(t, x) + params * (1 - jnp.broadcast_to(t, x.shape[:1]) / PROCESS.t1) * x[:, 0] ** 2

    class Tilted(cd.values.AbstractValue):
        t0: float = PROCESS.t0
        t1: float = PROCESS.t1
        uses_reward: bool = False

        def __call__(self, params, t, x, x_hat, r_hat, cond=None):
            return tilted(params, t, x, x_hat, r_hat)

    critic = cd.Critic(Tilted())
    algorithm = cd.compose(problem, GradientBalance(), critic, cd.Training(optax.sgd(0.0), 2048, value=optax.sgd(1.0)))
    slopes = []
    for w in (-0.3, 0.0, 0.3):
        state = algorithm.init(jnp.asarray([1.0, 0.0, 0.0]), jnp.asarray(w))._replace(reference=jnp.zeros(3))
        slopes.append(w - float(algorithm.step(jax.random.key(0), state)[0].value_params))
    assert slopes[0] < 0 < slopes[2]
    assert abs(slopes[1]) < 0.02 * (slopes[2] - slopes[0])  # a pull of the other sign: 0.05


def pairs(problem, params, batch=512):
    """Transitions of on-policy states, with nothing but what distances need."""
    path = jax.jit(problem.sampler.trajectory)(params, cd.sample_keys(jax.random.key(0), batch))
    n = problem.intervals
    j = jnp.repeat(jnp.arange(n), batch)
    x = path.x[:-1].reshape(n * batch, 1)
    empty = jnp.zeros(n * batch)
    return Transitions(j, x, jnp.ones_like(empty))


def test_fisher_product_is_the_hessian_of_the_path_kl():
    """On a small network, against the explicit Gauss-Newton matrix and against the second derivative of the KL."""
    network = cd.ResidualMLP((1,), (1,), width=4, depth=1, rngs=nnx.Rngs(0))
    fn, params = cd.value_network(network)
    flat, unflatten = jax.flatten_util.ravel_pytree(params)
    flat = flat + 0.3 * jax.random.normal(jax.random.key(1), flat.shape)

    def net(params, t, x, cond=None):
        return PROBLEM.reference_action(None, t, x) + fn(unflatten(params), t, x)

    sampler = cd.Sampler(PROCESS, net, (1,), grid=grid(10))
    problem = cd.Objective(sampler, PROBLEM.reward, 0.7)
    rows = pairs(problem, flat, batch=16)
    vector = jax.random.normal(jax.random.key(2), flat.shape)

    @jax.jit
    def evaluated(flat, rows, vector):
        jacobian = jax.jacobian(lambda p: problem.scales[rows.j][:, None] * problem.control(p, rows.j, rows.x))(flat)[:, 0]
        matrix = problem.intervals / len(rows.j) * jacobian.T @ jacobian
        hessian = jax.hessian(lambda p: moved_kl(problem, p, flat, rows))(flat)
        return fisher_product(problem, flat, rows, vector), matrix @ vector, hessian, matrix

    product, expected, hessian, matrix = map(np.asarray, evaluated(flat, rows, vector))
    np.testing.assert_allclose(product, expected, rtol=2e-3, atol=2e-3 * np.max(np.abs(product)))
    np.testing.assert_allclose(hessian, matrix, rtol=2e-3, atol=2e-3 * np.max(np.abs(matrix)))


@pytest.mark.slow
@pytest.mark.parametrize("fisher_transitions", [None, 512])
def test_trpo_stays_in_its_radius_in_every_iteration(fisher_transitions):
    """Also with a twenty-fifth of the rows in F: all times are among them, or the KL of the step would be far from the radius."""
    radius = 0.03
    training = cd.Training(cd.trust.NaturalGradient(radius, fisher_transitions=fisher_transitions), 512, 1, 1)
    problem = objective(25)
    algorithm = cd.score_as_action(problem, EXACT.value, training)
    state = algorithm.init(jnp.zeros(3))
    measured = jax.jit(lambda new, old: moved_kl(problem, new, old, pairs(problem, old, 2048)))  # on fresh paths
    used = []
    for i in range(6):
        old = jnp.array(state.params)
        state, info = algorithm.step(jax.random.key(i), state)
        moved = float(measured(state.params, old))
        used.append(float(info.metrics["update_kl"]))
        assert 0 < used[-1] <= radius
        assert i > 0 or float(info.metrics["backtracks"]) <= 1  # far from the optimum, where the KL alone limits the step
        assert moved == pytest.approx(used[-1], rel=0.15)  # the same number on other paths of the same policy
    assert max(used) > 0.5 * radius  # and uses it


@pytest.mark.slow
def test_trpo_in_parts_is_trpo():
    """One update in one part and in four, in float64: the same rows, so that only the order of sums differs."""
    with jax.enable_x64(True):
        found = []
        sampler = cd.Sampler(PROCESS, control, (1,), grid=grid(25), dtype=jnp.float64)
        problem = cd.Objective(sampler, cd.differentiable(PROBLEM.reward), PROBLEM.kl_weight)
        for parts in (1, 4):
            training = cd.Training(cd.trust.NaturalGradient(0.03), 64, accumulation=parts)
            algorithm = cd.score_as_action(problem, EXACT.value, training)
            found.append(algorithm.step(jax.random.key(0), algorithm.init(jnp.zeros(3))))
    (one, info), (four, info_in_parts) = found
    assert np.max(np.abs(one.params)) > 0.01
    np.testing.assert_allclose(four.params, one.params, rtol=1e-8)
    for name in ("policy_loss", "update_kl", "backtracks", "max_log_ratio"):
        np.testing.assert_allclose(info_in_parts.metrics[name], info.metrics[name], rtol=1e-8, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [10, 100])
def test_the_radius_means_the_same_at_any_number_of_steps(steps):
    """One update at 10 or 100 equal control steps moves the policy by the same path KL, measured on one fine grid."""
    radius, process = 0.03, cd.DiffusionProcess(cd.VPLinear(4.0, 4.0, 2.0, tau_min=0.1, tau_max=2.0))

    def problem(n):
        reward = cd.differentiable(PROBLEM.reward)
        return cd.Objective(cd.Sampler(process, control, (1,), grid=process.grid(n)), reward, PROBLEM.kl_weight)

    region = cd.trust.NaturalGradient(radius, damping=0.0)
    algorithm = cd.score_as_action(problem(steps), EXACT.value, cd.Training(region, 4096))
    state, info = algorithm.step(jax.random.key(0), algorithm.init(jnp.zeros(3)))
    assert 0.9 * radius < float(info.metrics["update_kl"]) <= radius
    fine = problem(400)
    moved = float(jax.jit(lambda new, old: moved_kl(fine, new, old, pairs(fine, old, 1024)))(state.params, jnp.zeros(3)))
    assert moved == pytest.approx(radius, rel={10: 0.5, 100: 0.1}[steps])  # first order in the step


def rollout(batch, tag):
    n = 3
    x = jnp.full((n + 1, batch, 1), float(tag))
    step, pairs, rewards = x[:-1], jnp.full((n, batch), float(tag)), jnp.full(batch, float(tag))
    return Rollout(jnp.arange(4.0), x, rewards, pairs, pairs, noise=step, a_ref=step, x_hat=step, r_hat=pairs)


def test_replay_is_first_in_first_out():
    replay = cd.replay.ReplayBuffer(4)
    memory = replay.init(rollout(2, 0))
    for tag in (1, 2, 3):
        drawn = [replay.update(jax.random.key(i), memory, rollout(2, tag))[1].reward for i in range(12)]
        assert set(np.unique(drawn)) == {1: {1.0}, 2: {1.0, 2.0}, 3: {2.0, 3.0}}[tag]  # never what is empty yet, or gone
        memory, _ = replay.update(jax.random.key(tag), memory, rollout(2, tag))
    stored, count = memory
    assert int(count) == 6
    assert sorted(np.asarray(stored.reward).tolist()) == [2.0, 2.0, 3.0, 3.0]  # the first batch is gone
    np.testing.assert_array_equal(stored.x[0, :, 0], stored.reward)  # all fields move together
    many = [replay.update(jax.random.key(i), memory, rollout(2, 9))[1].reward for i in range(60)]
    share = np.mean(np.concatenate(many) == 9.0)
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(120)  # uniform over what is stored


def test_replay_by_priority():
    replay = cd.replay.ReplayBuffer(4, positive_reward)
    memory = replay.init(rollout(2, 0))
    memory, _ = replay.update(jax.random.key(0), memory, rollout(2, -1))
    drawn = [replay.update(jax.random.key(i), memory, rollout(2, 5))[1].reward for i in range(20)]
    assert np.all(np.concatenate(drawn) == 5.0)  # paths without a positive reward are never drawn
    with pytest.raises(ValueError, match="capacity=1 must hold at least one batch of 2"):
        cd.replay.ReplayBuffer(1).init(rollout(2, 0))


def test_sampled_times_leave_the_gradient_where_it_is():
    """Transitions at a few times, late ones preferred: the weighted mean is that of all rows, the plain mean is not."""
    n, batch = 10, 40_000
    t = jnp.linspace(0.0, 0.9, n)
    j = jnp.broadcast_to(jnp.arange(n)[:, None], (n, batch))
    values = jnp.exp(t)[:, None] + 0.1 * jax.random.normal(jax.random.key(1), (n, batch))
    columns = Transitions(j, values, jnp.ones_like(values), values, noise=values)
    rows = cd.algorithms.TimeSampling(3, lambda t: 0.2 + t)(jax.random.key(0), t, columns)
    np.testing.assert_array_equal(
        rows.policy_target, values[rows.j, jnp.arange(batch)]
    )  # all columns of a row are of one (time, path)
    weighted = rows.weight * rows.policy_target
    error = float(jnp.std(weighted)) / weighted.size**0.5
    assert abs(float(jnp.mean(weighted) - jnp.mean(values))) < 5 * error
    assert float(jnp.mean(rows.policy_target) - jnp.mean(values)) > 20 * error


def test_sampled_times_train_to_the_same_gradient():
    """An iteration on 20 of 100 times of every path moves the policy as one on all of them does."""
    moves = []
    for times in (None, cd.algorithms.TimeSampling(20, lambda t: 1 + t)):
        algorithm = cd.compose(objective(), Matching(value_gradient), EXACT, cd.Training(optax.sgd(1.0), 4096, times=times))
        state = algorithm.init(jnp.zeros(3))
        moves.append(np.asarray(algorithm.step(jax.random.key(0), state)[0].params))
    # the matching error of a row varies by about its mean: 1/sqrt(4096 * 20) of it, five of these
    np.testing.assert_allclose(moves[1], moves[0], atol=5 / np.sqrt(4096 * 20) * np.linalg.norm(moves[0]))


def test_penalties_are_divergences_between_gaussians():
    """Of equal variance, against quadrature."""
    shift = 0.8
    z, w = np.polynomial.hermite_e.hermegauss(80)
    w = w / w.sum()
    ratio = np.exp(shift * z - shift**2 / 2)  # N(shift, 1) over N(0, 1) at z
    kl = jnp.asarray(shift**2 / 2)
    np.testing.assert_allclose(chi_squared(kl), w @ ratio**2 - 1, rtol=1e-5)
    np.testing.assert_allclose(squared_hellinger(kl), w @ (np.sqrt(ratio) - 1) ** 2 / 2, rtol=1e-5)


def test_few_step_ode_is_a_flow_and_one_step_is_the_posterior_mean():
    """With the exact score many steps reach the end of the probability flow; one step to no noise is Tweedie's formula."""
    sampler = objective(5).sampler
    t, x = jnp.asarray(1.0), jnp.asarray([[-1.0], [0.4], [2.0]])
    score = PROBLEM.reference_action(None, t, x)
    taus = jnp.asarray([SCHEDULE.horizon - 1.0, SCHEDULE.tau_min])
    m, v = SCHEDULE.alpha(taus), 0.25 * SCHEDULE.alpha(taus) ** 2 + SCHEDULE.sigma_squared(taus)  # of data N(1, 0.5^2)
    exact_end = m[1] + np.sqrt(v[1] / v[0]) * (x - m[0])  # the flow keeps quantiles
    errors = [cd.x0_prediction.few_step_ode(n)(sampler, jnp.zeros(3), t, x, score) - exact_end for n in (50, 100)]
    assert np.max(np.abs(errors[0])) < 0.12
    np.testing.assert_allclose(errors[0], 2 * errors[1], atol=0.1 * float(np.max(np.abs(errors[0]))))  # first order
    varying = cd.VPLinear(0.5, 8.0, 2.0, tau_min=2e-3, tau_max=2.0)  # whose steps differ, those of SCHEDULE do not
    flow, times = cd.DiffusionProcess(varying, 0.0), np.linspace(1.0, SCHEDULE.horizon - SCHEDULE.tau_min, 3)
    two = cd.x0_prediction.few_step_ode(2)(cd.Sampler(cd.DiffusionProcess(varying), control, (1,)), jnp.zeros(3), t, x, score)
    solved = cd.solvers.integrate(flow.term(control, None), cd.solvers.ExponentialEuler(), times, x, (jnp.zeros(3), None))
    np.testing.assert_allclose(two, solved, rtol=1e-4, atol=1e-5)
    clean = cd.DiffusionProcess(cd.VPLinear(4.0, 4.0, 2.0, tau_min=0.0, tau_max=2.0))
    clean = cd.Sampler(clean, control, (1,), grid=clean.grid(5))
    one = cd.x0_prediction.few_step_ode(1)(clean, jnp.zeros(3), t, x, score)
    np.testing.assert_allclose(one, cd.x0_prediction.posterior_mean(clean, None, t, x, score), atol=1e-5)
    with pytest.raises(ValueError, match="steps=0"):
        cd.x0_prediction.few_step_ode(0)


@pytest.mark.slow
def test_a_strangers_algorithm():
    """Not in the list, from public parts: match the gradient of a learned soft value on replayed states. It finds the optimum."""
    process = cd.DiffusionProcess(cd.VPLinear(tau_min=1e-3), frozen=cd.V)
    problem = exact.MixtureControl(process, exact.ring(), exact.LinearReward((1.0, 0.0)), kl_weight=1.0)
    net, params = cd.value_network(cd.ResidualMLP((2,), (2,), width=32, depth=2, rngs=nnx.Rngs(0)))
    V, value_params = cd.value_network(cd.ResidualMLP((2,), (), width=32, depth=2, rngs=nnx.Rngs(1)))

    def policy(params, t, x, cond=None):
        return problem.reference_action(None, t, x) + net(params, t, x)

    sampler = cd.Sampler(process, policy, (2,), grid=power(process.t0, process.t1, 40, 1.5))
    soft = cd.Critic(cd.StructuredValue(V, process.t0, process.t1), log_ratio_to_go, soft_error)
    rate = optax.cosine_decay_schedule(6e-3, 12 * 16, 0.05)
    mine = cd.compose(
        cd.Objective(sampler, cd.differentiable(problem.reward), problem.kl_weight), Matching(value_gradient), soft,
        cd.Training(optax.adam(rate), batch=256, minibatches=16, value=optax.adam(5e-3)), behaviour=cd.replay.ReplayBuffer(512),
    )  # fmt: skip
    state = mine.init(params, value_params)
    for key in jax.random.split(jax.random.key(0), 12):
        state, _ = mine.step(key, state)
    evaluator = exact.GapEvaluator(problem, cd.sample_keys(jax.random.key(1), 512), steps=100)
    gap = evaluator.gap(sampler.control, state.params)
    assert gap.relative.mean < 0.08  # measured: 0.049 +- 0.004 after 12 iterations of 256 paths
    assert evaluator.gap(sampler.control, params).relative.mean > 0.99


REFUSALS = {
    "gradient of a black box": (lambda o: cd.draft(o, TRAINING), "reward='size' is a black box, and a gradient through"),
    "adjoint without KL": (lambda o: cd.adjoint_matching(o, TRAINING), "kl_weight=0: matching divides by it"),
    "x0 of a black box": (lambda o: cd.sqdf(o, TRAINING), "differentiable, or use an algorithm that needs values only"),
    "no temperature": (lambda o: cd.log_variance(o, TRAINING), "kl_weight=0: the log-variance divides by it"),
    "soft value without KL": (
        lambda o: cd.compose(o, Pathwise(1), SOFT, TRAINING._replace(value=optax.sgd(0.1))),
        "kl_weight=0: the soft error of a value divides by it",
    ),
    "times of whole paths": (
        lambda o: cd.log_variance(
            cd.Objective(o.sampler, o.reward, 1.0), TRAINING._replace(times=cd.algorithms.TimeSampling(3))
        ),
        "LogVariance is trained on whole paths; use times=None",
    ),
    "no times": (
        lambda o: cd.compose(o, Pathwise(1), EXACT, TRAINING._replace(times=cd.algorithms.TimeSampling(0))),
        "times.number=0 must be at least 1",
    ),
    "paths do not divide": (
        lambda o: cd.ddpo(o, TRAINING._replace(minibatches=7)),
        r"minibatches=7 must divide batch \* intervals",
    ),
    "no batch": (lambda o: cd.ddpo(o, TRAINING._replace(batch=0)), "batch=0 must be at least 1"),
    "no horizon": (
        lambda o: cd.adjoint_matching(cd.Objective(o.sampler, o.reward, 1.0), TRAINING, horizon=0.0),
        "horizon=0.0 must",
    ),
    "negative radius": (lambda o: cd.trust.NaturalGradient(-1.0), "radius=-1.0 must be positive"),
    "no steps": (lambda o: Pathwise(-1), "steps=-1 must be at least 0"),
}
TRAINING = cd.Training(optax.sgd(0.1), 8)
SOFT = cd.Critic(cd.PlainValue(control, PROCESS.t0, PROCESS.t1), loss=soft_error)


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_argument_and_the_remedy(name):
    make, message = REFUSALS[name]
    sampler = cd.Sampler(PROCESS, control, (1,), grid=grid(4))

    def size(x):
        return np.abs(x).sum(axis=1)

    with pytest.raises(ValueError, match=message):
        make(cd.Objective(sampler, cd.black_box(size), 0.0))


def test_citations():
    text = cd.citation(cd.vard, cd.sqdf, cd.solvers.DPMSolverPP2M())
    assert "arXiv:2505.15791" in text and "arXiv:2512.04559" in text and text.count("@") >= 3
    with pytest.raises(ValueError, match="soft_vard names no reference"):
        cd.citation(cd.soft_vard)


@pytest.mark.parametrize("minibatches", [2, 4, 5, 10])
def test_stratified_minibatches_deal_out_groups_of_rows(minibatches):
    """4 paths of 5 intervals: a pass has every row once, a minibatch one of each `minibatches` consecutive rows."""
    training = cd.Training(optax.sgd(1.0), 4, minibatches=minibatches, stratified=True)
    algorithm = cd.compose(objective(5), Pathwise(1), EXACT, training)
    rows = Transitions(jnp.tile(jnp.arange(5), 4), jnp.arange(20.0)[:, None], jnp.ones(20))
    dealt = []
    for seed in range(40):
        order = algorithm.programs["shuffle"].run(jax.random.key(seed))
        parts = [algorithm.programs["select"].run(rows, order, i) for i in range(minibatches)]
        x = np.stack([part.x[:, 0] for part in parts]).astype(int)  # [minibatches, rows of one]
        assert sorted(x.ravel()) == list(range(20))
        np.testing.assert_array_equal(x // minibatches, np.broadcast_to(np.arange(20 // minibatches), x.shape))
        for part, numbers in zip(parts, x):
            np.testing.assert_array_equal(part.j, numbers % 5)
        dealt.append(x % minibatches)
    first = np.stack(dealt)[:, 0]  # [40, groups]: which of its group a row of the first minibatch was
    assert len({tuple(v) for v in first}) > 10 or minibatches == 10  # groups are dealt apart from one another
    assert set(first.ravel()) == set(range(minibatches))
