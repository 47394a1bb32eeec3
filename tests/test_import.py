"""What `import ctrl_diffusion` brings in, and which names it has."""

import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import ctrl_diffusion as cd

ROOT = Path(__file__).resolve().parent.parent
ON_FIRST_USE = ("exact", "image_rewards", "pretrained", "stable_diffusion")
NOT_NEEDED = ("PIL", "matplotlib", "orbax", "safetensors", "scipy", "sklearn", "tensorstore", "torch", "transformers")


def modules_after(code: str) -> set[str]:
    """All modules that a new interpreter has after running `code`."""
    code = f"{textwrap.dedent(code)}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def imported():
    return modules_after("import ctrl_diffusion")


def test_the_import_brings_in_only_what_every_script_needs(imported):
    assert [name for name in NOT_NEEDED if name in imported] == []
    assert [name for name in ON_FIRST_USE if f"ctrl_diffusion.{name}" in imported] == []
    assert {"ctrl_diffusion.algorithms", "ctrl_diffusion.solvers"} <= imported


def test_subpackages_are_imported_when_they_are_first_used(imported):
    code = """
        import sys, ctrl_diffusion as cd
        assert "stable_diffusion" in dir(cd) and "ctrl_diffusion.stable_diffusion" not in sys.modules
        assert cd.stable_diffusion.UNet.__module__ == "ctrl_diffusion.stable_diffusion.unet"
        from ctrl_diffusion import exact
        assert cd.exact is exact
    """
    after = modules_after(code)
    assert {"ctrl_diffusion.exact", "ctrl_diffusion.stable_diffusion", "ctrl_diffusion.pretrained"} <= after
    assert not {"ctrl_diffusion.image_rewards", "transformers", "torch"} & after


def test_a_name_that_is_not_there_is_an_attribute_error():
    name = "stable_difusion"
    with pytest.raises(AttributeError, match=f"'ctrl_diffusion' has no attribute '{name}'"):
        getattr(cd, name)


def test_names_of_scripts_are_at_the_top_and_no_others():
    exported = set(cd.__all__)
    assert len(exported) == len(cd.__all__) <= 60
    assert exported <= set(dir(cd))
    for name in cd.__all__:
        getattr(cd, name)
    public = {name for name in dir(cd) if not name.startswith("_") and not inspect.ismodule(getattr(cd, name))}
    assert public - exported <= {"Any", "TYPE_CHECKING"}
