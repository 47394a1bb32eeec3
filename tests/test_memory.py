"""What the compiler says of the programs of an iteration: how much memory they need, what they overwrite, how often they are made."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ctrl_diffusion as cd
from ctrl_diffusion.estimators import GradientBalance, LikelihoodRatio, Matching, Pathwise, WeightedLikelihood
from ctrl_diffusion.runs import RunDirectory, finetune
from ctrl_diffusion.values import NoValue, X0RewardValue

PROCESS = cd.DiffusionProcess(cd.VPCosine(tau_min=0.02))
SHAPE = (4, 4, 1)
CONTROL, PARAMS = cd.score_control(cd.ResidualMLP(SHAPE, SHAPE, width=32, depth=1, rngs=nnx.Rngs(0)), PROCESS)
F, PHI = cd.value_network(cd.ResidualMLP(SHAPE, (), width=8, depth=1, rngs=nnx.Rngs(1)))
STEPS = (25, 100, 400)
LEARNED = cd.Critic(cd.StructuredValue(F, PROCESS.t0, PROCESS.t1))
RETURNS = cd.Critic(NoValue(PROCESS.t0, PROCESS.t1))
X0_REWARD = cd.Critic(X0RewardValue(PROCESS.t0, PROCESS.t1))
ONE_STEP = {
    "likelihood ratio": (LikelihoodRatio(clip=0.2), LEARNED),
    "weighted likelihood": (WeightedLikelihood(), RETURNS),
    "pathwise": (Pathwise(1), X0_REWARD),
    "matching": (Matching(), RETURNS),
    "detailed balance": (GradientBalance(), LEARNED),
}


def mean(x):
    return jnp.mean(x, axis=(1, 2, 3))


def objective(steps):
    return cd.Objective(cd.Sampler(PROCESS, CONTROL, SHAPE, grid=PROCESS.grid(steps)), cd.differentiable(mean), kl_weight=1.0)


def composed(name, steps, batch, **settings):
    estimator, critic = ONE_STEP[name]
    return cd.compose(
        objective(steps), estimator, critic, cd.Training(optax.adam(1e-3), batch, value=optax.adam(1e-3), **settings)
    )


def compiled(algorithm):
    return {name: v.compile() for name, v in cd.algorithms.lower(algorithm, PARAMS, PHI).items()}


def update_memory(algorithm) -> int:
    """Bytes of temporary memory of one update."""
    return cd.algorithms.lower(algorithm, PARAMS, PHI)["update"].compile().memory_analysis().temp_size_in_bytes


def through_all_steps(steps, small_memory):
    """The gradient through the whole chain, at a batch that is large beside the network."""
    training = cd.Training(optax.adam(1e-3), batch=256)
    return update_memory(cd.draft(objective(steps), training, small_memory=small_memory))


@pytest.mark.slow
def test_memory_of_the_recomputed_gradient_grows_no_faster_than_the_root():
    first, *later = (through_all_steps(n, True) for n in STEPS)
    for n, size in zip(STEPS[1:], later):
        assert size <= np.sqrt(n / STEPS[0]) * first, (n, size, first)
    fast = [through_all_steps(n, False) for n in STEPS[:2]]
    assert fast[1] > 3 * fast[0] > 9 * first  # what is saved: the fast gradient stores every step


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_STEP)
def test_memory_of_an_update_does_not_depend_on_the_length_of_paths(name):
    """Updates of 16 transitions each; the grid's constants may take a few numbers per step."""
    sizes = [update_memory(composed(name, n, batch=16, minibatches=n)) for n in (STEPS[0], STEPS[-1])]
    assert max(sizes) - min(sizes) <= 8 * 4 * max(STEPS), sizes


@pytest.mark.slow
def test_the_adjoint_is_computed_for_a_part_of_the_paths_at_a_time():
    """Memory besides results, of a network that takes more than the paths: with a quarter of them less than half."""
    control, params = cd.score_control(cd.ResidualMLP(SHAPE, SHAPE, width=512, depth=1, rngs=nnx.Rngs(0)), PROCESS)
    sampler = cd.Sampler(PROCESS, control, SHAPE, grid=PROCESS.grid(4))

    def memory(parts):
        training = cd.Training(optax.adam(1e-3), batch=512, rollouts=parts)
        chosen = cd.Objective(sampler, cd.differentiable(mean), kl_weight=1.0)
        lowered = cd.algorithms.lower(cd.adjoint_matching(chosen, training), params)
        return lowered["prepare"].compile().memory_analysis().temp_size_in_bytes

    assert memory(4) < memory(1) / 2


@pytest.mark.slow
def test_a_natural_gradient_takes_a_part_of_the_rows_at_a_time():
    """Gradient, Fisher products and line search: memory besides results with an eighth of the rows is less than half."""
    control, params = cd.score_control(cd.ResidualMLP(SHAPE, SHAPE, width=512, depth=1, rngs=nnx.Rngs(0)), PROCESS)
    sampler = cd.Sampler(PROCESS, control, SHAPE, grid=PROCESS.grid(4))

    def memory(parts):
        training = cd.Training(cd.trust.NaturalGradient(0.1), batch=2048, accumulation=parts)
        algorithm = cd.ddpo(cd.Objective(sampler, cd.differentiable(mean), kl_weight=0.0), training)
        lowered = cd.algorithms.lower(algorithm, params)
        return lowered["finish"].compile().memory_analysis().temp_size_in_bytes

    assert memory(8) < memory(1) / 2


def size(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_parameters_and_memories_are_overwritten():
    """The compiled programs write their results where they found what these replace."""
    estimator, critic = ONE_STEP["pathwise"]
    training = cd.Training(optax.adam(1e-3), batch=8, average=0.99)
    algorithm = cd.compose(objective(4), estimator, critic, training, behaviour=cd.replay.ReplayBuffer(16))
    state, programs = algorithm.init(PARAMS, PHI), compiled(algorithm)
    kept = {"update": size(state.learned), "remember": size(state.buffer) - size(state.buffer[0].t)}
    for name, replaced in kept.items():  # the times of a buffer are those of the fresh paths
        assert "input_output_alias" in programs[name].as_text().splitlines()[0]
        assert programs[name].memory_analysis().alias_size_in_bytes == replaced, name
    new, _ = algorithm.step(jax.random.key(0), state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.learned, state.buffer[0].x)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


@pytest.fixture
def compilations():
    """How often each function has been compiled since the test began, by its name."""
    counts: collections.Counter[str] = collections.Counter()

    def listener(event, duration, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            counts[str(about.get("fun_name"))] += 1

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield counts
    jax.monitoring.unregister_event_duration_listener(listener)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, scanned", [("likelihood ratio", False), ("detailed balance", False), ("likelihood ratio", True)]
)
def test_every_program_is_compiled_once(name, scanned, tmp_path, compilations):
    """In the loop that trains, with evaluations in between; with one loss and with two; algorithms that sample alike share programs."""
    jax.clear_caches()
    algorithm = composed(name, 4, batch=8, epochs=2, minibatches=2, rollouts=2, scan_minibatches=scanned)
    run, seen = RunDirectory(tmp_path, {}), []

    def evaluate(state):
        seen.append(compilations.total())
        return {}

    finetune(
        run, algorithm, algorithm.init(PARAMS, PHI), jax.random.key(0), iterations=4, evaluate=evaluate,
        evaluate_every=1, checkpoint_every=2, kl_budget=None,
    )  # fmt: skip
    sizes = {program: v.run._cache_size() for program, v in algorithm.programs.items() if v.shapes is None}
    unused = {"finish"} | ({"select", "update"} if scanned else {"sweep"})
    assert sizes == {program: int(program not in unused) for program in sizes}
    ours = {name: count for name, count in compilations.items() if name.removeprefix("jit(")[:-1] in sizes}
    assert len(ours) == len(sizes) - len(unused) and set(ours.values()) == {1}
    assert seen[1:] == seen[1:2] * 3, seen  # nor anything else
