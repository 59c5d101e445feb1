"""Sharing a search out to many devices, of one process or of several (``jax.distributed``)."""

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ggl_jax.types import PyTree

#: The mesh's axis, by what is shared out.
INSTANCES, POPULATION = "instances", "population"


class Layout:
    """How the instances of one search lie on a mesh.

    With at least as many instances as devices, each device gets its share of them, and no device
    waits for another. With fewer, every device holds all instances and evaluates its share of each
    step's candidates (:func:`over_population`).

    Args:
        mesh: the devices, whatever its axes; None (or one device) for JAX's usual placement.
        num_instances: how many searches there are.

    Attributes:
        num_padded: ``num_instances`` rounded up to what the devices can share evenly.
    """

    def __init__(self, mesh: Mesh | None, num_instances: int):
        self.num_instances = self.num_padded = num_instances
        self._mesh: Mesh | None = None
        if mesh is None or mesh.size == 1:
            return
        if num_instances >= mesh.size:
            self.num_padded = -(-num_instances // mesh.size) * mesh.size
            axis = INSTANCES
        else:
            axis = POPULATION
        self._mesh = Mesh(mesh.devices.reshape(-1), (axis,))
        self._axis = axis

    def pad(self, items: list) -> list:
        """Instances' items, the last one repeated to an even share."""
        return [*items, *[items[-1]] * (self.num_padded - len(items))]

    def instances(self, tree: PyTree) -> PyTree:
        """Place arrays whose first axis counts instances."""
        spec = PartitionSpec(INSTANCES) if self._mesh and self._axis == INSTANCES else None
        return self._place(tree, spec or PartitionSpec())

    def shared(self, tree: PyTree) -> PyTree:
        """Place arrays that every device needs whole."""
        return self._place(tree, PartitionSpec())

    def _place(self, tree: PyTree, spec: PartitionSpec) -> PyTree:
        if self._mesh is None:
            return tree
        sharding = NamedSharding(self._mesh, spec)

        def place(x):
            if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                data = place(jax.random.key_data(x))
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
            host = np.asarray(x)
            return jax.make_array_from_callback(
                host.shape, sharding, lambda index: np.asarray(host[index])
            )

        return jax.tree.map(place, tree)

    def active(self):
        """The context in which the search's programs are traced and run."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def fetch(self, tree: PyTree) -> PyTree:
        """Results of all instances, whole, on every process, and without what was padded."""
        if self._mesh is None:
            return tree
        return jax.tree.map(lambda x: jnp.asarray(x)[: self.num_instances], self.whole(tree))

    def whole(self, tree: PyTree) -> PyTree:
        """Arrays on this process's host, whole, with what was padded."""
        if self._mesh is not None and jax.process_count() > 1:
            tree = multihost_utils.process_allgather(tree, tiled=True)
        return jax.tree.map(np.asarray, tree)

    def agree(self, flag: bool) -> bool:
        """Process 0's flag: what follows has to be done by all processes or by none."""
        if self._mesh is None:
            return flag
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag)))


def over_population(function: Callable) -> Callable:
    """Share the candidates of a call out to the devices, where a search is laid out that way.

    Args:
        function: ``function(*arrays[n ...])`` that treats candidates independently and gives an
            array [n ...], or a tree of them.

    Returns:
        The same function; candidates are padded to an even share, by repeating the last.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or POPULATION not in mesh.axis_names:
        return function
    size = mesh.shape[POPULATION]
    spec = PartitionSpec(POPULATION)

    def shared_out(*arrays):
        num = arrays[0].shape[0]
        padding = -num % size

        def pad(x):
            return jnp.concatenate([x, jnp.repeat(x[-1:], padding, axis=0)]) if padding else x

        mapped = jax.shard_map(function, in_specs=spec, out_specs=spec, check_vma=False)
        return jax.tree.map(lambda x: x[:num], mapped(*(pad(x) for x in arrays)))

    return shared_out
