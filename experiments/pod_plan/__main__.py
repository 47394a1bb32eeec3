"""Plan a run on a slice of a TPU pod or on GPUs, from its real programs, compiled ahead of time; no TPU or GPU is needed.

    python -m experiments.pod_plan --topology v5e:16x16 --batch 32768 --stratified --compiles 3 --out runs/pod_plan

Compiles every program of an iteration for the slice. Reads memory, matrix products, memory traffic and collectives of one chip off
the compiled programs, with loops counted in full. Looks for the largest global batch that fits, and does the same for slices of 4 to 256
chips with the same batch per chip. Times are those of a roofline: what the chip and its links allow at best, collectives after
everything else. They do not include rewards, which are computed between the programs. Without `--stratified` the transitions of each
minibatch cross the slice, which takes longer the larger it is. `--out` gets `metrics.json`, `table.md` and `pod_plan.png`; a repeated run
compiles only what is missing.
"""

from ..commandline import execute
from .config import Config


def run(config: Config) -> None:
    """Load what the command needs, and do it."""
    from . import plan

    print(plan.table(plan.run(config)))


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return execute(run, Config, __doc__, "experiments.pod_plan", args)


if __name__ == "__main__":
    raise SystemExit(main())
