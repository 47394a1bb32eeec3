"""Environment of the TPU library (libtpu) on a machine without a TPU: without it the library prints errors about missing metadata."""

import os

WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Ask no metadata server; be one host of some slice, whichever."""


def quiet_without_tpu() -> None:
    """Load JAX, and set the environment variables `WITHOUT_TPU` if it finds no TPU. Call it before JAX first uses a device.

    JAX says that there is none by setting `TPU_SKIP_MDS_QUERY`. Where the user has set that, everything is left as it is.
    """
    if "TPU_SKIP_MDS_QUERY" in os.environ:
        return
    import jax as jax

    if "TPU_SKIP_MDS_QUERY" in os.environ:
        for name, value in WITHOUT_TPU.items():
            os.environ.setdefault(name, value)
