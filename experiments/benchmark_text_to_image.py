"""`python -m experiments.benchmark_text_to_image`: the benchmark of Stable Diffusion."""

from .benchmark.text_to_image import main

if __name__ == "__main__":
    raise SystemExit(main())
