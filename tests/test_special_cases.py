"""Published losses, written out from their papers in a few lines, against the presets: loss and gradient to 1e-6 in float64.

The chain here is DDPM's, from its own formulae (`alpha_bar`, posterior mean, posterior variance). One plain gradient step of size 1
turns a preset's gradient into a difference of parameters.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ctrl_diffusion as cd
from ctrl_diffusion.critics import returns
from ctrl_diffusion.estimators import discount_per_step

STEPS, BATCH, DIM, KL_WEIGHT = 6, 8, 3, 0.4
KEY = jax.random.key(3)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


PROCESS = cd.DiffusionProcess(cd.VPLinear(tau_min=0.05), eta=1.0)


def network(params, t, x):
    """A random network's epsilon prediction."""
    h = jnp.tanh(x @ params["w1"] + t[:, None] * params["b1"])
    return h @ params["w2"] + 0.3 * x


def weights(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"w1": (DIM, 5), "b1": (5,), "w2": (5, DIM)}
    return {name: 0.5 * jax.random.normal(k, shape, jnp.float64) for k, (name, shape) in zip(keys, shapes.items())}


def control(params, t, x, cond):
    t = jnp.broadcast_to(t, x.shape[:1])
    return -network(params, t, x) / PROCESS.schedule.sigma(PROCESS.tau(t))[:, None]


def reward(x):
    return jnp.sin(x[:, 0]) - 0.3 * jnp.sum(x**2, axis=1)


class Chain:
    """DDPM with the same network: `x' = mean(x) + std xi`, coefficients from `alpha_bar` alone."""

    def __init__(self):
        self.t = jnp.linspace(0.0, 0.95, STEPS + 1)
        tau = 1 - self.t
        self.bar = jnp.exp(-(0.1 * tau + 0.5 * 19.9 * tau**2))

    def x0(self, params, j, x):
        eps = network(params, jnp.full(len(x), self.t[j]), x)
        return (x - jnp.sqrt(1 - self.bar[j]) * eps) / jnp.sqrt(self.bar[j])

    def std(self, j):
        ratio = self.bar[j] / self.bar[j + 1]  # alpha of the step
        return jnp.sqrt((1 - self.bar[j + 1]) / (1 - self.bar[j]) * (1 - ratio))

    def mean(self, params, j, x):
        ratio = self.bar[j] / self.bar[j + 1]
        x0_weight = jnp.sqrt(self.bar[j + 1]) * (1 - ratio) / (1 - self.bar[j])
        x_weight = jnp.sqrt(ratio) * (1 - self.bar[j + 1]) / (1 - self.bar[j])
        return x0_weight * self.x0(params, j, x) + x_weight * x

    def kl(self, params, reference, j, x):
        return jnp.sum((self.mean(params, j, x) - self.mean(reference, j, x)) ** 2, axis=1) / (2 * self.std(j) ** 2)

    def log_prob(self, params, j, x, x_next):
        return -jnp.sum((x_next - self.mean(params, j, x)) ** 2, axis=1) / (2 * self.std(j) ** 2)


def objective(kl_weight, **settings):
    sampler = cd.Sampler(PROCESS, control, (DIM,), grid=PROCESS.grid(STEPS), dtype=jnp.float64)
    return cd.Objective(sampler, cd.differentiable(reward), kl_weight, **settings)


def one_step(algorithm, value_params=()):
    """States before and after one iteration; the policy has left the reference already. Returns the recorded path, too."""
    state = algorithm.init(weights(0), value_params)._replace(reference=weights(1))
    new, info = algorithm.step(KEY, state)
    return new, info


def recorded(which=0):
    sampler = objective(0.0).sampler
    path = sampler.trajectory(weights(which), cd.sample_keys(jax.random.split(KEY)[0], BATCH))
    return np.asarray(path.x), np.asarray(path.noise)


def assert_gradient(new, old, loss):
    """`old - new` is the gradient of `loss` at `old`."""
    expected = jax.grad(loss)(old)
    for name in expected:
        scale = float(jnp.max(jnp.abs(expected[name])))
        assert scale > 1e-3  # the check is not vacuous
        np.testing.assert_allclose(old[name] - new[name], expected[name], rtol=1e-6, atol=1e-6 * scale)


SGD = cd.Training(optax.sgd(1.0), BATCH)


def test_the_chain_is_ddpm():
    x, noise = recorded()
    chain = Chain()
    for j in range(STEPS):
        np.testing.assert_allclose(chain.mean(weights(0), j, x[j]) + chain.std(j) * noise[j], x[j + 1], rtol=1e-10, atol=1e-10)


def test_ddpo():
    """Black et al. 2024, eq. 7 with PPO's clip, log-densities summed; the second epoch has ratios other than one."""
    rate, clip = 0.05, 0.02
    training = cd.Training(optax.sgd(rate), BATCH, epochs=2)
    new, info = one_step(cd.ddpo(objective(0.0), training, clip=clip))
    x, _ = recorded()
    chain, old = Chain(), weights(0)
    r = reward(x[-1])
    advantage = (r - jnp.mean(r)) / jnp.std(r)

    def loss(params):
        total = 0.0
        for j in range(STEPS):
            ratio = jnp.exp(chain.log_prob(params, j, x[j], x[j + 1]) - chain.log_prob(old, j, x[j], x[j + 1]))
            total += jnp.mean(jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage))
        return -total

    first = jax.tree.map(lambda p, g: p - rate * g, old, jax.grad(loss)(old))
    second = jax.tree.map(lambda p, g: p - rate * g, first, jax.grad(loss)(first))
    assert float(info.metrics["clip_fraction"]) > 0.1  # the clip is at work
    np.testing.assert_allclose(info.metrics["policy_loss"], loss(first), rtol=1e-6)
    for name in old:
        np.testing.assert_allclose(new.params[name], second[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("steps", [2, None])
def test_draft(steps):
    """Clark et al. 2024, algorithm 1: the reward through the last K steps, no gradient before them."""
    new, info = one_step(cd.draft(objective(0.0), SGD, steps=steps))
    x, noise = recorded()
    chain, k = Chain(), STEPS if steps is None else steps

    def loss(params):
        state = x[STEPS - k]
        for j in range(STEPS - k, STEPS):
            state = chain.mean(params, j, state) + chain.std(j) * noise[j]
        return -jnp.mean(reward(state))

    np.testing.assert_allclose(info.metrics["policy_loss"], loss(weights(0)), rtol=1e-6)
    assert_gradient(new.params, weights(0), loss)


def test_draft_in_small_memory_is_the_same():
    results = [one_step(cd.draft(objective(KL_WEIGHT), SGD, small_memory=small))[0].params for small in (False, True)]
    for name in results[0]:
        np.testing.assert_allclose(results[0][name], results[1][name], rtol=1e-12)


def test_draft_with_a_kl_penalty_is_the_whole_objective():
    """Through all steps, with the KL of every step: the reparameterised gradient of J itself."""
    new, _ = one_step(cd.draft(objective(KL_WEIGHT), SGD))
    x, noise = recorded()
    chain, reference = Chain(), weights(1)

    def loss(params):
        state, paid = x[0], 0.0
        for j in range(STEPS):
            paid += chain.kl(params, reference, j, state)
            state = chain.mean(params, j, state) + chain.std(j) * noise[j]
        return -jnp.mean(reward(state) - KL_WEIGHT * paid)

    assert_gradient(new.params, weights(0), loss)


def test_sqdf():
    """Its official loss: `-gamma^(steps to go) r(x0_hat(x')) + alpha mean_d((mu - mu_ref)^2 / sigma^2)`, replayed states."""
    gamma, alpha = 0.8, 0.6
    problem = objective(cd.conversions.sqdf_kl_weight(alpha, DIM))
    new, info = one_step(cd.sqdf(problem, SGD, discount=discount_per_step(gamma), capacity=BATCH))
    x, noise = recorded()
    drawn = jax.random.choice(jax.random.split(KEY, 5)[3], BATCH, (BATCH,), p=jnp.full(BATCH, 1 / BATCH))
    x, noise = x[:, drawn], noise[:, drawn]
    chain, reference = Chain(), weights(1)

    def loss(params):
        total = 0.0
        for j in range(STEPS):
            mean, mean_ref = chain.mean(params, j, x[j]), chain.mean(reference, j, x[j])
            x_next = mean + chain.std(j) * noise[j]
            guess = x_next
            if j + 1 < STEPS:  # posterior mean of X(t1), which is noised to tau_min: x0_hat moved forward by DDPM's own mean
                end = chain.bar[-1] / chain.bar[j + 1]
                x0 = chain.x0(reference, j + 1, x_next)
                inv = chain.bar[j + 1] / chain.bar[-1]
                guess = jnp.sqrt(chain.bar[-1]) * (1 - inv) / (1 - chain.bar[j + 1]) * x0
                guess += jnp.sqrt(inv) * (1 - chain.bar[-1]) / (1 - chain.bar[j + 1]) * x_next
                assert end > 1
            price = alpha * jnp.mean((mean - mean_ref) ** 2 / chain.std(j) ** 2, axis=1)
            total += jnp.mean(-(gamma ** (STEPS - 1 - j)) * reward(guess) + price)
        return total

    np.testing.assert_allclose(info.metrics["policy_loss"], loss(weights(0)), rtol=1e-6)
    assert_gradient(new.params, weights(0), loss)


def test_adjoint_matching():
    """Domingo-Enrich et al. 2025: regress the control on the lean adjoint, Jacobians written out, reward over lambda."""
    new, info = one_step(cd.adjoint_matching(objective(KL_WEIGHT), SGD))
    x, _ = recorded()
    chain, reference = Chain(), weights(1)
    adjoint = jax.vmap(jax.grad(lambda x: reward(x[None])[0]))(jnp.asarray(x[-1])) / KL_WEIGHT
    targets = []
    for j in reversed(range(STEPS)):
        targets.insert(0, adjoint)
        jacobian = jax.vmap(jax.jacobian(lambda x, j=j: chain.mean(reference, j, x[None])[0]))(jnp.asarray(x[j]))
        adjoint = jnp.einsum("bij,bi->bj", jacobian, adjoint)

    def loss(params):
        total = 0.0
        for j in range(STEPS):
            u = (chain.mean(params, j, x[j]) - chain.mean(reference, j, x[j])) / chain.std(j)
            total += jnp.mean(jnp.sum((u - chain.std(j) * targets[j]) ** 2, axis=1)) / 2
        return KL_WEIGHT * total

    np.testing.assert_allclose(info.metrics["policy_loss"], loss(weights(0)), rtol=1e-6)
    assert_gradient(new.params, weights(0), loss)


def plain_value(params, t, x, cond=None):
    return jnp.tanh(x @ params["w"] + t[..., None])[:, 0] * params["s"]


VALUE = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((DIM, 1))), "s": jnp.asarray(0.7)}


def test_vard():
    """The reconstruction: `E (V(t, x) - r)^2`, then `E[-V(t', x'(theta)) + eta kl]`; `V(t1, x) = r(x)` at the end."""
    with jax.enable_x64(True):
        value_params = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), VALUE)
        training = SGD._replace(value=optax.sgd(1.0))
        value = cd.PlainValue(plain_value, PROCESS.t0, PROCESS.t1)
        new, info = one_step(cd.vard(objective(KL_WEIGHT), value, training, target=returns), value_params)
        x, noise = recorded()
        chain, reference = Chain(), weights(1)

        def value_loss(params):
            rows = [(plain_value(params, jnp.full(BATCH, chain.t[j]), x[j]) - reward(x[-1])) ** 2 for j in range(STEPS)]
            return jnp.mean(jnp.stack(rows))

        def loss(params):
            total = 0.0
            for j in range(STEPS):
                x_next = chain.mean(params, j, x[j]) + chain.std(j) * noise[j]
                last = j + 1 == STEPS
                v = reward(x_next) if last else plain_value(value_params, jnp.full(BATCH, chain.t[j + 1]), x_next)
                total += jnp.mean(-v + KL_WEIGHT * chain.kl(params, reference, j, x[j]))
            return total

        np.testing.assert_allclose(info.metrics["policy_loss"], loss(weights(0)), rtol=1e-6)
        np.testing.assert_allclose(info.metrics["value_loss"], value_loss(value_params), rtol=1e-6)
        assert_gradient(new.params, weights(0), loss)
        gradient = jax.grad(value_loss)(value_params)
        for name in gradient:
            np.testing.assert_allclose(value_params[name] - new.value_params[name], gradient[name], rtol=1e-6, atol=1e-10)


def test_refl():
    """Xu et al. 2023: the reward of the policy's own guess at late states, the states held fixed."""
    new, _ = one_step(cd.refl(objective(0.0, x0_prediction=denoised), SGD, fraction=0.5))
    x, _ = recorded()
    chain = Chain()

    def loss(params):
        return -sum(jnp.mean(reward(chain.x0(params, j, x[j]))) for j in range(STEPS // 2, STEPS))

    assert_gradient(new.params, weights(0), loss)


def denoised(sampler, reference, t, x, action, cond):
    return PROCESS.denoise(t, x, action)


def test_log_variance():
    """Nuesken and Richter 2021, from Gaussian densities of whole paths: half the variance of what is left, over lambda."""
    new, info = one_step(cd.log_variance(objective(KL_WEIGHT), SGD))
    x, _ = recorded()
    chain, reference = Chain(), weights(1)

    def loss(params):
        log_ratio = sum(
            chain.log_prob(params, j, x[j], x[j + 1]) - chain.log_prob(reference, j, x[j], x[j + 1]) for j in range(STEPS)
        )
        left = reward(x[-1]) - KL_WEIGHT * log_ratio
        return jnp.sum((left - jnp.mean(left)) ** 2) / (BATCH - 1) / (2 * KL_WEIGHT)

    np.testing.assert_allclose(info.metrics["policy_loss"], loss(weights(0)), rtol=1e-6)
    assert_gradient(new.params, weights(0), loss)


def policy_gradient_loss(advantages, own_kl):
    """`-sum_j E[log pi_j A_j] + lambda sum_j E kl_j` at the old policy, whose ratios are one."""
    x, _ = recorded()
    chain, reference = Chain(), weights(1)

    def loss(params):
        total = 0.0
        for j in range(STEPS):
            log_prob = chain.log_prob(params, j, x[j], x[j + 1])
            total += jnp.mean(-log_prob * advantages[j] + own_kl * chain.kl(params, reference, j, x[j]))
        return total

    return loss


def test_dpok():
    """Fan et al. 2023: likelihood ratio of the return, here with the KL still to be paid, and the gradient of each KL."""
    new, _ = one_step(cd.dpok(objective(KL_WEIGHT), SGD))
    x, _ = recorded()
    chain = Chain()
    kl = jnp.stack([chain.kl(weights(0), weights(1), j, x[j]) for j in range(STEPS)])
    to_go = jnp.stack([reward(x[-1]) - KL_WEIGHT * jnp.sum(kl[j:], axis=0) for j in range(STEPS)])
    loss = policy_gradient_loss(to_go - jnp.mean(to_go, axis=1, keepdims=True), KL_WEIGHT)
    assert_gradient(new.params, weights(0), loss)


def test_flow_grpo():
    """Liu et al. 2025: returns standardised within the group, a KL penalty of each step alone."""
    new, _ = one_step(cd.flow_grpo(objective(KL_WEIGHT), SGD))
    x, _ = recorded()
    r = reward(x[-1])
    advantage = (r - jnp.mean(r)) / jnp.std(r)
    assert_gradient(new.params, weights(0), policy_gradient_loss([advantage] * STEPS, KL_WEIGHT))


def test_rwr():
    """Weighted maximum likelihood on the reference's paths, weights `exp(r / lambda)` over their mean."""
    new, _ = one_step(cd.rwr(objective(KL_WEIGHT), SGD))
    x, _ = recorded(which=1)
    chain = Chain()
    w = jnp.exp(reward(x[-1]) / KL_WEIGHT)

    def loss(params):
        log_probs = sum(chain.log_prob(params, j, x[j], x[j + 1]) for j in range(STEPS))
        return -KL_WEIGHT * jnp.mean(w / jnp.mean(w) * log_probs)

    assert_gradient(new.params, weights(0), loss)


def test_vidd():
    """Su et al. 2025: every step of the reference weighted with the gain of `r(x0_hat)`, normalised over the batch."""
    new, _ = one_step(cd.vidd(objective(KL_WEIGHT, x0_prediction=denoised), SGD))
    x, _ = recorded(which=1)
    chain = Chain()
    values = [reward(chain.x0(weights(1), j, x[j])) for j in range(STEPS)] + [reward(x[-1])]

    def loss(params):
        total = 0.0
        for j in range(STEPS):
            gain = (values[j + 1] - values[j]) / KL_WEIGHT
            w = jnp.exp(gain - jnp.max(gain))  # guesses from nearly pure noise are far off
            total -= jnp.mean(w / jnp.mean(w) * chain.log_prob(params, j, x[j], x[j + 1]))
        return KL_WEIGHT * total

    assert_gradient(new.params, weights(0), loss)


def test_conversions():
    """Each converted constant gives the same number as the published expression."""
    rng = np.random.default_rng(0)
    dim, sigma = 16384, 0.37
    difference = rng.standard_normal(dim)
    kl = np.sum(difference**2) / (2 * sigma**2)
    np.testing.assert_allclose(
        cd.conversions.sqdf_kl_weight(2.0, dim) * kl, 2.0 * np.mean(difference**2 / sigma**2), rtol=1e-12
    )
    assert cd.conversions.sqdf_kl_weight(2.0, dim) == pytest.approx(2.44e-4, rel=2e-3)
    log_ratios = rng.standard_normal(50) * 1e-3  # a mean log-ratio at the edge of its clip is a sum at the edge of the other
    edge = 50 * np.log1p(1e-4)
    below, above = cd.conversions.summed_clip(1e-4, 50)
    assert np.exp(edge) - 1 == pytest.approx(above, rel=1e-12) and below == pytest.approx(1 - (1 - 1e-4) ** 50, rel=1e-9)
    assert np.exp(np.mean(log_ratios - np.mean(log_ratios) + edge / 50)) - 1 == pytest.approx(1e-4, rel=1e-9)
    assert cd.conversions.dpok_kl_weight(10.0, 0.01) == pytest.approx(0.001)
    assert cd.conversions.adjoint_matching_kl_weight(100.0) == pytest.approx(0.01)
    assert cd.conversions.vard_kl_weight(0.3, 10, mean_over_dimensions=True) == pytest.approx(0.03)
    with pytest.raises(ValueError, match="dim=0 must be"):
        cd.conversions.sqdf_kl_weight(1.0, 0)
