"""`python -m experiments.solvers`."""

from .experiment import main

if __name__ == "__main__":
    raise SystemExit(main())
