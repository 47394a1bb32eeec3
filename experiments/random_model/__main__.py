"""Text-to-image models with random weights, in the real folder format: in miniature, which is what `--model tiny-random` stands for,
and in the size of Stable Diffusion 1.5.

    python -m experiments.random_model --size sd15 --out models/random-sd15

Their images mean nothing; everything else is as with a real model, through the same code.
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
