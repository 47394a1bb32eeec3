"""The direction of dependencies: experiments -> ctrl_diffusion -> solvers, and what no file may do."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ctrl_diffusion", "solvers", "experiments", "tests")
FIRST_PARTY = set(FOLDERS)
SOLVERS_MAY_IMPORT = {"diffrax", "equinox", "jax", "jaxtyping", "lineax", "numpy", "optimistix"}
MAX_LINES = 400


def sources(*folders):
    """Python files below each folder, without following links; the link to `solvers/` is checked where it lives."""
    for folder in folders:
        for directory, subfolders, names in os.walk(ROOT / folder):
            subfolders[:] = [name for name in subfolders if name != "__pycache__"]
            for name in names:
                if name.endswith(".py"):
                    yield Path(directory, name)


def imports(path: Path):
    """`(line, module, level)` of every import, those inside functions and through `import_module("...")` included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "", node.level
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if isinstance(node.args[0].value, str) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                yield node.lineno, node.args[0].value, 0


def top_levels(path: Path):
    for line, module, level in imports(path):
        yield line, module.split(".")[0] if level == 0 else ".", level


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def offences(folder: str, banned: set[str]) -> list[str]:
    return [f"{where(p, line)} imports {name}" for p in sources(folder) for line, name, _ in top_levels(p) if name in banned]


def test_all_folders_are_there():
    for folder in FOLDERS:
        assert list(sources(folder)), f"no Python files in {folder}/"


def test_solvers_is_reached_only_through_the_link_in_the_package():
    link = ROOT / "ctrl_diffusion" / "solvers"
    assert link.is_symlink(), "ctrl_diffusion/solvers must be a symbolic link (git on Windows: core.symlinks=true)"
    assert os.readlink(link) == "../solvers"
    assert not (ROOT / "solvers").is_symlink()


def test_nobody_imports_a_bare_solvers():
    assert [bad for folder in FOLDERS for bad in offences(folder, {"solvers"})] == []


def test_solvers_knows_nothing_above_it():
    allowed = SOLVERS_MAY_IMPORT | set(sys.stdlib_module_names) | {"."}
    for path in sources("solvers"):
        depth = len(path.relative_to(ROOT / "solvers").parts)  # one dot in solvers/x.py, at most two in solvers/a/x.py
        for line, name, level in top_levels(path):
            assert name in allowed, f"{where(path, line)} imports {name}; solvers/ may import {sorted(SOLVERS_MAY_IMPORT)}"
            assert level <= depth, f"{where(path, line)} leaves solvers/ by a relative import"


def test_the_library_does_not_know_experiments_or_tests():
    assert offences("ctrl_diffusion", {"experiments", "tests"}) == []
    for path in sources("ctrl_diffusion"):
        depth = len(path.relative_to(ROOT / "ctrl_diffusion").parts)
        for line, _, level in top_levels(path):
            assert level <= depth, f"{where(path, line)} leaves ctrl_diffusion/ by a relative import"


FAMILIES = {"stable_diffusion", "image_rewards"}


def parts_imported(path: Path):
    """`(line, part)` of every import of the library from within: `rewards` for `from ..rewards import Reward` in a subpackage."""
    package = ("ctrl_diffusion", *path.relative_to(ROOT / "ctrl_diffusion").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            full = [(*base, *filter(None, (node.module or "").split(".")), alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            full = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name[1]) for name in full if name[0] == "ctrl_diffusion" and len(name) > 1)


def family_of(path: Path) -> str:
    return path.relative_to(ROOT / "ctrl_diffusion").parts[0]


def test_model_families_share_pretrained_and_not_each_other():
    """`pretrained/` knows no family, a family no other, and the core none of them."""
    for path in sources("ctrl_diffusion"):
        here = family_of(path)
        banned = FAMILIES - {here} if here in FAMILIES | {"pretrained"} else FAMILIES | {"pretrained"}
        found = [f"{where(path, line)} imports {part}" for line, part in parts_imported(path) if part in banned]
        assert found == [] or here == "__init__.py"


def test_runs_are_the_top_floor_of_the_library():
    """Nothing below knows of folders, loops or loggers: but for `ctrl_diffusion/__init__.py`, which names the package."""
    runs = ROOT / "ctrl_diffusion" / "runs"
    for path in sources("ctrl_diffusion"):
        if runs in path.parents or path == ROOT / "ctrl_diffusion" / "__init__.py":
            continue
        package = path.relative_to(ROOT).parts[:-1]
        for line, module, level in imports(path):
            base = package[: len(package) - level + 1] if level else ()
            absolute = ".".join((*base, module))
            assert not (absolute + ".").startswith("ctrl_diffusion.runs."), f"{where(path, line)} imports {absolute}"


def test_experiments_do_not_know_tests():
    assert offences("experiments", {"tests"}) == []


@pytest.mark.parametrize("folder", ["ctrl_diffusion", "solvers", "experiments"])
def test_no_torch(folder):
    """But for the one file that is compared with, which nobody imports before torch is known to be there."""
    found = offences(folder, {"torch", "torchvision", "diffusers", "peft", "tensorflow"})
    assert [offence for offence in found if not offence.startswith("experiments/benchmark/pytorch.py:")] == []


@pytest.mark.parametrize("folder", ["ctrl_diffusion", "solvers"])
def test_the_library_changes_no_jax_configuration_and_no_environment(folder):
    banned = ("config.update", "os.environ", "environ.setdefault", "putenv", "enable_x64")
    for path in sources(folder):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute | ast.Name):
                assert not ast.unparse(node).endswith(banned), f"{where(path, node.lineno)}: {ast.unparse(node)}"


@pytest.mark.parametrize("folder", ["ctrl_diffusion", "solvers"])
def test_annotations_are_evaluated(folder):
    """`from __future__ import annotations` turns equinox's AbstractVar into a string, which is then not checked."""
    assert offences(folder, {"__future__"}) == []


def test_files_are_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*FOLDERS)}
    assert {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > MAX_LINES} == {}


def test_no_drawer_for_everything():
    names = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}
    assert [str(path.relative_to(ROOT)) for path in sources(*FOLDERS) if path.name in names] == []


def test_every_experiment_is_a_package_with_a_command_and_a_page():
    """Or a command for what a package holds; a page is a screen at most."""
    for folder in (path for path in (ROOT / "experiments").iterdir() if path.is_dir() and path.name != "__pycache__"):
        assert {"__init__.py", "__main__.py", "README.md"} <= {path.name for path in folder.iterdir()}, folder.name
        page = (folder / "README.md").read_text(encoding="utf-8")
        assert f"python -m experiments.{folder.name} " in page and len(page.splitlines()) <= 40, folder.name


IMPORT_ALL = """
    import importlib, pkgutil
    import chex, diffrax, equinox, flax.nnx, jax, optax, orbax.checkpoint, transformers

    def settings():
        return {name: repr(value) for name, value in jax.config.values.items()}

    before = settings()
    import ctrl_diffusion
    modules = [m.name for m in pkgutil.walk_packages(ctrl_diffusion.__path__, "ctrl_diffusion.", importlib.import_module)]
    assert "ctrl_diffusion.solvers.term" in modules, modules
    for name in modules:
        importlib.import_module(name)
    changed = {name: value for name, value in settings().items() if before.get(name) != value}
    assert not changed, f"importing ctrl_diffusion changed jax.config: {changed}"

    import sys
    for name in ("torch", "tensorflow", "tensorboardX", "wandb", "matplotlib", "experiments", "tests", "solvers"):
        assert name not in sys.modules, f"importing ctrl_diffusion imported {name}"
"""


def test_importing_every_module_has_no_side_effects():
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(IMPORT_ALL)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
