"""References: the BibTeX entries in docstrings."""

import inspect
import re
from typing import Any

_BIBTEX = re.compile(r"```bibtex\s*(.*?)```", re.DOTALL)


def citation(*things: Any) -> str:
    """Print and return the BibTeX entries of algorithms, solvers or other things of this library, each once.

    Arguments are functions, classes or instances: `citation(ctrl_diffusion.vard, DPMSolverPP2M())`. Raises `ValueError` if the docstring
    of one has no reference.
    """
    entries: dict[str, None] = {}
    for thing in things:
        named = thing if inspect.isfunction(thing) or inspect.isclass(thing) else type(thing)
        found = _BIBTEX.findall(inspect.getdoc(named) or "")
        if not found:
            raise ValueError(
                f"{getattr(named, '__name__', named)} names no reference: see its documentation, and CITATION.cff."
            )
        for block in found:
            for entry in re.split(r"\n(?=@)", block.strip()):
                entries.setdefault(entry.strip())
    text = "\n\n".join(entries)
    print(text)
    return text
