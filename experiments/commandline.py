"""What the commands share: options from a dataclass, expected errors in one line, an exit code."""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import tyro

from .compilation_cache import keep_compiled_programs
from .xla_flags import faster_convolutions

C = TypeVar("C")


def execute(
    run: Callable[[C], Any],
    config: type[C],
    description: str | None,
    module: str,
    args: Sequence[str] | None,
    default: C | None = None,
) -> int:
    """Parse `args` (default: those of the process) as `config` and run it; 0, or 1 after an error that the settings explain.

    `default` has the values of options that are not given (default: those of the class).
    """
    options: Any = {} if default is None else {"default": default}
    parsed = tyro.cli(config, args=args, description=description, prog=f"python -m {module}", **options)
    faster_convolutions()
    keep_compiled_programs()
    try:
        run(parsed)
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def require_known(name: str, chosen: Iterable[str], known: Iterable[str]) -> None:
    """`ValueError` for the first name of a setting that is not known."""
    known = tuple(known)
    for value in chosen:
        if value not in known:
            raise ValueError(f"{name}: {value!r} is not one of {', '.join(known)}.")


def require_at_least(low: int, **numbers: int | None) -> None:
    """`ValueError` for the first setting below `low`; None stands for a default."""
    for name, number in numbers.items():
        if number is not None and number < low:
            raise ValueError(f"{name}={number} must be at least {low}.")
