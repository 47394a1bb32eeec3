"""`python -m experiments.value_networks`."""

from .experiment import main

if __name__ == "__main__":
    raise SystemExit(main())
