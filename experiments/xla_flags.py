"""Settings of the compiler that the commands choose, where the user has not."""

import os

import jaxlib.version

YNNPACK = "--xla_cpu_experimental_ynn_fusion_type"
EVERYTHING_BUT_CONVOLUTIONS = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
FROM, BEFORE = (0, 10), (0, 13)  # releases of jaxlib; others may not know the flag, and an unknown one ends the process


def faster_convolutions(version: tuple[int, ...] = jaxlib.version.__version_info__) -> None:
    """Have XLA compute convolutions on CPUs by Eigen, not YNNPACK: a U-Net of the digits' size is then 1.4 times as fast.

    That is jaxlib 0.10's default without convolutions, so that no other program changes, nor one for another device. It goes into the
    environment variable `XLA_FLAGS`, which is read when JAX first uses a device; what is said about YNNPACK there is left as it is.
    """
    said = os.environ.get("XLA_FLAGS", "")
    if FROM <= version[:2] < BEFORE and YNNPACK not in said:
        os.environ["XLA_FLAGS"] = f"{said} {YNNPACK}={EVERYTHING_BUT_CONVOLUTIONS}".strip()
