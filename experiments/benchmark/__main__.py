"""Time this library, a hand-written `lax.scan` and PyTorch with diffusers on the same U-Net, in turn within one run.

    python -m experiments.benchmark --out runs/benchmark

A rollout samples a batch of paths and records them. An update is one policy step with clipped likelihood ratios on a minibatch of
their transitions. All sides have the same weights, grid and noise. Before anything is timed, their samples, losses and gradients are
compared, and a difference beyond rounding is an error (`experiments.benchmark.check`). PyTorch needs the extra `benchmark`. A side that
cannot be measured is left out, and `metrics.json` has the reason.

Read the medians over rounds of the ratios of times within a round: single times mean little on a shared machine.
"""

from ..commandline import execute
from .config import Config


def run(config: Config) -> None:
    """Load what the command needs, and do it."""
    from . import comparison

    print(comparison.summary(comparison.run(config)))


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return execute(run, Config, __doc__, "experiments.benchmark", args)


if __name__ == "__main__":
    raise SystemExit(main())
