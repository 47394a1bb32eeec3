"""The iteration: its keys, its order in a run and in a plan, what it records, and critics that could not learn."""

import ast
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import ctrl_diffusion as cd
from ctrl_diffusion import exact
from ctrl_diffusion.algorithms import lower, timed
from ctrl_diffusion.algorithms.iteration import iterate
from ctrl_diffusion.algorithms.programs import running
from ctrl_diffusion.estimators import Pathwise

PROBLEM = exact.ring_linear()
PROCESS = PROBLEM.process
STEPS = 4
CHANGE, PARAMS = cd.score_control(cd.ResidualMLP((2,), (2,), width=8, depth=1, rngs=nnx.Rngs(0)), PROCESS, cd.EPSILON)
F, PHI = cd.value_network(cd.ResidualMLP((2,), (), width=8, depth=1, rngs=nnx.Rngs(1)))
VALUE = cd.StructuredValue(F, PROCESS.t0, PROCESS.t1)


def control(params, t, x, cond=None):
    return PROBLEM.reference_action(None, t, x) + CHANGE(params, t, x)


def objective(kl_weight=1.0):
    return cd.Objective(
        cd.Sampler(PROCESS, control, (2,), grid=PROCESS.grid(STEPS)), cd.differentiable(PROBLEM.reward), kl_weight
    )


def training(**settings):
    return cd.Training(optax.adam(1e-3), 8, **{"value": optax.adam(1e-3)} | settings)


def test_every_use_of_randomness_has_a_key_of_its_own():
    """`split(k, n)[i]` is `fold_in(k, i)` under JAX's default: what is split and folded from one key collides."""
    algorithm = cd.score_as_action(objective(), VALUE, training(epochs=6))
    keys = algorithm.programs["split_keys"].run(jax.random.key(0))
    data = [tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in jax.tree.leaves(keys)]
    assert len(data) == 4 + 6 and len(set(data)) == len(data)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 2, "minibatches": 4, "rollouts": 2},
        {"epochs": 2, "minibatches": 4, "scan_minibatches": True},
        {"policy": cd.trust.NaturalGradient(0.1)},
    ],
    ids=["minibatches", "scanned", "natural gradient"],
)
def test_a_plan_has_the_programs_and_calls_of_a_run(settings):
    """Counted while it runs; the plan is lowered from shapes alone."""
    algorithm = cd.score_as_action(objective(), VALUE, training()._replace(**settings))
    run, called = running(algorithm.programs, cd.Layout()), Counter()

    def counted(name, *arguments):
        called[name] += 1
        return run(name, *arguments)

    iterate(counted, algorithm.recipe, algorithm.fixed, jax.random.key(0), algorithm.init(PARAMS, PHI))
    del called["reward"]  # on the host
    assert {name: program.calls for name, program in lower(algorithm, PARAMS, PHI).items()} == dict(called)
    clocked = timed(algorithm, jax.random.key(0), algorithm.init(PARAMS, PHI))
    assert {name: len(found.seconds) for name, found in clocked.items() if name != "reward"} == dict(called)
    assert all(seconds > 0 for found in clocked.values() for seconds in found.seconds)


def test_a_timed_call_can_be_made_again():
    """Arguments are copies, whatever later programs took over: the first rollout and update can be repeated."""
    algorithm = cd.score_as_action(objective(), VALUE, training())
    found = timed(algorithm, jax.random.key(0), algorithm.init(PARAMS, PHI))
    for name in ("sample", "update"):
        again = algorithm.programs[name].run(*found[name].arguments)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(again))


def recorded(make, **settings):
    """Names of the state-sized fields of rows, and of paths, that are there."""
    algorithm = make(objective(), training(**settings))
    results = timed(algorithm, jax.random.key(0), algorithm.init(PARAMS, PHI))
    rows, paths = results["prepare"].results[0], results["remember"].results[1]
    there = [{name for name, v in fields._asdict().items() if v is not None} for fields in (rows, paths)]
    always = {"weight", "policy_target"}, {"t", "reward", "penalty", "log_ratio"}
    return there[0] - always[0] - {"j", "x", "cond"}, there[1] - always[1] - {"x", "cond"}


FIELDS = {
    "score_as_action": (
        lambda o, t: cd.score_as_action(o, VALUE, t),
        {"noise", "a_old", "a_ref", "x_hat", "r_hat", "value_target"},
        {"noise", "a_old", "a_ref", "x_hat", "r_hat"},
    ),
    "ddpo": (cd.ddpo, {"noise", "a_old", "a_ref"}, {"noise", "a_old", "a_ref"}),
    "sqdf": (lambda o, t: cd.sqdf(o, t, capacity=8), {"noise", "a_ref"}, {"noise", "a_ref", "r_hat"}),
    "draft": (cd.draft, {"noise", "a_ref"}, {"noise", "a_ref", "r_hat"}),
    "adjoint_matching": (cd.adjoint_matching, set(), {"a_ref"}),
    "rwr": (cd.rwr, {"noise", "a_old"}, {"noise", "a_old"}),
    "nabla_db": (
        lambda o, t: cd.nabla_db(o, VALUE, t),
        {"x_next", "a_ref", "x_hat", "r_hat", "value_target"},
        {"a_ref", "x_hat", "r_hat"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_only_what_is_read_is_recorded(name):
    """Transitions and paths hold what estimator, value and critic declare: `draft` needs no action of its own, the adjoint no noise."""
    make, rows, paths = FIELDS[name]
    assert recorded(make) == (rows, paths)


def test_without_a_kl_penalty_the_reference_is_not_read():
    algorithm = cd.ddpo(objective(0.0), training())
    found = timed(algorithm, jax.random.key(0), algorithm.init(PARAMS))
    assert found["prepare"].results[0].a_ref is None and not algorithm.recipe.objective.penalised


def test_a_critic_that_could_not_learn_is_refused():
    """Parameters without an optimiser, and an optimiser without parameters; a frozen critic says so."""
    with pytest.raises(ValueError, match=r"Training\(value=None\): the parameters of StructuredValue would never be learned"):
        cd.score_as_action(objective(), VALUE, training(value=None)).init(PARAMS, PHI)
    with pytest.raises(ValueError, match="value_params is empty"):
        cd.score_as_action(objective(), VALUE, training()).init(PARAMS)
    frozen = cd.vard(objective(), VALUE, training(), frozen=True)
    state, info = frozen.step(jax.random.key(0), frozen.init(PARAMS, PHI))
    for before, after in zip(jax.tree.leaves(PHI), jax.tree.leaves(state.value_params)):
        np.testing.assert_array_equal(after, before)
    assert "value_loss" not in info.metrics
    learned = cd.vard(objective(), VALUE, training())
    state, info = learned.step(jax.random.key(0), learned.init(PARAMS, PHI))
    assert "value_loss" in info.metrics
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(state.value_params), jax.tree.leaves(PHI)))


MICROBATCHED = {
    "value": lambda o, value, t: cd.compose(o, Pathwise(1), cd.Critic(value), t),
    "soft value": lambda o, value, t: cd.soft_vard(o, value, t),
    "policy inside the value's loss": lambda o, value, t: cd.nabla_db(o, value, t),
    "statistic of whole paths": lambda o, value, t: cd.log_variance(o, t),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MICROBATCHED)
def test_memory_of_an_update_is_that_of_a_microbatch(name):
    """By the compiler's account, with networks that take more than the rows: an eighth of the rows takes less than a third."""
    change, params = cd.score_control(cd.ResidualMLP((2,), (2,), width=256, depth=2, rngs=nnx.Rngs(0)), PROCESS, cd.EPSILON)
    fn, phi = cd.value_network(cd.ResidualMLP((2,), (), width=256, depth=2, rngs=nnx.Rngs(1)))
    sampler = cd.Sampler(PROCESS, change, (2,), grid=PROCESS.grid(STEPS))
    wide = cd.Objective(sampler, cd.differentiable(PROBLEM.reward), 1.0)
    value = cd.StructuredValue(fn, PROCESS.t0, PROCESS.t1)

    def memory(parts):
        settings = cd.Training(optax.sgd(1e-3), 2048, value=optax.sgd(1e-3), accumulation=parts)
        return (
            lower(MICROBATCHED[name](wide, value, settings), params, phi)["update"]
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    assert memory(8) < memory(1) / 3


def test_functions_and_files_are_short():
    """At most 80 lines a function, 100 in experiments, and 400 a file."""
    root = Path(__file__).parent.parent
    long = []
    for folder, most in (("ctrl_diffusion", 80), ("solvers", 80), ("experiments", 100)):
        for path in sorted((root / folder).rglob("*.py")):
            text = path.read_text()
            long += [(str(path.relative_to(root)), "file")] if len(text.splitlines()) > 400 else []
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= most:
                    long.append((str(path.relative_to(root)), node.name))
    assert not long
