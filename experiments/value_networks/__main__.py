"""Compare forms, inputs, targets and losses of value networks by their error to the exact value, one factor at a time.

    python -m experiments.value_networks --out runs/value_networks            a ring of Gaussians and the digits
    python -m experiments.value_networks --quick --out runs/quick             five variants on the ring

A unit is one variant on one problem, all seeds at once. A run that was stopped continues with the same command.
"""

from ..commandline import execute
from .config import Config


def run(config: Config) -> None:
    """Load what the command needs, and do it."""
    from . import experiment

    experiment.run(config)


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return execute(run, Config, __doc__, "experiments.value_networks", args)


if __name__ == "__main__":
    raise SystemExit(main())
