"""Fine-tune Stable Diffusion for a reward, from its published files, and write LoRA files that other programs read.

    python -m experiments.text_to_image --out runs/text_to_image
    python -m experiments.text_to_image --model stable-diffusion-v1-5 --reward aesthetic --prompts prompts.txt --out runs/aesthetic

The first command tries everything out on a tiny random model. `--settings NAME` starts from the settings of a paper: see
docs/text_to_image.md. Running the same command again resumes the run, or says that it is finished.
"""

import dataclasses

from ..commandline import execute
from .config import Config, PaperName


@dataclasses.dataclass(frozen=True)
class Options(Config):
    """Settings of a run. Batches are global: those of all devices together. Everything random derives from `seed`."""

    settings: PaperName | None = None
    """Start from the settings of this paper, which the other options change: see docs/text_to_image.md."""


def run(options: Options) -> None:
    """Load what the command needs, and do it."""
    from . import experiment

    experiment.run(options)


def settings_of_paper(options: Options) -> Options | None:
    """The settings that `--settings` names, in place of the defaults."""
    if options.settings is None:
        return None
    from .settings import PUBLISHED

    return Options(**PUBLISHED[options.settings].settings, settings=options.settings)


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return execute(run, Options, __doc__, "experiments.text_to_image", args, settings_of_paper)


if __name__ == "__main__":
    raise SystemExit(main())
