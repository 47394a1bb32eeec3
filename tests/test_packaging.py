"""What is built and installed: the wheel, the sdist, the wheel from the sdist, and the pinned versions."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ctrl_diffusion

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAME = f"ctrl_diffusion-{ctrl_diffusion.__version__}"


def run(*command, cwd, **kwargs) -> str:
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def modules(folder: str, to: str) -> dict[str, bytes]:
    """Python files of a source folder as they should appear in an archive."""
    return {f"{to}/{p.relative_to(ROOT / folder).as_posix()}": p.read_bytes() for p in (ROOT / folder).rglob("*.py")}


PACKAGE = {**modules("ctrl_diffusion", "ctrl_diffusion"), **modules("solvers", "ctrl_diffusion/solvers")}


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> dict[str, Path]:
    """Built as a release is: sdist, wheel from that sdist; and the wheel straight from the checkout."""
    out = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", out / "release", ROOT, cwd=out)
    run("-m", "build", "--no-isolation", "--wheel", "--outdir", out / "direct", ROOT, cwd=out)
    wheel = f"{NAME}-py3-none-any.whl"
    return {"sdist": out / "release" / f"{NAME}.tar.gz", "wheel": out / "release" / wheel, "direct": out / "direct" / wheel}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        assert not any(info.external_attr >> 16 & 0o170000 == 0o120000 for info in archive.infolist()), "a symbolic link"
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("which", ["wheel", "direct"])
def test_wheel_holds_the_package_alone(archives, which):
    files = contents(archives[which])
    assert {name.split("/")[0] for name in files} == {"ctrl_diffusion", f"{NAME}.dist-info"}
    assert {name: data for name, data in files.items() if name.endswith(".py")} == PACKAGE
    assert "ctrl_diffusion/py.typed" in files
    assert files[f"{NAME}.dist-info/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_wheel_from_the_sdist_is_the_wheel_from_the_checkout(archives):
    assert contents(archives["wheel"]) == contents(archives["direct"])


def test_sdist_holds_real_files_and_no_other_folder(archives):
    with tarfile.open(archives["sdist"]) as archive:
        members = archive.getmembers()
    assert all(member.isreg() or member.isdir() for member in members)
    names = {member.name.removeprefix(f"{NAME}/") for member in members if member.isreg()}
    assert {name.split("/")[0] for name in names if "/" in name} == {"ctrl_diffusion"}
    assert {name for name in names if name.endswith(".py")} == set(PACKAGE)
    assert {"LICENSE", "README.md", "CITATION.cff", "constraints.txt", "pyproject.toml", "PKG-INFO"} <= names


def test_installed_wheel_next_to_a_users_own_solvers(archives, tmp_path):
    site, user = tmp_path / "site", tmp_path / "user"
    user.mkdir()
    (user / "solvers.py").write_text("decoy = True\n")
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    run(*pip, "--target", site, archives["wheel"], cwd=tmp_path)
    code = f"""
        import sys
        sys.path.insert(1, {str(site)!r})
        import importlib, importlib.metadata, pkgutil
        import ctrl_diffusion
        modules = [m.name for m in pkgutil.walk_packages(ctrl_diffusion.__path__, "ctrl_diffusion.", importlib.import_module)]
        assert "ctrl_diffusion.solvers.term" in modules, modules
        for name in modules:
            path = importlib.import_module(name).__file__
            assert path.startswith({str(site)!r}), path
        assert "solvers" not in sys.modules
        import solvers
        assert solvers.decoy and solvers is not ctrl_diffusion.solvers
        print(importlib.metadata.version("ctrl-diffusion"), ctrl_diffusion.__version__)
    """
    assert run("-c", textwrap.dedent(code), cwd=user).split() == [ctrl_diffusion.__version__] * 2


def test_ci_runs_the_command_of_the_readme_and_the_rest_of_the_suite():
    script = ROOT / ".ci" / "run"
    command, rest = script.read_text(encoding="utf-8").splitlines()[-2:]
    assert command.endswith(' && .venv/bin/python -m pytest -n 2 -m "not slow"')
    assert rest == ".venv/bin/python -m pytest -n 2 -m slow"
    assert command in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert os.access(script, os.X_OK)


def pins() -> dict[str, Requirement]:
    """The pins of `constraints.txt` that hold for this Python, by canonical name."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        assert re.fullmatch(r'[a-z0-9-]+==[0-9][0-9a-z.]*( ; (python_version|sys_platform) (<|>=|==) "[a-z0-9.]+")?', line), (
            line
        )
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate():
            assert pin.name not in found, f"{pin.name} is pinned twice for this Python"
            found[pin.name] = pin
    return found


def requirements(names, extra=""):
    for text in names:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def test_everything_that_the_tests_install_is_pinned():
    pinned = pins()
    extras = PROJECT["optional-dependencies"]
    todo = list(requirements([*PROJECT["dependencies"], *extras["experiments"], *extras["test"]]))
    seen = {"ctrl-diffusion"}
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if name + extra not in seen and name != "ctrl-diffusion":
                seen.add(name + extra)
                assert name in pinned, f"{name} is not pinned in constraints.txt"
                todo += requirements(importlib.metadata.requires(name) or [], extra)
    assert len(seen) > 50


def test_pins_satisfy_the_declared_bounds():
    pinned = pins()
    for text in [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]:
        requirement = Requirement(text)
        if requirement.name != "ctrl-diffusion":
            version = next(iter(pinned[canonicalize_name(requirement.name)].specifier)).version
            assert requirement.specifier.contains(version), f"{text}, but constraints.txt pins {version}"
