"""The list of mutations is alive: each has one place in the library and tests that are there; see `mutations.py`."""

import re
from pathlib import Path

import pytest

from tests.mutating import Mutation, arguments, chosen, copied, places
from tests.mutations import OBJECTIVE, PROCESS, SOLVERS
from tests.mutations_of_inputs import INPUTS
from tests.mutations_of_methods import METHODS, NETWORKS

ROOT = Path(__file__).resolve().parent.parent
MUTATIONS = [*SOLVERS, *PROCESS, *OBJECTIVE, *METHODS, *NETWORKS, *INPUTS]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_has_one_place_and_tests(mutation):
    found = places(mutation)
    assert len(found) == 1, f"{mutation.old!r} occurs in {[str(path.relative_to(ROOT)) for path in found]}"
    assert mutation.new != mutation.old
    files = [word.split("::") for word in arguments(mutation) if ".py" in word]
    assert files
    for file, *functions in files:
        text = (ROOT / file).read_text(encoding="utf-8")
        assert all(re.search(rf"^def {name.split('[')[0]}\(", text, re.M) for name in functions), f"{file} has no {functions}"


def test_names_are_told_apart():
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names) >= 48
    assert [m.name for m in chosen(MUTATIONS, ["Karras"])] == ["Karras' grid without rho"]
    with pytest.raises(SystemExit, match="no mutation has this"):
        chosen(MUTATIONS, ["no such thing"])


def test_a_text_is_looked_for_in_the_whole_library():
    assert [path.name for path in places(Mutation("one", "class KeyedPath(", "", ""))] == ["path.py"]
    assert places(Mutation("none", "no such text in it", "", "")) == []
    assert len(places(Mutation("many", "import jax\n", "", ""))) > 20


def test_the_copy_holds_the_whole_library(tmp_path):
    """All of its files, in folders of any name."""
    copy = copied(tmp_path / "copy")
    for folder in ("ctrl_diffusion", "solvers", "experiments", "tests"):
        found, expected = ({path.relative_to(root) for path in (root / folder).rglob("*.py")} for root in (copy, ROOT))
        assert found == expected
