"""`python -m experiments.random_model`."""

from .writer import main

if __name__ == "__main__":
    raise SystemExit(main())
