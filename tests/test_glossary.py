"""The glossary: short, in rows of five cells, and every name of the code in it exists."""

import re

from tests.test_docs import README, ROOT, resolves

PAGE = ROOT / "docs" / "glossary.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("|")
][2:]


def test_the_table_is_whole_and_short():
    assert 20 < len(ROWS) <= 45 and {len(row) for row in ROWS} == {5}
    assert len({row[0] for row in ROWS}) == len(ROWS) and all(row[0] and row[1] and row[3] for row in ROWS)


def test_names_of_the_code_exist():
    named = [re.findall(r"`([^`]+)`", row[3]) for row in ROWS]
    assert all(named)
    assert [name for names in named for name in names if not resolves(name)] == []


def test_pages_lead_to_it():
    assert "(docs/glossary.md)" in README.read_text(encoding="utf-8")
    assert "(glossary.md)" in (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
