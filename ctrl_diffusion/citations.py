"""What to cite: the BibTeX that docstrings carry."""

import inspect
import re
from typing import Any

_BIBTEX = re.compile(r"```bibtex\s*(.*?)```", re.DOTALL)


def citation(*things: Any) -> str:
    """Print and return the BibTeX entries of algorithms, solvers or other things of this library, each once.

    Takes functions, classes, or instances of classes: `citation(ctrl_diffusion.vard, DPMSolverPP2M())`. Raises `ValueError` for
    something that names no reference.
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
