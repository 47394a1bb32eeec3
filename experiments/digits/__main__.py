"""Pre-train a small diffusion model on real handwritten digits, fine-tune it for a reward, and report what happened.

    python -m experiments.digits --out runs/digits

The network is unconditional on purpose: a class-conditional model could satisfy the default reward without any fine-tuning.
The exact optimum is known by reweighting reference samples, so the run ends with an optimality gap, not only a reward.
Running the same command again resumes the run, or says that it is finished.
"""

from ..commandline import execute
from .config import Config


def run(config: Config) -> None:
    """Load what the command needs, and do it."""
    from . import experiment

    experiment.run(config)


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return execute(run, Config, __doc__, "experiments.digits", args)


if __name__ == "__main__":
    raise SystemExit(main())
