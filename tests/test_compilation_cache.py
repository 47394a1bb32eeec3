"""Compiled programs are kept by default, where the user wants them, or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILE = """
import jax, jax.numpy as jnp
from experiments.compilation_cache import keep_compiled_programs
keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
"""


def kept(home: Path, **settings) -> list[str]:
    """Folders, below a home, that hold programs after a process has compiled one."""
    env = {name: v for name, v in os.environ.items() if not name.startswith(("JAX_", "XDG_"))}
    env |= {"HOME": str(home), "JAX_PLATFORMS": "cpu"} | settings
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return sorted({str(path.parent.relative_to(home)) for path in home.rglob("*-cache")})


@pytest.mark.parametrize("choice", ["default", "moved", "disabled"])
def test_programs_are_kept_where_the_user_says(choice, tmp_path):
    settings = {
        "default": {},
        "moved": {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "elsewhere")},
        "disabled": {"JAX_ENABLE_COMPILATION_CACHE": "0"},
    }[choice]
    folders = kept(tmp_path, **settings)
    if choice == "default":
        assert len(folders) == 1 and folders[0].startswith(".cache/ctrl_diffusion/jaxlib-")
    else:
        assert folders == (["elsewhere"] if choice == "moved" else [])
