"""Every algorithm on problems whose optimum is known: how far each ends from it, and what it costs to get there.

    python -m experiments.exact --out runs/exact            every algorithm on the ring, two on each other problem
    python -m experiments.exact --quick --out runs/quick    four algorithms on the ring
    python -m experiments.exact --full --out runs/full      everything that applies, three seeds

Budgets are fixed beforehand and stated in evaluations. A run that was stopped continues with the same command.
"""

from ..commandline import execute
from .config import Config


def run(config: Config) -> None:
    """Load what the command needs, and do it."""
    from . import experiment

    experiment.run(config)


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return execute(run, Config, __doc__, "experiments.exact", args)


if __name__ == "__main__":
    raise SystemExit(main())
