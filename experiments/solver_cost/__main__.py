"""What solvers cost beyond the network: each against a hand-written `lax.scan` with as many network calls and noise draws.

    python -m experiments.solver_cost --out runs/solver_cost

Every solver is measured with the network of `experiments.digits` and with a trivial one; gradients, with the first network only, are
compared with those of a rematerialised scan. The scan's step has the stages, the past controls, the correction and the noise of the
method, with coefficients computed beforehand. The two sides of a pair run in turn; a ratio is the median over pairs. A ratio above its
target is followed by another one in brackets: to a scan over the solver's own step, which leaves only what the library's loop adds.
`--out` gets `metrics.json` and `table.md`; a repeated run continues where the last one stopped.
"""

from ..commandline import execute
from .config import Config


def run(config: Config) -> None:
    """Load what the command needs, and do it."""
    from . import cost

    print(cost.table(cost.run(config)))


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return execute(run, Config, __doc__, "experiments.solver_cost", args)


if __name__ == "__main__":
    raise SystemExit(main())
