"""`python -m experiments.report`: the report of a finished run of the digits, drawn again."""

from .digits.report import main

if __name__ == "__main__":
    raise SystemExit(main())
