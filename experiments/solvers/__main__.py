"""Error against network evaluations for every solver, on exact scores, and what each costs beyond the network.

    python -m experiments.solvers --out runs/solvers

ODE, adaptive and implicit solvers: root mean square error of the endpoint of the probability flow of a three-mode mixture and of
Gaussian data, against a fine eighth-order solution and the closed form. SDE solvers: error of the mean plus that of the
variance of the endpoint on Gaussian data, without Monte Carlo (the chain is affine). Adaptive steps on a Brownian tree: root mean
square distance to a fine solution on the same path.

The folder gets `metrics.json`, `table.md` and `solvers.png`. A repeated run continues where the last one stopped. `ratio_to_scan` is
measured as in `experiments.solver_cost`, with fewer repeats.
"""

from ..commandline import execute
from .config import Config


def run(config: Config) -> None:
    """Load what the command needs, and do it."""
    from . import experiment

    print(experiment.table(experiment.run(config)))


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return execute(run, Config, __doc__, "experiments.solvers", args)


if __name__ == "__main__":
    raise SystemExit(main())
