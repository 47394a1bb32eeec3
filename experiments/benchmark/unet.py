r"""The task of `experiments.benchmark` in JAX: a U-Net for digits, its rollout and its policy update, by this library and by hand.

The chain is ancestral sampling of a v-prediction, `x0 = alpha x - sigma v`, `x' = keep x + gain x0 + std xi`; the update is one Adam
step on `n mean[lambda kl_ref - min(rho A, clip(rho) A)]`, `log rho = z . xi - |z|^2 / 2`, `z = scale (a - a_old)`,
`a = -x - (alpha / sigma) v`. The hand-written side has these formulas and nothing of the library but its noise and its U-Net.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

import ctrl_diffusion as cd
from ctrl_diffusion.advantages import centre
from ctrl_diffusion.algorithms import State, timed
from ctrl_diffusion.algorithms.iteration import one_pass, one_update
from ctrl_diffusion.algorithms.programs import Timed, running
from ctrl_diffusion.estimators import LikelihoodRatio, Models
from ctrl_diffusion.rollout import Transitions
from ctrl_diffusion.solvers import sample_keys, standard_normal
from ctrl_diffusion.stable_diffusion import UNet, UNetConfig
from ctrl_diffusion.values import NoValue

from ..reward_registry import ink

SHAPE = (8, 8, 1)
CLIP, KL_WEIGHT, LEARNING_RATE, MAX_NORM = 0.2, 1.5, 2e-4, 1.0
TIMESTEPS = 1000.0


def unet_config(channels: tuple[int, ...]) -> UNetConfig:
    """A U-Net of 8x8 images with attention at its coarsest resolution."""
    plain = len(channels) - 1
    return UNetConfig(
        sample_size=SHAPE[0],
        in_channels=SHAPE[-1],
        out_channels=SHAPE[-1],
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * plain,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=4,
    )


class DigitsUNet(nnx.Module):
    """`network(x [b, 8, 8, 1], t [b], cond) -> v [b, 8, 8, 1]`: a U-Net that attends to one token of zeros."""

    def __init__(self, unet: UNet):
        self.unet = unet

    def __call__(self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Any = None) -> Float[Array, "b h w c"]:
        context = jnp.zeros((x.shape[0], 1, self.unet.config.cross_attention_dim), x.dtype)
        return self.unet(x, TIMESTEPS * (1 - t), context)


class Coefficients(NamedTuple):
    """Of every step, `[n]` (see the module)."""

    t: Any
    alpha: Any
    sigma: Any
    keep: Any
    gain: Any
    std: Any
    scale: Any


def coefficients(process: cd.DiffusionProcess, ts: Float[Array, " k"]) -> Coefficients:
    """The chain's numbers, computed once."""
    tau = process.schedule.horizon - ts
    alpha, sigma = process.schedule.alpha(tau), process.schedule.sigma(tau)
    a0, s0, a1, s1 = alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]
    keep = (s1 / s0) ** 2 * a0 / a1
    gain, std = a1 - keep * a0, s1 * jnp.sqrt(1 - (s1 * a0 / (s0 * a1)) ** 2)
    return Coefficients(ts[:-1], a0, s0, keep, gain, std, gain * s0**2 / (a0 * std))


Predict = Callable[[Any, Float[Array, "b h w c"], Float[Array, " b"]], Float[Array, "b h w c"]]


def predict(graphdef: nnx.GraphDef) -> Predict:
    """The network as a function of its parameters."""
    return lambda params, x, t: nnx.merge(graphdef, params)(x, t)


def rollout(predict: Predict, c: Coefficients, params, x, noise_of: Callable[[Any], Any]):
    """States `[n + 1, b, *x]` and noise `[n, b, *x]` from `x` on; `noise_of(i)` gives the normals of step `i`."""

    def step(x, row):
        i, c = row
        x0 = c.alpha * x - c.sigma * predict(params, x, jnp.broadcast_to(c.t, x.shape[:1]))
        noise = noise_of(i)
        x = c.keep * x + c.gain * x0 + c.std * noise
        return x, (x, noise)

    _, (xs, noise) = jax.lax.scan(step, x, (jnp.arange(len(c.t)), c))
    return jnp.concatenate([x[None], xs]), noise


def sampled(predict: Predict, c: Coefficients, batch: int) -> Callable:
    """`rollout` with the library's keyed noise, as one program of a key."""
    start = jnp.asarray(c.sigma)[0]

    def run(params, key):
        keys = jax.vmap(jax.random.split)(sample_keys(key, batch))
        x = start * standard_normal(keys[:, 0], 0, SHAPE, c.t.dtype)
        return rollout(predict, c, params, x, lambda i: standard_normal(keys[:, 1], 2 * i, SHAPE, c.t.dtype))

    return jax.jit(run)


def surrogate(predict: Predict, c: Coefficients, params, rows: Transitions) -> Float[Array, ""]:
    """The loss on transitions `[m]` (see the module)."""
    return jnp.mean(surrogates(predict, c, params, rows))


def surrogates(predict: Predict, c: Coefficients, params, rows: Transitions) -> Float[Array, " m"]:
    """What the loss is the mean of."""
    at = jax.tree.map(lambda v: v[rows.j][:, None, None, None], c)
    v = predict(params, rows.x, c.t[rows.j])
    a = -rows.x - at.alpha / at.sigma * v
    z, z_ref = at.scale * (a - rows.a_old), at.scale * (a - rows.a_ref)
    log_rho = jnp.sum(z * rows.noise - 0.5 * z**2, axis=(1, 2, 3))
    rho, kl = jnp.exp(log_rho), 0.5 * jnp.sum(z_ref**2, axis=(1, 2, 3))
    gain = jnp.minimum(rho * rows.policy_target, jnp.clip(rho, 1 - CLIP, 1 + CLIP) * rows.policy_target)
    return len(c.t) * (KL_WEIGHT * kl - gain)


def optimizer() -> optax.GradientTransformation:
    """Of both sides."""
    return optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adam(LEARNING_RATE))


def updated(predict: Predict, c: Coefficients) -> Callable:
    """`(state, rows, order, i) -> state`: one Adam step on minibatch `i`, as one program that overwrites its state."""
    opt = optimizer()

    @jax.jit(donate_argnums=0)
    def update(state, rows: Transitions, order: Int[Array, "k m"], i):
        params, opt_state = state
        some = jax.tree.map(lambda v: v[order[i]], rows)
        gradient = jax.grad(lambda p: surrogate(predict, c, p, some))(params)
        change, opt_state = opt.update(gradient, opt_state, params)
        return optax.apply_updates(params, change), opt_state

    return update


class Recorded(NamedTuple):
    """Paths of one iteration as the transitions that are trained on, and which transitions each minibatch has."""

    path: cd.sampler.Trajectory
    rows: Transitions
    order: Int[Array, "k m"]
    sample: Timed
    """The call that made the paths."""

    @property
    def key(self) -> Any:
        """What the paths were made from."""
        return self.sample.arguments[1]


def record(algorithm: cd.algorithms.Algorithm, behaviour, reference, key) -> Recorded:
    """What an iteration of `algorithm` makes before its updates, by a policy `behaviour`."""
    state = algorithm.init(behaviour)._replace(reference=jax.tree.map(jnp.copy, reference))
    found = timed(algorithm, key, state)
    return Recorded(found["sample"].results[0], found["prepare"].results[0], found["shuffle"].results, found["sample"])


class Task(NamedTuple):
    """One rollout and one update, with everything that both sides need; parameters of three policies that differ."""

    network: DigitsUNet
    objective: cd.Objective
    estimator: LikelihoodRatio
    critic: cd.Critic
    algorithm: cd.algorithms.Algorithm
    graphdef: nnx.GraphDef
    params: Any
    behaviour: Any
    reference: Any
    recorded: Recorded

    @property
    def process(self) -> cd.DiffusionProcess:
        """The diffusion process."""
        return self.objective.sampler.process  # pyright: ignore[reportReturnType]

    def minibatch(self, i: int) -> Transitions:
        """Transitions of minibatch `i`."""
        return self.algorithm.programs["select"].run(self.recorded.rows, self.recorded.order, i)


def moved(params, key, size: float):
    """Every tensor moved by `size` of its root mean square: another policy nearby."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten(
        [v + size * jnp.sqrt(jnp.mean(v**2)) * jax.random.normal(k, v.shape, v.dtype) for v, k in zip(leaves, keys)]
    )


def make_task(batch: int, steps: int, minibatches: int, channels: tuple[int, ...]) -> Task:
    """The U-Net with random weights; paths of a policy near the reference; the reward is the ink of their final states."""
    process = cd.DiffusionProcess(cd.VPCosine(tau_min=0.02))
    network = DigitsUNet(UNet(unet_config(channels), rngs=nnx.Rngs(0)))
    control, reference = cd.score_control(network, process)
    sampler = cd.Sampler(process, control, SHAPE, grid=process.grid(steps))
    objective = cd.Objective(sampler, cd.differentiable(ink, "ink"), KL_WEIGHT)
    estimator = LikelihoodRatio(float("inf"), CLIP, centre)
    critic = cd.Critic(NoValue(process.t0, process.t1))
    algorithm = cd.compose(objective, estimator, critic, cd.Training(optimizer(), batch, minibatches=minibatches))
    behaviour = moved(reference, jax.random.key(1), 3e-3)
    recorded = record(algorithm, behaviour, reference, jax.random.key(0))
    params = moved(behaviour, jax.random.key(2), 3e-3)
    graphdef = nnx.graphdef(network)
    return Task(network, objective, estimator, critic, algorithm, graphdef, params, behaviour, reference, recorded)


def our_update(task: Task) -> Callable[[int], Any]:
    """`call(i)`: the library's update on minibatch `i`, on a state of its own."""
    algorithm, recorded, state = task.algorithm, task.recorded, _state(task)
    call, held = running(algorithm.programs, algorithm.recipe.layout), [state.learned]

    def update(i: int) -> Any:
        held[0], metrics = one_update(call, algorithm.fixed, held[0], state, recorded.rows, recorded.order, i)
        return held[0], metrics

    return update


def our_pass(task: Task) -> Callable[[int], Any]:
    """`call(i)`: the library's updates on all minibatches of a pass as one program, whatever `i`, on a state of its own."""
    algorithm, recorded, state = task.algorithm, task.recorded, _state(task)
    scanned = algorithm.recipe._replace(training=algorithm.recipe.training._replace(scan_minibatches=True))
    call, held = running(algorithm.programs, scanned.layout), [state.learned]

    def updates(i: int) -> Any:
        held[0], metrics = one_pass(call, scanned, algorithm.fixed, held[0], state, recorded.rows, recorded.order)
        return held[0], metrics

    return updates


def _state(task: Task) -> State:
    """Of the policy that is updated, with the task's reference."""
    return task.algorithm.init(task.params)._replace(reference=task.reference)


def hand_update(task: Task, c: Coefficients) -> Callable[[int], Any]:
    """`call(i)`: the hand-written program for minibatch `i`, on a state of its own."""
    update, params = updated(predict(task.graphdef), c), jax.tree.map(jnp.copy, task.params)
    held = [(params, optimizer().init(params))]

    def call(i: int) -> Any:
        held[0] = update(held[0], task.recorded.rows, task.recorded.order, i)
        return held[0]

    return call


def our_loss(task: Task, rows: Transitions, options: dict[str, Any]) -> tuple[Any, Any]:
    """The library's loss and gradient on transitions `[m]`."""

    def loss(params):
        return task.estimator.loss(task.objective, task.critic, params, Models(task.reference, ()), rows)[0]

    return jax.jit(jax.value_and_grad(loss), compiler_options=options)(task.params)


def relative(got, exact) -> float:
    """`|got - exact| / |exact|` of trees of arrays, in float64."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact))
    ]
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs)))
