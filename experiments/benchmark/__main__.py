"""Speed of this library against a hand-written `lax.scan` and against PyTorch with diffusers, on the same U-Net, interleaved in one run.

    python -m experiments.benchmark --out runs/benchmark

A rollout samples a batch of paths and records them; an update is one policy step of clipped likelihood ratios on a minibatch of
their rows. All sides have the same weights, grid and noise, and are held to the same samples, loss and gradient before anything is timed
(`experiments.benchmark.check`). PyTorch needs the extra `prepared`; what cannot be measured here is left out, and `metrics.json` says why.

The figures to read are the medians over rounds of the ratios of times within a round: on a shared machine single times mean little.
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
