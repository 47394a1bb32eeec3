"""What tests ask of the compiler: machine code as users have it, or, for tests of what programs do, code that is not optimised.

On a CPU a program of a test takes longer to compile than to run, and most of that goes into optimising its machine code. What a
program computes, its memory and its collectives are decided before. But sums come out with other roundings, so that tests of
numbers see the code that users have.
"""

import functools

import jax
import jax.numpy as jnp
from jax._src import compiler  # there is no public name for options of all programs of a process

UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


@functools.cache
def unoptimised() -> dict[str, int | bool]:
    """Those of `UNOPTIMISED` that this release knows, none on other devices than CPUs."""
    if jax.default_backend() != "cpu":
        return {}
    program = jax.jit(lambda x: x + 1).lower(jnp.zeros(3))

    def known(name: str) -> bool:
        try:
            program.compile({name: UNOPTIMISED[name]})
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: value for name, value in UNOPTIMISED.items() if known(name)}


def flags() -> str:
    """The same for the environment of other processes, as `XLA_FLAGS`."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in unoptimised().items())


class Compiler:
    """Whose programs are compiled how; a change makes all programs anew."""

    def __init__(self):
        self.optimises, self._options = True, compiler.get_compile_options
        compiler.get_compile_options = self._chosen

    def optimise(self, wanted: bool) -> None:
        """From now on as users have it, or not."""
        if wanted != self.optimises:
            options = unoptimised()  # which compiles, as the compiler was
            self.optimises = wanted or not options
            jax.clear_caches()

    def _chosen(self, *args, **kwargs):
        if not self.optimises:
            kwargs["env_options_overrides"] = unoptimised() | (kwargs.get("env_options_overrides") or {})
        return self._options(*args, **kwargs)
