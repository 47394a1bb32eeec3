"""One unit of the leaderboard: an algorithm, a problem, a seed. What is trained, for how long, and how the result is measured."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ctrl_diffusion as cd
from ctrl_diffusion import exact
from ctrl_diffusion.estimators.pathwise import Credit
from ctrl_diffusion.optimum import mean_and_error
from ctrl_diffusion.parallel import ONE_DEVICE, Layout, whole
from ctrl_diffusion.predictions import expand

from ..algorithm_registry import ALGORITHMS, AlgorithmChoice, AlgorithmSettings
from ..distances import Target, energy_distance, make_target
from .setup import DIFFUSION, Control, Setup, setup


def sqdf_discount_per_time(objective: cd.Objective) -> Any:
    """SQDF's discount, 0.9 for each of 50 equal steps, by the time that is left: weights `[n]` of the intervals."""
    process = objective.sampler.process
    return cd.estimators.discount_per_time((process.t1 - process.t0) / (50 * math.log(1 / 0.9)))(objective)


EXACT_CRITIC = AlgorithmChoice(
    lambda s: cd.compose(s.objective, cd.estimators.Pathwise(1), cd.Critic(s.value), s.training),
    "pathwise through one step of the exact value (not an algorithm: what the others approach)",
)
BOOTSTRAPPED = AlgorithmChoice(
    lambda s: cd.adjoint_matching(s.objective, s.training, horizon=0.05),
    "regression on the lean adjoint, bootstrapped from the policy with a horizon of 0.05",
    differentiates=True,
)
SQDF_PER_TIME = AlgorithmChoice(
    lambda s: cd.sqdf(s.objective, s.training, discount=sqdf_discount_per_time),
    "sqdf with the discount of its paper's 50 steps per unit of time, whatever the number of steps",
    differentiates=True,
)
ENTRIES: dict[str, AlgorithmChoice] = ALGORITHMS | {
    "sqdf_per_time": SQDF_PER_TIME,
    "adjoint_matching_bootstrapped": BOOTSTRAPPED,
    "exact_critic": EXACT_CRITIC,
}

X0_PREDICTION = "needs an x0 prediction: these problems have no data, hence no posterior mean"
NOT_FOR_CONTROL: dict[str, str] = {
    **{name: "has no KL penalty, which these problems are about" for name, choice in ENTRIES.items() if not choice.penalised},
    **dict.fromkeys(("sqdf", "sqdf_per_time", "refl", "vidd"), X0_PREDICTION),
    "flow_grpo": "divides returns by their spread, which changes the weight of the KL penalty",
    "rwr": "weights paths of the reference, of which almost none matter in these dimensions",
}


def why_not(algorithm: str, problem: str) -> str | None:
    """The reason why an algorithm does not apply to a problem, or `None` if it does."""
    return None if problem in DIFFUSION else NOT_FOR_CONTROL.get(algorithm)


class Budget(NamedTuple):
    """How a unit trains: iterations, paths an iteration, passes, updates a pass, Adam's peak learning rate (cosine decay to 2 %).

    `times`: how many times of every path are trained on, drawn anew for each; all if `None`. Neighbouring ones tell much the same.
    """

    iterations: int = 60
    batch: int = 512
    epochs: int = 1
    minibatches: int = 32
    learning_rate: float = 3e-3
    times: int | None = None


LIKELIHOOD_RATIO = Budget(epochs=2, minibatches=16, learning_rate=2e-3)
TRAJECTORY = Budget(200, batch=256, learning_rate=5e-3)
MATCHING = Budget(300, batch=256, minibatches=64, learning_rate=2e-3)
NO_PENALTY = Budget(10, minibatches=8, learning_rate=2e-3)
BUDGETS: dict[str, Budget] = {
    "score_as_action": LIKELIHOOD_RATIO,
    "score_as_action_published": LIKELIHOOD_RATIO,
    "score_as_action_trpo": LIKELIHOOD_RATIO._replace(iterations=45),
    "dpok": LIKELIHOOD_RATIO,
    "flow_grpo": LIKELIHOOD_RATIO,
    "log_variance": TRAJECTORY,
    "path_consistency": TRAJECTORY,
    "adjoint_matching": MATCHING,
    "adjoint_matching_bootstrapped": MATCHING,
    **dict.fromkeys(("ddpo", "draft", "draft_1", "alignprop", "refl"), NO_PENALTY),
}
DEFAULT = Budget()
RINGS = ("ring_linear", "ring_quadratic")
LINEAR = ("gaussian_quadratic", "quadratic_ou_easy", "quadratic_ou_hard", "linear_ou")
"""Problems whose optimal control is linear in the state."""
FOR_THIS_PROBLEM: dict[tuple[str, str], Budget] = {
    **{("adjoint_matching_bootstrapped", name): MATCHING._replace(iterations=150) for name in LINEAR},
    **{("adjoint_matching_bootstrapped", name): MATCHING._replace(batch=512) for name in RINGS},
    ("adjoint_matching_bootstrapped", "double_well"): MATCHING._replace(batch=512, learning_rate=1e-3, times=100),
    ("log_variance", "double_well"): TRAJECTORY._replace(iterations=400),
    **{("path_consistency", name): TRAJECTORY._replace(iterations=300) for name in RINGS},
}


def budget_for(algorithm: str, problem: str) -> Budget:
    """The budget of an algorithm, the same on all problems but for `FOR_THIS_PROBLEM`."""
    return FOR_THIS_PROBLEM.get((algorithm, problem), BUDGETS.get(algorithm, DEFAULT))


def mean_value_action(place: Setup) -> Control:
    """Where methods with the value `E^a[r | x]`, without KL-to-go, converge to: `a_ref + (a*_{lambda/2} - a_ref)/2`.

    That value solves the control problem's equation at half the temperature: the equation of `E^a r` under
    `a = a_ref + G^2/(lambda B) grad V` has the term `G^2 |grad V|^2 / lambda`, that of the soft value at temperature `mu` has
    `G^2 |grad V|^2 / (2 mu)`.
    """
    problem = place.problem
    assert isinstance(problem, exact.MixtureControl)
    half = exact.MixtureControl(problem.process, problem.data, problem.reward, problem.kl_weight / 2)

    def action(params, t, x, cond=None):
        return 0.5 * (half.optimal_action(None, t, x) + problem.reference_action(None, t, x))

    return action


def discounted_x0_action(place: Setup, discount: Credit) -> Control:
    """Where `sqdf` converges to: `a_ref + w std^2/(lambda psi) grad_x r(x_hat(t, x))`, up to one step's change of it.

    `x_hat` is the reference's posterior mean. The discount `w` and `std^2/psi` (in the limit `G^2/B`) are
    those of the training's chain, interpolated: the discount makes the last steps count, and there they are not small in the log-SNR.
    """
    problem, ts, step = place.problem, place.sampler.ts, place.sampler.transitions()
    process = problem.process
    objective = cd.Objective(place.sampler, cd.differentiable(problem.reward), problem.kl_weight)
    factors = step.std**2 / step.psi * discount(objective)

    def x0_reward(t, x):
        return problem.reward(process.terminal_mean(t, x, problem.reference_action(None, t, x)))

    def action(params, t, x, cond=None):
        pull = jax.grad(lambda x: jnp.sum(x0_reward(t, x)))(x)
        factor = jnp.interp(t, ts[:-1], factors) / problem.kl_weight
        return problem.reference_action(None, t, x) + expand(factor, x) * pull

    return action


FIXED_POINTS: dict[str, Callable[[Setup], Control]] = {
    "vard": mean_value_action,
    "score_as_action_published": mean_value_action,
    "sqdf": functools.partial(discounted_x0_action, discount=cd.estimators.discount_per_step(0.9)),
    "sqdf_per_time": functools.partial(discounted_x0_action, discount=sqdf_discount_per_time),
}


def structured_value(place: Setup) -> cd.values.AbstractValue:
    """A network with the reward of the posterior mean, to be learned."""
    return cd.StructuredValue(place.value, place.problem.process.t0, place.problem.process.t1)


def exact_value(place: Setup) -> cd.values.AbstractValue:
    """The problem's own."""
    return cd.GivenValue(place.problem.value, place.problem.process.t0, place.problem.process.t1)


VALUES: dict[str, Callable[[Setup], cd.values.AbstractValue]] = {"exact_critic": exact_value}


PATHS = 1024
"""That every unit is measured on."""


class Evaluation(NamedTuple):
    """What all algorithms on a problem are measured with."""

    place: Setup
    evaluator: exact.GapEvaluator
    optimal: Target
    chain_gap: Callable[[Any], float] | None


@functools.lru_cache(maxsize=1)
def evaluation(problem_name: str) -> Evaluation:
    """Made and compiled once for all units of a problem that a process solves."""
    place = setup(problem_name)
    evaluator = exact.GapEvaluator(place.problem, cd.sample_keys(jax.random.key(1_000_003), PATHS))
    optimal = make_target(
        np.asarray(place.problem.sample_optimal(evaluator.keys)), np.full(len(evaluator.keys), 1 / len(evaluator.keys))
    )
    return Evaluation(place, evaluator, optimal, chain_gap(place) if problem_name in RINGS else None)


class Prepared(NamedTuple):
    """What all seeds of an algorithm on a problem share: the compiled loop, and where it converges to if it is biased."""

    evaluation: Evaluation
    algorithm: cd.algorithms.Algorithm
    fixed_point: Control | None


@functools.lru_cache(maxsize=1)
def prepared(algorithm: str, problem_name: str, budget: Budget, layout: Layout = ONE_DEVICE) -> Prepared:
    """Made once for all seeds, so that they compile once."""
    choice, measured = ENTRIES[algorithm], evaluation(problem_name)
    place = measured.place
    updates = budget.iterations * budget.epochs * budget.minibatches
    rate = optax.cosine_decay_schedule(budget.learning_rate, updates, 0.02)
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate))
    times = None if budget.times is None else cd.algorithms.TimeSampling(budget.times)
    training = cd.Training(optimizer, budget.batch, budget.epochs, budget.minibatches, optax.adam(rate), times, layout=layout)
    kl_weight = place.problem.kl_weight if choice.penalised else 0.0
    objective = cd.Objective(place.sampler, cd.differentiable(place.problem.reward), kl_weight)
    value = VALUES.get(algorithm, structured_value)(place)
    made = choice.make(AlgorithmSettings(objective, value, training, kl_radius=0.01))
    fixed_point = FIXED_POINTS[algorithm](place) if algorithm in FIXED_POINTS and problem_name in RINGS else None
    return Prepared(measured, made, fixed_point)


def solve(algorithm: str, problem_name: str, seed: int, budget: Budget, layout: Layout = ONE_DEVICE) -> dict[str, Any]:
    """Train one unit on the devices of `layout`, and measure it on one."""
    begin = time.perf_counter()
    choice, table = ENTRIES[algorithm], prepared(algorithm, problem_name, budget, layout)
    params, value_params = table.evaluation.place.start(seed)
    state = table.algorithm.init(params, value_params if choice.learns_value else ())
    history = []
    for i in range(budget.iterations):
        state, info = table.algorithm.step(jax.random.fold_in(jax.random.key(seed), i), state)
        row = {name: float(info.metrics[name]) for name in ("reward", "path_kl", "objective")}
        if not np.isfinite(list(row.values())).all():
            raise FloatingPointError(
                f"{algorithm} on {problem_name}, seed {seed}: {row} in iteration {i}; lower its learning rate."
            )
        history.append(row)
    trained = time.perf_counter() - begin
    calls = table.algorithm.calls
    return {
        "algorithm": algorithm,
        "problem": problem_name,
        "seed": seed,
        **measure(table, choice.penalised, whole(state.params)),
        "network_evaluations": calls.network * budget.iterations,
        "network_gradient_evaluations": calls.gradient * budget.iterations,
        "reward_evaluations": calls.reward * budget.iterations,
        "wall_seconds": trained,
        "history": history,
    }


def measure(table: Prepared, penalised: bool, params: Any) -> dict[str, Any]:
    """Gap, control error, reward, path KL and distance to the optimal law, on four times the steps of the problem."""
    (place, evaluator, optimal, chain), fixed_point = table.evaluation, table.fixed_point
    problem, control = place.problem, place.sampler.control
    gap, paths = evaluator.gap(control, params), evaluator.integrals(control, params)
    reward, kl = mean_and_error(paths.returns), mean_and_error(paths.penalty / problem.kl_weight)
    error, distance = evaluator.control_l2_error(control, params), energy_distance(paths.final, optimal)
    own = None
    if fixed_point is not None:
        reached, untrained = (
            evaluator.integrals(c, p, fixed_point).penalty.mean()
            for c, p in ((control, params), (problem.reference_action, None))
        )
        own = float(reached / untrained)
    return {
        "relative_gap": gap.relative.mean if penalised else None,
        "relative_gap_se": gap.relative.se if penalised else None,
        "optimality_gap": gap.gap.mean if penalised else None,
        "optimality_gap_se": gap.gap.se if penalised else None,
        "own_relative_gap": own,
        "chain_relative_gap": chain(params) if chain and penalised else None,
        "control_l2_error": error.mean,
        "control_l2_error_se": error.se,
        "zero_control_l2_error": evaluator.zero_control_l2_error.mean,
        "reward": reward.mean,
        "reward_se": reward.se,
        "path_kl": kl.mean,
        "path_kl_se": kl.se,
        "distance": distance.mean,
        "distance_se": distance.se,
    }


def chain_gap(place: Setup, samples: int = 2**16, chunk: int = 2**13) -> Callable[[Any], float]:
    """Relative gap of parameters on the training's own chain: its KL, and its optimum from reference samples (0.4 % error on the ring)."""
    problem, sampler = place.problem, place.sampler
    keys, scales = cd.sample_keys(jax.random.key(1_000_004), samples), sampler.chain_scales()
    reference = cd.Sampler(sampler.process, problem.reference_action, sampler.shape, grid=sampler.grid)
    draw = jax.jit(lambda keys: problem.reward(reference.sample(None, keys)))
    base = np.concatenate([draw(keys[i : i + chunk]) for i in range(0, samples, chunk)])
    optimum = cd.reweighted_optimum(base, problem.kl_weight)

    @jax.jit
    def run(params):
        path = sampler.trajectory(params, keys[:chunk])
        a, a_ref = (cd.sampler.path_actions(control, params, path) for control in (sampler.control, problem.reference_action))
        return problem.reward(path.x[-1]), jnp.sum(cd.sampler.step_kl(scales, a, a_ref), axis=0)

    def gap(params):
        reward, kl = (np.asarray(v) for v in run(params))
        return cd.optimality_gap(optimum, mean_and_error(base), reward, kl, problem.kl_weight).relative.mean

    return gap
