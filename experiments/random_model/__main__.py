"""Write a Stable Diffusion with random weights, in the folder format of a real one: tiny, or of the size of Stable Diffusion 1.5.

    python -m experiments.random_model --size sd15 --out models/random-sd15

Its images mean nothing; otherwise it is used like a real model. `--model tiny-random` of other commands is the tiny one.
"""

from ..commandline import execute
from .config import Config


def run(config: Config) -> None:
    """Load what the command needs, and do it."""
    from .writer import write_random_model

    write_random_model(config)


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return execute(run, Config, __doc__, "experiments.random_model", args)


if __name__ == "__main__":
    raise SystemExit(main())
