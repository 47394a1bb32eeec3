"""Fine-tune with one solver, number of steps and noise level, and evaluate with all others: does what was learned hold?

    python -m experiments.discretization --out runs/discretization

Score as Action and DDPO, with and without a KL penalty, get the same paths, updates, network and optimiser. Every policy is then
sampled with every solver, number of steps and noise level. Running the same command again resumes the run.
"""

from ..commandline import execute
from .config import Config


def run(config: Config) -> None:
    """Load what the command needs, and do it."""
    from . import experiment

    experiment.run(config)


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return execute(run, Config, __doc__, "experiments.discretization", args)


if __name__ == "__main__":
    raise SystemExit(main())
