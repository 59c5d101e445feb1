"""A bank: samples of the prior and their gradients, which the server computes for itself.

Every tensor of a gradient counts, above all under noise, where each of them tells something: of a
ResNet-18 the four largest hold most of the distance between two images' gradients. So a large
kernel's gradients are held as their layer's inputs and output cotangents, which have a hundredth of
the entries, and are formed in parts where they are needed.
"""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ggl_jax import cache, machine
from ggl_jax.adversary.matching import fused, layers
from ggl_jax.adversary.matching.program import Layer, Program, trace
from ggl_jax.client.gradients import gradient
from ggl_jax.files import digest
from ggl_jax.gate.models import variable_shapes
from ggl_jax.gate.trying import calls_back, program
from ggl_jax.priors.samples import samples
from ggl_jax.types import Model, Public, PyTree

#: Memory for a bank's gradients; the smallest tensors come first, and those that do not fit are
#: left out. ResNet-18: 1,000 samples of 32x32 take 1.4 GB, all tensors included.
BANK_BYTES = 2**31


class Held(NamedTuple):
    """How the samples' gradients of one tensor are held.

    Attributes:
        leaf: its number among the flattened parameters.
        size: its entries.
        layer: that of a kernel of which the inputs and output cotangents are held, since they have
            fewer entries; None where gradients are.
    """

    leaf: int
    size: int
    layer: Layer | None = None

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of each array that is held of a sample."""
        if self.layer is None:
            return [(self.size,)]
        layer = self.layer
        return [
            (layer.batch, *layer.in_spatial, layer.in_channels),
            (layer.batch, *layer.out_spatial, layer.out_channels),
        ]


class Bank(NamedTuple):
    """Samples of the prior, and their gradients at one label.

    Attributes:
        images: [n p] float32.
        held: the tensors whose gradients are held.
        arrays: of each of them :attr:`Held.shapes`, [n ...], bfloat16.
        kernels: of each of them <g_i, g_j>, [n n] float32; None of a bank for a single update,
            where :func:`products` works them out.
        sq_norms: [n t], of the tensors that are not held; of the others products tell them.
    """

    images: np.ndarray
    held: tuple[Held, ...]
    arrays: list[list[np.ndarray]]
    kernels: list[np.ndarray] | None
    sq_norms: np.ndarray


def make_bank(
    public: Public,
    label: int,
    num: int,
    key: jax.Array,
    progress: Callable[[float], None] | None = None,
    *,
    once: bool = False,
    simulate: Callable | None = None,
    estimated: PyTree = None,
) -> Bank:
    """Draw ``num`` samples of the prior and compute their gradients at a label.

    Args:
        public: what the server has.
        label: the inferred class.
        num: samples, at least 2.
        key: typed key of the samples.
        progress: called with the share that is done.
        once: whether it is for a single update.
        simulate: what each gradient goes through, as :attr:`ggl_jax.types.View.simulate`; None
            for nothing.
        estimated: its first argument.
    """
    model, variables, prior, prior_params, _ = public
    images = np.asarray(samples(prior, prior_params, key, num, labels=label)).clip(0.0, 1.0)
    held = _held(model, num, simulate is None)
    of = _gradients(model, held, simulate)
    prepared = _prepared(model, variables)
    # As bits: NumPy copies types that it does not know entry by entry.
    bits = [[np.empty((num, *shape), np.uint16) for shape in one.shapes] for one in held]
    norms = np.zeros((num, len(jax.tree.leaves(variables["params"]))), np.float32)
    at_once = _at_once()
    labels = np.full((at_once, 1), label, np.int32)
    tell = progress or (lambda share: None)

    def keep(chosen, found):
        for all_of, some in zip(jax.tree.leaves(bits), jax.tree.leaves(found[0]), strict=True):
            all_of[chosen] = np.asarray(some).view(np.uint16)
        for leaf, own in found[1].items():
            norms[chosen, leaf] = own
        tell(_SAMPLING * (chosen[-1] + 1) / num)

    pending = None  # what is computed while the samples before it are copied
    for first in range(0, num, at_once):
        chosen = np.arange(first, first + at_once).clip(max=num - 1)
        found = of(variables, prepared, images[chosen], labels, estimated)
        if pending is not None:
            keep(*pending)
        pending = chosen, found
    assert pending is not None
    keep(*pending)
    arrays = [[x.view(ml_dtypes.bfloat16) for x in one] for one in bits]
    images = images.reshape(num, -1)
    if once:
        return Bank(images, held, arrays, None, norms)
    kernels = []
    for one, own in zip(held, arrays, strict=True):
        kernels.append(_kernel(one, own))
        tell(_SAMPLING + (1 - _SAMPLING) * len(kernels) / len(held))
    return Bank(images, held, arrays, kernels, norms)


#: Share of a bank's time that the samples' gradients take; the rest are their products.
_SAMPLING = 0.8


@functools.lru_cache(maxsize=8)
def _trace(model: Model) -> Program:
    image = jax.ShapeDtypeStruct((1, *model.image_shape), np.float32)
    return trace(model, variable_shapes(model), image)


def _held(model: Model, num: int, plain: bool) -> tuple[Held, ...]:
    """The tensors whose gradients fit into memory; ``plain``: no defense has to see them formed."""
    layer_of = {site.leaf: site.layer for site in _trace(model).sites if plain}
    every = []
    for leaf, like in enumerate(jax.tree.leaves(variable_shapes(model)["params"])):
        one = Held(leaf, math.prod(like.shape))
        layer = layer_of.get(leaf)
        if layer is not None and layer.groups == 1:
            apart = one._replace(layer=layer)
            one = min(one, apart, key=_entries)
        every.append(one)
    held, left = [], BANK_BYTES / (2 * num)
    for one in sorted(every, key=_entries):
        if _entries(one) <= left:
            held.append(one)
            left -= _entries(one)
    return tuple(sorted(held))


def _entries(one: Held) -> int:
    return sum(map(math.prod, one.shapes))


def _at_once() -> int:
    """Samples whose gradients are computed in one program."""
    return 8 if jax.default_backend() == "cpu" else 32


@functools.partial(jax.jit, static_argnums=0)
def _prepared(model, variables):
    return fused.prepare_convolutions(_trace(model), variables)


@functools.lru_cache(maxsize=8)
def _gradients(model: Model, held: tuple[Held, ...], simulate: Callable | None) -> Callable:
    how = {one.leaf: one for one in held}

    @jax.jit
    def of(variables, prepared, images, labels, estimated):
        """What is held [n ...], and other tensors' squared norms [n], of images [n h w c]."""
        program = _trace(model)
        arrays = fused.passes(program, variables, prepared, images[:, None], labels)
        layer_of = {site.leaf: site.layer for site in program.sites}
        gradients: list = [None] * len(arrays)
        for leaf, own in enumerate(arrays):
            layer, one = layer_of.get(leaf), how.get(leaf)
            if layer is None:
                gradients[leaf] = own[0]
            elif simulate is not None or (one is not None and one.layer is None):
                formed = layers.form(layer, *own)
                gradients[leaf] = layers.kernel_as_stored(layer, formed)
        if simulate is not None:
            treedef: Any = jax.tree.structure(variables["params"])
            through = jax.vmap(functools.partial(simulate, estimated))
            gradients = jax.tree.leaves(through(treedef.unflatten(gradients)))

        def sq_norms(leaf):
            if gradients[leaf] is None:
                return layers.sq_norm(layer_of[leaf], *arrays[leaf])
            return jnp.sum(gradients[leaf] ** 2, axis=range(1, gradients[leaf].ndim))

        found = []
        for one in held:
            own = arrays[one.leaf] if one.layer else [gradients[one.leaf].reshape(len(images), -1)]
            found.append([x.astype(jnp.bfloat16) for x in own])
        return found, {leaf: sq_norms(leaf) for leaf in range(len(arrays)) if leaf not in how}

    return of


# --- products of gradients ------------------------------------------------------------------------

#: Columns of gradients that are multiplied at once: few shapes for tensors of all sizes.
_WIDTHS = (2**9, 2**12, 2**15)
#: Entries of a kernel that stand for all where no noise has to be averaged out.
_ENOUGH = 2**13
#: Samples whose products with all others are computed at once, by Gram matrices.
_ROWS = 16


def products(
    bank: Bank, place: int, y: np.ndarray, mask: np.ndarray | None, *, thin: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Products of the samples' gradients of one tensor, masked, with each other and with ``y``.

    Args:
        bank: of ``n`` samples.
        place: the tensor's among those that are held.
        y: like the tensor, masked.
        mask: like the tensor, or a number; None for 1.
        thin: whether some input channels of a large kernel may stand for all, where it is masked
            or its products are not known.

    Returns:
        [n n] and [n], float32.
    """
    one, arrays = bank.held[place], bank.arrays[place]
    known = None if bank.kernels is None else bank.kernels[place]
    whole = mask is None or mask.size == 1
    if whole and not (thin and known is None):
        by = 1.0 if mask is None else float(mask)
        if one.layer is None:
            inner = _product(arrays[0], y.reshape(1, -1))[:, 0]
        else:
            inner = np.asarray(_inner(one.layer, *arrays, y))
        return by**2 * (_kernel(one, arrays) if known is None else known), by * inner
    num, seen = len(arrays[0]), 0
    kernel, inner = np.zeros((num, num), np.float32), np.zeros(num, np.float32)
    mask = np.broadcast_to(np.float32(1) if mask is None else mask, y.shape).astype(np.float32)
    for g, own, part in zip(_formed(one, arrays), _parts(one, y), _parts(one, mask), strict=True):
        where = np.flatnonzero(part)
        if where.size:
            g = np.asarray(g[:, where], np.float32) * part[where]
            kernel += _product(g, g)
            inner += _product(g, own[None, where])[:, 0]
            seen += where.size
        if thin and seen >= _ENOUGH:
            break
    share = np.float32(np.count_nonzero(mask) / max(seen, 1))
    return share * kernel, share * inner


def _kernel(one: Held, arrays: list[np.ndarray]) -> np.ndarray:
    """<g_i, g_j>, [n n]."""
    num = len(arrays[0])
    if one.layer is None or layers.pair_work(one.layer) > one.size:
        return sum((_product(g, g) for g in _formed(one, arrays)), np.zeros((), np.float32))
    found = np.empty((num, num), np.float32)
    for first in range(0, num, _ROWS):
        chosen = np.arange(first, first + _ROWS).clip(max=num - 1)
        found[chosen] = _pairs(one.layer, *(x[chosen] for x in arrays), *arrays)
    return found


def _channels(layer: Layer) -> int:
    """Input channels whose gradients are formed at once, all samples together."""
    return min(layer.in_channels, max(1, _WIDTHS[-1] // (layer.offsets * layer.out_channels)))


def _starts(layer: Layer) -> range:
    return range(0, layer.in_channels, _channels(layer))


def _formed(one: Held, arrays: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The samples' gradients [n w] in parts, in the order of :func:`_parts`."""
    if one.layer is None:
        yield arrays[0]
        return
    layer, (a, d) = one.layer._replace(in_channels=_channels(one.layer)), arrays
    for first in _starts(one.layer):
        part = a[..., first : first + layer.in_channels]
        part = np.pad(part, [(0, 0)] * (a.ndim - 1) + [(0, layer.in_channels - part.shape[-1])])
        yield np.asarray(_form(layer, part, d))


def _parts(one: Held, x: np.ndarray) -> Iterator[np.ndarray]:
    """An array like the tensor in the parts of :func:`_formed`, [w] each."""
    if one.layer is None:
        yield x.ravel()
        return
    width = _channels(one.layer)
    x = np.asarray(layers.kernel_in_order(one.layer, jnp.asarray(x)))
    for first in _starts(one.layer):
        part = x[..., first : first + width, :]
        missing = width - part.shape[-2]
        yield np.pad(part, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)]).ravel()


@functools.partial(jax.jit, static_argnums=0)
def _form(layer, a, d):
    return layers.form(layer, *map(_wide, (a, d))).reshape(len(a), -1)


@functools.partial(jax.jit, static_argnums=0)
def _pairs(layer, a, d, b, e):
    return layers.pairs(layer, *map(_wide, (a, d, b, e)))


@functools.partial(jax.jit, static_argnums=0)
def _inner(layer, a, d, y):
    return layers.inner_product(layer, _wide(a), _wide(d), layers.kernel_in_order(layer, y))


def _wide(x):
    return x.astype(jnp.float32)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left [n p] times right^T [p m], in float32, without a program for each p."""
    total = np.zeros((len(left), len(right)), np.float32)
    width = next((w for w in _WIDTHS if left.shape[1] <= w), _WIDTHS[-1])
    for start in range(0, left.shape[1], width):
        parts = [x[:, start : start + width] for x in (left, right)]
        if missing := width - parts[0].shape[1]:
            parts = [np.pad(x, ((0, 0), (0, missing))) for x in parts]
        total += np.asarray(_multiplied(*parts))
    return total


@jax.jit
def _multiplied(left, right):
    return _wide(left) @ _wide(right).T


# --- banks that are there already -----------------------------------------------------------------

#: Banks of this process, the latest last; a bank takes up to :data:`BANK_BYTES` and its kernels.
_BANKS: dict[tuple, tuple[Public, Bank]] = {}
_MOST_BANKS = 2


def bank_of(
    public: Public, label: int, num: int, progress: Callable[[float], None] | None = None
) -> Bank:
    """The bank of a model and label; the same one for every update, and for other processes, too,
    where :mod:`ggl_jax.cache` keeps it.
    """
    parts = (public.variables, public.prior_params)
    name = (public.model, public.prior, *map(id, parts), label, num)
    if name not in _BANKS:
        while len(_BANKS) >= _MOST_BANKS:
            del _BANKS[next(iter(_BANKS))]
        content, bank = _content(public, label, num), None
        if content is not None:
            bank = cache.load(content, _shapes(public, num))
        if bank is None:
            bank = make_bank(public, label, num, jax.random.key(num), progress)
            if content is not None:
                cache.keep(content, bank._replace(held=()))
        # What is public stays alive beside it, so that no other gets its identity.
        _BANKS[name] = public, bank._replace(held=_held(public.model, num, True))
    return _BANKS[name][1]


def _content(public: Public, label: int, num: int) -> str | None:
    """A digest of all that a bank depends on; None where nothing is kept, or nothing can tell."""
    if cache.folder() is None:
        return None
    model, variables, prior, prior_params, _ = public
    draw = functools.partial(samples, prior, num=num, labels=label)
    programs = [_gradient_of(model), program(draw, prior_params, jax.random.key(num))[:2]]
    if any(calls_back(text) for text, _ in programs):
        return None
    device = machine.cpu_name(), jax.devices()[0].device_kind
    made_by = [jax.__version__, machine.settings(), device, _sources()]
    return digest(programs, variables, prior_params, label, num, made_by)


@functools.lru_cache(maxsize=8)
def _gradient_of(model: Model) -> tuple[str, list[Any]]:
    """The program of a client's gradient: by it and by our code, the bank's, which is longer."""
    shape, label = jax.ShapeDtypeStruct((1, *model.image_shape), np.float32), np.zeros(1, np.int32)
    return program(functools.partial(gradient, model), variable_shapes(model), shape, label)[:2]


@functools.cache
def _sources() -> str:
    """A digest of this package's code."""
    home = Path(__file__).parents[1]
    return digest(*[path.read_bytes() for path in sorted(home.rglob("*.py"))])


def _shapes(public: Public, num: int) -> Bank:
    """A bank's shapes and types, without the tensors'."""
    held = _held(public.model, num, True)

    def array(*shape, dtype=np.float32):
        return jax.ShapeDtypeStruct((num, *shape), dtype)

    return Bank(
        images=array(math.prod(public.model.image_shape)),
        held=(),
        arrays=[[array(*s, dtype=ml_dtypes.bfloat16) for s in one.shapes] for one in held],
        kernels=[array(num) for _ in held],
        sq_norms=array(len(jax.tree.leaves(public.variables["params"]))),
    )
