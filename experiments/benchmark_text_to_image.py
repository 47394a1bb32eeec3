"""Speed of sampling Stable Diffusion: this library, a hand-written `lax.scan`, and PyTorch with diffusers, interleaved in one run.

    python -m experiments.benchmark_text_to_image --out runs/benchmark_tiny
    python -m experiments.benchmark_text_to_image --model stable-diffusion-v1-5 --steps 2 --repeats 5 --out runs/benchmark_sd15

All sides have the UNet of the folder, classifier-free guidance with both branches in one batch, the same timesteps and the same noise,
and are held to the same latents before anything is timed. PyTorch needs the extra `prepared`. `python -m experiments.random_model` writes a
folder with random weights. The figures to read are the medians over rounds of the ratios of times within a round.
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
