"""Draw the gallery of a finished run of `experiments.text_to_image` again.

    python -m experiments.text_to_image_report runs/text_to_image

Reads `config.json`, `metrics.json`, `history.jsonl` and `images.npz`, and writes `samples.png`, `curves.png` and `gallery.html`
beside them.
"""

from .commandline import FinishedRun, execute


def run(config: FinishedRun) -> None:
    """Load what the command needs, and do it."""
    from .text_to_image.report import write_gallery

    print(write_gallery(config.directory))


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return execute(run, FinishedRun, __doc__, "experiments.text_to_image_report", args)


if __name__ == "__main__":
    raise SystemExit(main())
