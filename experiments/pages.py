"""Self-contained pages of runs, from jinja2 templates that lie beside the code that fills them."""

import base64
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters["base64"] = lambda data: base64.b64encode(data).decode()


class Picture(NamedTuple):
    """A PNG, and what it shows for those who do not see it."""

    png: bytes
    alt: str


def page(template: str, **values: Any) -> str:
    """The page of a template, named by its path in `experiments/`; a value that it lacks is an error. All text is escaped."""
    return _TEMPLATES.get_template(template).render(values)
