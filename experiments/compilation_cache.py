"""Keep compiled programs in a folder of the user, so that a second start compiles nothing."""

import hashlib
import os
import platform
from pathlib import Path

import jax
import jaxlib.version

SHORTEST = 0.0  # seconds of compilation from which on a program is kept: a start has hundreds of small ones


def default_folder() -> Path:
    """The folder for this version of jaxlib and this processor: programs for a CPU may hold instructions that another CPU lacks."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "ctrl_diffusion" / f"jaxlib-{jaxlib.version.__version__}-{_processor()}"


def keep_compiled_programs() -> None:
    """Have JAX keep what it compiles in `default_folder()`.

    The user's settings come first: `JAX_COMPILATION_CACHE_DIR` is another folder, `JAX_ENABLE_COMPILATION_CACHE=0` keeps nothing.
    If the folder cannot be made, nothing is kept; that is no error.
    """
    said = jax.config.values
    if not said["jax_enable_compilation_cache"]:
        return
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    if said["jax_compilation_cache_dir"] is not None:
        return
    folder = default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _processor() -> str:
    """A short name of the processor's instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        about = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        about = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(about.encode()).hexdigest()[:8]}"
