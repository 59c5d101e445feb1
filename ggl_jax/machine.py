"""The machine that numbers come from: its processor and JAX's devices."""

import platform
from pathlib import Path

import jax

from ggl_jax.errors import GGLError


def cpu_name() -> str:
    """The processor's name, or its architecture where Linux does not tell more."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def devices() -> list[jax.Device]:
    """JAX's devices.

    Raises:
        GGLError: JAX_PLATFORMS asks for devices that are not here.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts where its CUDA plugin is absent
        wanted = getattr(jax.config, "jax_platforms", None)
        raise GGLError(
            f"JAX_PLATFORMS={wanted}: JAX finds no such device here; unset it to use what there "
            "is, or install JAX for the device, such as jax[cuda13]"
        ) from error
