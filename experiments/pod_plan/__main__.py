"""`python -m experiments.pod_plan`."""

from .plan import main

if __name__ == "__main__":
    raise SystemExit(main())
