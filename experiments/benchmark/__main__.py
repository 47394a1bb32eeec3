"""`python -m experiments.benchmark`."""

from .comparison import main

if __name__ == "__main__":
    raise SystemExit(main())
