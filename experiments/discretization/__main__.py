"""`python -m experiments.discretization`."""

from .experiment import main

if __name__ == "__main__":
    raise SystemExit(main())
