"""`python -m experiments.solver_cost`."""

from .cost import main

if __name__ == "__main__":
    raise SystemExit(main())
