"""One unit of the leaderboard: an algorithm, a problem, a seed. What is trained, for how long, and how the result is measured."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ctrl_diffusion as cd
from ctrl_diffusion import exact
from ctrl_diffusion.exact import AbstractControlProblem
from ctrl_diffusion.optimum import mean_and_error
from ctrl_diffusion.predictions import expand

from .discretization_cells import energy_distance, make_target
from .presets import ALGORITHMS, Choice, Settings

SCHEDULE = cd.VPLinear(tau_min=1e-3)
PROBLEMS: dict[str, Callable[[], AbstractControlProblem]] = {
    "ring_linear": lambda: exact.MixtureControl(
        cd.DiffusionProcess(SCHEDULE), exact.ring(), exact.LinearReward((1.0, 0.0)), 1.0
    ),
    "ring_quadratic": lambda: exact.MixtureControl(
        cd.DiffusionProcess(SCHEDULE), exact.ring(), exact.QuadraticReward(0.5, (2.0, 0.0)), 1.0
    ),
    "gaussian_quadratic": lambda: exact.GaussianControl(
        exact.GaussianQuadratic(
            cd.DiffusionProcess(cd.VPLinear(4.0, 4.0, 2.0, tau_min=2e-3, tau_max=2.0)),
            1.0,
            0.5,
            1.0,
            -0.5,
            0.7,
            noise_start=True,
        )
    ),
    "quadratic_ou_easy": exact.quadratic_ou_easy,
    "quadratic_ou_hard": exact.quadratic_ou_hard,
    "linear_ou": exact.linear_ou,
    "double_well": exact.double_well,
}
DIFFUSION = ("ring_linear", "ring_quadratic", "gaussian_quadratic")

ORACLE = Choice(
    lambda s: _oracle(s), "pathwise through one step of the exact value (not an algorithm: what the others approach)"
)


def _oracle(s: Settings) -> cd.Algorithm:
    return cd.compose(s.objective, cd.estimators.Pathwise(1), cd.Critic(s.value), s.training)


ENTRIES: dict[str, Choice] = ALGORITHMS | {"exact_critic": ORACLE}


def why_not(algorithm: str, problem: str) -> str | None:
    """The reason why an algorithm does not apply to a problem, or `None` if it does."""
    if problem in DIFFUSION:
        return None
    if algorithm in ("sqdf", "refl", "vidd"):
        return "builds on a guess of the final state, which without data is the present state (no posterior mean)"
    if not ENTRIES[algorithm].priced:
        return "has no price: these problems are about the price"
    if algorithm == "flow_grpo":
        return "divides returns by their spread, which changes the price"
    if algorithm == "rwr":
        return "weights paths of the reference, of which almost none matter in these dimensions"
    return None


class Budget(NamedTuple):
    """How a unit trains: iterations, paths an iteration, passes, updates a pass, Adam's peak learning rate (cosine decay to 2 %)."""

    iterations: int
    batch: int = 512
    epochs: int = 1
    minibatches: int = 8
    learning_rate: float = 2e-3


BUDGETS: dict[str, Budget] = {
    "score_as_action": Budget(60, epochs=2),
    "score_as_action_published": Budget(60, epochs=2),
    "score_as_action_trpo": Budget(60, epochs=2),
    "dpok": Budget(80, epochs=2),
    "ddpo": Budget(10),
    "draft": Budget(10),
    "draft_1": Budget(10),
    "alignprop": Budget(10),
    "refl": Budget(10),
}
DEFAULT = Budget(150)


class Lab(NamedTuple):
    """A problem with a sampler, a control and the parameters it starts from."""

    problem: AbstractControlProblem
    sampler: cd.Sampler
    params: Any
    value: Callable[..., Any]
    value_params: Any


def lab(problem_name: str, seed: int, width: int = 64) -> Lab:
    """The reference action plus `G^2/B` times a network of `(t, x)` that starts at zero; a value network beside it.

    Grids of diffusion problems shrink towards the data, `t1 - t = (t1 - t0)(1 - i/n)^2`; others are uniform.
    """
    problem = PROBLEMS[problem_name]()
    process, shape = problem.process, problem.shape
    rngs = nnx.Rngs(seed)
    network, params = cd.value_network(cd.ResidualMLP(shape, shape, width=width, depth=2, rngs=rngs))
    value, value_params = cd.value_network(cd.ResidualMLP(shape, (), width=width, depth=2, rngs=rngs))

    def control(params, t, x, cond=None):
        _, b, g = process.coefficients(t)
        return problem.reference_action(None, t, x) + expand(g**2 / b, x) * network(params, t, x)

    grid = problem.grid()
    if problem_name in DIFFUSION:
        grid = process.t1 - (process.t1 - process.t0) * np.linspace(1, 0, problem.steps + 1) ** 2
        grid[0] = process.t0
    return Lab(problem, cd.Sampler(process, control, shape, grid=grid), params, value, value_params)


def own_fixed_point(algorithm: str, problem: AbstractControlProblem) -> Callable[..., Any] | None:
    """The action that a biased method converges to, where it is known in closed form.

    *Mean values* (`vard`, `score_as_action_published`): `V = E^a[r | x]` without KL-to-go solves the control problem's equation at
    half the temperature, so the fixed point is `a_ref + (a*_{lambda/2} - a_ref)/2`. (The equation of `E^a r` under
    `a = a_ref + G^2/(lambda B) grad V` has the term `G^2 |grad V|^2 / lambda`, that of the soft value at temperature `mu` has
    `G^2 |grad V|^2 / (2 mu)`.)
    """
    if algorithm not in ("vard", "score_as_action_published") or not isinstance(problem, exact.MixtureControl):
        return None
    half = exact.MixtureControl(problem.process, problem.data, problem.reward, problem.kl_weight / 2)

    def action(params, t, x, cond=None):
        return 0.5 * (half.optimal_action(None, t, x) + problem.reference_action(None, t, x))

    return action


def solve(algorithm: str, problem_name: str, seed: int, budget: Budget) -> dict[str, Any]:
    """Train and measure one unit."""
    begin = time.perf_counter()
    choice, place = ENTRIES[algorithm], lab(problem_name, seed)
    problem, sampler = place.problem, place.sampler
    process = problem.process
    updates = budget.iterations * budget.epochs * budget.minibatches
    rate = optax.cosine_decay_schedule(budget.learning_rate, updates, 0.02)
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))
    training = cd.Training(optimizer, budget.batch, budget.epochs, budget.minibatches, optax.adam(rate))
    objective = cd.Objective(sampler, cd.differentiable(problem.reward), problem.kl_weight if choice.priced else 0.0)
    form = cd.PlainValue if algorithm == "vard" else cd.StructuredValue
    value = form(place.value, process.t0, process.t1)
    if choice is ORACLE:
        value = cd.GivenValue(problem.value, process.t0, process.t1)
    made = choice.make(Settings(objective, value, training, kl_radius=0.1))
    state = made.init(place.params, place.value_params if choice.learns_value else ())
    history = []
    for i in range(budget.iterations):
        state, info = made.step(jax.random.fold_in(jax.random.key(seed), i), state)
        row = {name: float(info.metrics[name]) for name in ("reward", "path_kl", "objective")}
        if not np.isfinite(list(row.values())).all():
            raise FloatingPointError(
                f"{algorithm} on {problem_name}, seed {seed}: {row} in iteration {i}; lower its learning rate."
            )
        history.append(row)
    trained = time.perf_counter() - begin
    result = {"algorithm": algorithm, "problem": problem_name, "seed": seed}
    result |= measure(algorithm, place, state.params, cd.sample_keys(jax.random.key(1_000_003), 2048))
    calls = made.calls
    result |= {
        "network_evaluations": calls.network * budget.iterations,
        "network_gradient_evaluations": calls.gradient * budget.iterations,
        "reward_evaluations": calls.reward * budget.iterations,
        "wall_seconds": trained,
        "history": history,
    }
    return result


def measure(algorithm: str, place: Lab, params: Any, keys: jax.Array) -> dict[str, Any]:
    """Gap, control error, reward, path KL and distance to the optimal law, all on grids four times finer than the training's."""
    problem, control = place.problem, place.sampler.control
    priced = ENTRIES[algorithm].priced
    gap = exact.fine_gap(problem, control, params, keys)
    paths = exact.path_integrals(problem, control, params, keys)
    reward, kl = mean_and_error(paths.returns), mean_and_error(paths.price / problem.kl_weight)
    error = exact.control_l2_error(problem, control, params, keys)
    zero = exact.control_l2_error(problem, problem.reference_action, None, keys)
    optimal = make_target(np.asarray(problem.sample_optimal(keys)), np.full(len(keys), 1 / len(keys)))
    distance = energy_distance(paths.final, optimal)
    fixed, own = own_fixed_point(algorithm, problem), None
    if fixed is not None:
        reached = exact.squared_distance(problem, control, fixed, params, keys).mean
        own = reached / exact.squared_distance(problem, problem.reference_action, fixed, None, keys).mean
    return {
        "relative_gap": gap.relative.mean if priced else None,
        "relative_gap_se": gap.relative.se if priced else None,
        "optimality_gap": gap.gap.mean if priced else None,
        "optimality_gap_se": gap.gap.se if priced else None,
        "own_relative_gap": own,
        "chain_relative_gap": chain_gap(place, params) if priced and isinstance(problem, exact.MixtureControl) else None,
        "control_l2_error": error.mean,
        "control_l2_error_se": error.se,
        "zero_control_l2_error": zero.mean,
        "reward": reward.mean,
        "reward_se": reward.se,
        "path_kl": kl.mean,
        "path_kl_se": kl.se,
        "distance": distance.mean,
        "distance_se": distance.se,
    }


def chain_gap(place: Lab, params: Any, samples: int = 8192) -> float:
    """Relative gap on the training's own chain: its own KL, and its own optimum from reference samples of the same grid."""
    problem, sampler = place.problem, place.sampler
    keys, scales = cd.sample_keys(jax.random.key(1_000_004), samples), sampler.chain_scales()

    @jax.jit
    def run(params, reference):
        path = sampler.trajectory(params, keys)
        a, a_ref = (cd.path_actions(sampler.control, p, path) for p in (params, reference))
        return problem.reward(path.x[-1]), jnp.sum(cd.step_kl(scales, a, a_ref), axis=0)

    base, _ = run(place.params, place.params)
    reward, kl = run(params, place.params)
    optimum = cd.reweighted_optimum(base, problem.kl_weight)
    return cd.optimality_gap(optimum, mean_and_error(base), np.asarray(reward), np.asarray(kl), problem.kl_weight).relative.mean
