"""`python -m experiments.text_to_image_report`: the gallery of a finished run, drawn again."""

from .text_to_image.report import main

if __name__ == "__main__":
    raise SystemExit(main())
