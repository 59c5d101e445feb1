"""The machine that numbers come from: its processor and JAX's devices."""

import platform
from pathlib import Path
from typing import Any

import jax

from ggl_jax.errors import GGLError

#: Settings of JAX that change results, at the values that results are known for.
SETTINGS = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_numpy_dtype_promotion": "standard",
    "jax_default_matmul_precision": None,
}


def settings() -> dict[str, Any]:
    """Those of JAX's :data:`SETTINGS` that have another value now.

    Raises:
        GGLError: ``jax_disable_jit`` is on.
    """
    now = {name: getattr(jax.config, name) for name in (*SETTINGS, "jax_disable_jit")}
    if now.pop("jax_disable_jit"):
        raise GGLError("jax_disable_jit: got True, allowed: False, since searches are compiled")
    plain = {name: getattr(value, "value", value) for name, value in now.items()}  # of an enum
    return {name: value for name, value in plain.items() if value != SETTINGS[name]}


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
