"""Time sampling of Stable Diffusion by this library, a hand-written `lax.scan` and PyTorch with diffusers, in turn within one run.

    python -m experiments.benchmark_text_to_image --out runs/benchmark_tiny
    python -m experiments.benchmark_text_to_image --model stable-diffusion-v1-5 --steps 2 --repeats 5 --out runs/benchmark_sd15

All sides have the UNet of the folder, the same timesteps, the same noise, and classifier-free guidance with both branches in one batch.
Before anything is timed, their latents are compared, and a difference beyond rounding is an error. PyTorch needs the extra `benchmark`.
`python -m experiments.random_model` writes a folder with random weights. Read the medians over rounds of the ratios within a round.
"""

from .benchmark.config import TextToImageConfig as Config
from .commandline import execute


def run(config: Config) -> None:
    """Load what the command needs, and do it."""
    from .benchmark import text_to_image

    print(text_to_image.in_words(text_to_image.run(config)))


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return execute(run, Config, __doc__, "experiments.benchmark_text_to_image", args)


if __name__ == "__main__":
    raise SystemExit(main())
