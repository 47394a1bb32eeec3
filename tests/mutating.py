"""Applies wrong edits to a copy of the repository, one at a time, and says whether the tests that belong to each notice it."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ctrl_diffusion", "solvers")  # that are mutated; the link between them is not followed


class Mutation(NamedTuple):
    """`old`, which occurs once in the library, replaced by `new`; `tests` are pytest's arguments, files below `tests/`."""

    name: str
    old: str
    new: str
    tests: str
    devices: int = 1


class Found(NamedTuple):
    """What became of a mutation: `caught`, `survived`, or `broken` (no test ran), and how long that took."""

    mutation: Mutation
    outcome: str
    seconds: float
    said: str  # the last lines of the tests


def places(mutation: Mutation, root: Path = ROOT) -> list[Path]:
    """The files in which the text stands, one for each time."""
    files = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py") if "__pycache__" not in path.parts)
    files = [path for path in files if not path.is_relative_to(root / "ctrl_diffusion" / "solvers")]
    return [path for path in files for _ in range(path.read_text(encoding="utf-8").count(mutation.old))]


def copied(to: Path) -> Path:
    """A copy of what the tests need, without what they leave behind."""
    usual = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info")

    def ignored(folder: str, names: list[str]) -> set[str]:
        """Runs lie in the folder `runs` of the root; `ctrl_diffusion/runs` is part of the library."""
        return usual(folder, names) | ({"runs"} & set(names) if Path(folder) == ROOT else set())

    return Path(shutil.copytree(ROOT, to, symlinks=True, ignore=ignored))


def arguments(mutation: Mutation) -> list[str]:
    """Of pytest."""
    return [f"tests/{word}" if ".py" in word else word for word in shlex.split(mutation.tests)]


def tested(mutation: Mutation, root: Path, cache: Path) -> Found:
    """What the tests of a mutation say of the code in `root`; what the compiler made before is used again."""
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    if mutation.devices > 1:
        environment |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={mutation.devices}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments(mutation)]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    outcome = {0: "survived", 1: "caught"}.get(done.returncode, "broken")
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return Found(mutation, outcome, time.monotonic() - begin, "\n".join(said[-4:]))


def mutated(mutation: Mutation, root: Path, cache: Path) -> Found:
    """What the tests say of the mutated code; the code is restored."""
    found = places(mutation, root)
    if len(found) != 1:
        return Found(mutation, "broken", 0.0, f"{mutation.old!r} occurs {len(found)} times in the library")
    text = found[0].read_text(encoding="utf-8")
    try:
        written(found[0], text.replace(mutation.old, mutation.new))
        return tested(mutation, root, cache)
    finally:
        written(found[0], text)


def written(file: Path, text: str) -> None:
    """Write a file, later than before: Python takes one of the same second and length for the one that it has compiled."""
    later = int(file.stat().st_mtime) + 2
    file.write_text(text, encoding="utf-8")
    os.utime(file, (later, later))


def chosen(mutations: Sequence[Mutation], only: Sequence[str]) -> list[Mutation]:
    """Those whose name or tests contain one of the words, all without words."""
    picked = [m for m in mutations if not only or any(word in m.name or word in m.tests for word in only)]
    if not picked:
        raise SystemExit(f"--only {' '.join(only)}: no mutation has this in its name or its tests; see --list.")
    return picked


def main(mutations: Sequence[Mutation]) -> int:
    """The command line; 1 if a mutation survived, or its tests did not run."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="those with one of the words in name or tests")
    parser.add_argument("--list", action="store_true", help="say which there are, and run nothing")
    parser.add_argument("--unmutated", action="store_true", help="run the tests on the code as it is: none may fail")
    options = parser.parse_args()
    picked, table = chosen(mutations, options.only), []
    if options.list:
        print("\n".join(f"{m.name}: {m.tests}" for m in picked))
        return 0
    with tempfile.TemporaryDirectory(prefix="ctrl-diffusion-mutations-") as folder:
        root, cache = copied(Path(folder) / "repository"), Path(folder) / "compiled"
        for i, mutation in enumerate(picked):
            found = (tested if options.unmutated else mutated)(mutation, root, cache)
            table.append(found)
            print(f"{i + 1}/{len(picked)} {found.outcome} {found.seconds:.0f} s: {mutation.name}", flush=True)
            if found.outcome == "broken":
                print(found.said, flush=True)
    wanted = "survived" if options.unmutated else "caught"
    wrong = [found for found in table if found.outcome != wanted]
    print(f"\n{len(table) - len(wrong)} of {len(table)} {wanted}, {sum(found.seconds for found in table):.0f} s")
    for found in wrong:
        print(f"{found.outcome}: {found.mutation.name}: {found.mutation.tests}")
    return int(bool(wrong))
