"""`python -m experiments.text_to_image`."""

from .experiment import main

if __name__ == "__main__":
    raise SystemExit(main())
