"""Draw the report of a finished run of `experiments.digits` again.

    python -m experiments.report runs/digits

Reads `config.json`, `metrics.json`, `history.jsonl` and `samples.npz`, and writes `samples.png`, `curves.png`, `classes.png` and
`report.html` beside them.
"""

from .commandline import FinishedRun, execute


def run(config: FinishedRun) -> None:
    """Load what the command needs, and do it."""
    from .digits.report import write_report

    print(write_report(config.directory))


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return execute(run, FinishedRun, __doc__, "experiments.report", args)


if __name__ == "__main__":
    raise SystemExit(main())
