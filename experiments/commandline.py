"""Shared by the commands: options from a dataclass, expected errors in one line, an exit code.

Nothing here loads JAX before the options are read, so that a usage error or `--help` does not wait for it.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

C = TypeVar("C")
INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """Options of a command that draws the report of a run again."""

    directory: tyro.conf.Positional[Path]
    """The --out folder of a finished run."""


def execute(
    run: Callable[[C], Any],
    config: type[C],
    description: str | None,
    module: str,
    args: Sequence[str] | None,
    defaults: Callable[[C], C | None] = lambda parsed: None,
) -> int:
    """Parse `args` (default: those of the process) as `config` and run it.

    Returns 0, or 1 after a `ValueError`, `FloatingPointError` or `OSError`, whose message is printed, or 130 after Ctrl-C. After a usage
    error tyro ends the process with exit code 2. `defaults(parsed)` may return other defaults for options that are not given, or None;
    `args` are then parsed again with these. `run` should import what it needs when it is called.
    """
    prog = f"python -m {module}"
    parsed = tyro.cli(config, args=args, description=description, prog=prog)
    _prepare_jax()
    if (default := defaults(parsed)) is not None:
        parsed = tyro.cli(config, args=args, description=description, prog=prog, default=default)
    try:
        run(parsed)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command again; it goes on from what it had written, if anything.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _prepare_jax() -> None:
    """Settings that JAX must have before it first uses a device."""
    from .tpu_library import quiet_without_tpu

    quiet_without_tpu()  # before anything else loads JAX

    from .compilation_cache import keep_compiled_programs
    from .xla_flags import faster_convolutions

    faster_convolutions()
    keep_compiled_programs()


def require_known(name: str, chosen: Iterable[str], known: Iterable[str]) -> None:
    """`ValueError` for the first name of a setting that is not known; for settings that do not come from a command line."""
    known = tuple(known)
    for value in chosen:
        if value not in known:
            raise ValueError(f"{name}: {value!r} is not one of {', '.join(known)}.")


def require_learning_rates(config: Any) -> None:
    """`ValueError` for the first learning rate of a configuration that no optimiser could use; None stands for a default."""
    for field in dataclasses.fields(config):
        rate = getattr(config, field.name)
        if field.name.endswith("learning_rate") and rate is not None and not 0 < rate <= 1:
            raise ValueError(
                f"{field.name}={rate} must be above 0 and at most 1: Adam moves a parameter by about that much at a time."
            )


def require_at_least(low: int, **numbers: int | None) -> None:
    """`ValueError` for the first setting below `low`; None stands for a default."""
    for name, number in numbers.items():
        if number is not None and number < low:
            raise ValueError(f"{name}={number} must be at least {low}.")
