"""Devices and hosts of a command: JAX's own mesh and ``jax.distributed``."""

import jax
import numpy as np

from ggl_jax.errors import GGLError, explaining


def join(
    coordinator: str | None, num_processes: int | None, process_id: int | None, distributed: bool
) -> None:
    """Join the processes of several hosts, before JAX looks for devices.

    Args:
        coordinator: HOST:PORT of process 0.
        num_processes: how many there are.
        process_id: this one's number, from 0.
        distributed: let JAX find out the three above (SLURM, Kubernetes, TPU pods, Open MPI).

    Raises:
        GGLError: some of the three without the others, or the processes do not find each other.
    """
    given = (coordinator, num_processes, process_id)
    if all(value is None for value in given):
        if not distributed:
            return
    elif any(value is None for value in given):
        raise GGLError(
            "coordinator, num_processes, process_id: give all three, or --distributed where "
            "JAX can find them itself (SLURM, Kubernetes, TPU)"
        )
    what = f"coordinator: {coordinator or 'as JAX detects it'} could not be joined"
    remedy = "start every process with the same --coordinator and --num-processes"
    with explaining(what, remedy, (RuntimeError, ValueError)):
        jax.distributed.initialize(coordinator, num_processes, process_id)


def mesh(shard: bool):
    """All devices of all processes as a mesh; None where one device is to do the work."""
    if not shard and jax.process_count() == 1:
        return None
    return jax.sharding.Mesh(np.asarray(jax.devices()), ("devices",))
