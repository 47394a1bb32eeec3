"""What the commands share: options from a dataclass, expected errors in one line, an exit code."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

C = TypeVar("C")


def execute(run: Callable[[C], Any], config: type[C], description: str | None, module: str, args: Sequence[str] | None) -> int:
    """Parse `args` (default: those of the process) as `config` and run it; 0, or 1 after an error that the settings explain."""
    parsed = tyro.cli(config, args=args, description=description, prog=f"python -m {module}")
    try:
        run(parsed)
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
