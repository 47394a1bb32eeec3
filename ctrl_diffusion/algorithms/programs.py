"""The compiled programs of an iteration, and three ways to call them: to run, to lower (for inspection), or to time them."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.stages import Compiled, Lowered, Traced

from ..parallel import PARAMETERS, WHOLE, Layout
from ..process import Params
from ..rollout import AXES
from ..sampler import Trajectory
from . import assemble, collect, update
from .collect import Annotated
from .iteration import iterate
from .recipe import Recipe
from .training import Algorithm, State


class Program(NamedTuple):
    """A function of an iteration, compiled or run on the host.

    Attributes:
        run: `run(*arguments) -> results`.
        axes: for every array of the results, the axis that counts samples, `PARAMETERS` or `WHOLE`; a prefix of their tree.
        shapes: replaces `run` if the arguments are shapes; `None` for a compiled function, which JAX evaluates on shapes itself.
    """

    run: Callable[..., Any]
    axes: Any
    shapes: Callable[..., Any] | None = None


def make_programs(recipe: Recipe) -> dict[str, Program]:
    """The programs of an iteration by name."""

    def program(function: Callable[..., Any], axes: Any, *donated: int) -> Program:
        return Program(_compiled(function, recipe, recipe.layout, axes, donated), axes)

    def shared(function: Callable[..., Any], part: Any, axes: Any) -> Program:
        """A program that depends on `part` alone. Algorithms with equal parts share it, unless an array is in the part."""
        try:
            hash(part)
        except TypeError:  # arrays cannot be compared
            return Program(_compiled(function, part, recipe.layout, axes), axes)
        return Program(_compiled_once(function, part, recipe.layout, axes), axes)

    path = Trajectory(WHOLE, 1, 1)  # pyright: ignore[reportArgumentType]
    waiting = Annotated(AXES, 0, 0)  # pyright: ignore[reportArgumentType]
    on_host = (functools.partial(f, recipe) for f in (collect.reward, collect.reward_shapes))
    return {
        "split_keys": shared(collect.split_keys, recipe.training.epochs, WHOLE),
        "draw": program(collect.draw, 0),
        "sample": shared(collect.sample, recipe.sampling, (path, 0)),
        "annotate": program(collect.annotate, waiting),
        "reward": Program(next(on_host), (AXES, 0), shapes=next(on_host)),
        "join": program(collect.join, (AXES, 0)),
        "summarise": program(update.summarise, (WHOLE, 0, WHOLE)),
        "remember": program(collect.remember, (recipe.behaviour.axes, AXES), 1),
        "prepare": program(assemble.prepare, (0, WHOLE)),
        "shuffle": shared(assemble.shuffle, recipe.division, 1),
        "select": shared(assemble.select, recipe.division, 0),
        "update": program(update.update, (PARAMETERS, WHOLE), 0),
        "sweep": program(update.sweep, (PARAMETERS, WHOLE), 0),
        "finish": program(update.finish, (PARAMETERS, WHOLE), 0),
    }


def _compiled(function: Callable[..., Any], part: Any, layout: Layout, axes: Any, donated: tuple[int, ...] = ()) -> Callable:
    """`function(part, ...)`, compiled; its results are divided by `axes`."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        return layout.constrain(function(part, *arguments), functools.partial(layout.shardings, axes))

    return jax.jit(run, donate_argnums=donated)


_compiled_once = functools.lru_cache(maxsize=64)(_compiled)


def state_axes(recipe: Recipe) -> State:
    """How the arrays of a `State` are divided over devices."""
    return State(PARAMETERS, PARAMETERS, recipe.behaviour.axes, WHOLE)  # pyright: ignore[reportArgumentType]


def running(programs: dict[str, Program], layout: Layout) -> Callable[..., Any]:
    """A `call` that runs the programs."""
    return lambda name, *arguments: layout.paced(programs[name].run(*arguments))


class LoweredProgram(NamedTuple):
    """A program traced for its arguments, and the number of times that an iteration calls it. It is lowered when that is asked for."""

    traced: Traced
    calls: int

    @property
    def lowered(self) -> Lowered:
        """The compiler's input."""
        return self.traced.lower()

    def as_text(self) -> str:
        """The text of the lowered program."""
        return self.lowered.as_text()

    def compile(self, options: Any = None) -> Compiled:
        """The compiled program."""
        return self.lowered.compile(options)


def lower(algorithm: Algorithm, params: Params, value_params: Params = ()) -> dict[str, LoweredProgram]:
    """Trace every compiled program that an iteration calls, for the arguments that it has in `algorithm.step`, to be lowered.

    The devices of `Training.layout` may be a description only (a TPU topology). The parameters are those of `algorithm.init`; they may be
    shapes.
    """
    recipe, layout = algorithm.recipe, algorithm.recipe.layout
    state = layout.described(state_axes(recipe), jax.eval_shape(algorithm.init, params, value_params))
    key = layout.described(WHOLE, jax.eval_shape(lambda: jax.random.key(0)))
    fixed = layout.described(PARAMETERS, algorithm.fixed)
    traced: dict[str, Traced] = {}
    results: dict[str, Any] = {}
    calls: dict[str, int] = {}

    def call(name: str, *arguments: Any) -> Any:
        program = algorithm.programs[name]
        calls[name] = calls.get(name, 0) + 1
        if name not in results:
            if program.shapes is None:
                traced[name] = program.run.trace(*arguments)  # pyright: ignore[reportFunctionMemberAccess]
            results[name] = layout.described(program.axes, jax.eval_shape(program.shapes or program.run, *arguments))
        return results[name]

    iterate(call, recipe, fixed, key, state)
    return {name: LoweredProgram(found, calls[name]) for name, found in traced.items()}


class Timed(NamedTuple):
    """Arguments and results of the first call of a program, and the seconds that every call took until its results were computed."""

    arguments: tuple[Any, ...]
    results: Any
    seconds: list[float]


def timed(algorithm: Algorithm, key: Any, state: State) -> dict[str, Timed]:
    """Time every program that an iteration calls. Run an iteration before, so that compilation is not timed.

    Recorded arguments are copies, because later programs reuse the memory of some of them.
    """
    found: dict[str, Timed] = {}

    def call(name: str, *arguments: Any) -> Any:
        program = algorithm.programs[name]
        kept = () if name in found else _copied(arguments)
        begin = time.perf_counter()
        results = jax.block_until_ready(program.run(*arguments))
        seconds = time.perf_counter() - begin
        if name not in found:
            found[name] = Timed(kept, results, [])
        found[name].seconds.append(seconds)
        return results

    iterate(call, algorithm.recipe, algorithm.fixed, key, state)
    return found


def _copied(tree: Any) -> Any:
    return jax.tree.map(lambda v: jnp.copy(v) if isinstance(v, jax.Array) else v, tree)
