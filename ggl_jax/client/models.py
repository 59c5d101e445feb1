"""The federated-learning models whose gradients are audited, and the way in for your own.

Every model is a :class:`ggl_jax.types.Model`: two pure functions and a description. The built-in
ones are Flax Linen modules (:mod:`ggl_jax.client.networks`) that return logits; :func:`from_flax`
turns them, and any module of yours, into a ``Model`` by reading the input of the last Dense layer
while the module runs.

Images enter as float32 NHWC in [0, 1] and are mapped to [-1, 1] inside ``Model.apply``.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ggl_jax import grammar
from ggl_jax.client.bottleneck import precode
from ggl_jax.client.gradients import loss_named
from ggl_jax.client.networks import MLP, ConvNet, LeNet, ResNet18, ViT
from ggl_jax.errors import GGLError, check_known
from ggl_jax.gate.arguments import as_image_shape, check_classes
from ggl_jax.gate.models import check_features, check_logits, one_logit
from ggl_jax.gate.trying import shapes
from ggl_jax.grammar import at_least
from ggl_jax.images import to_signed
from ggl_jax.types import Model, Path, PyTree

# --------------------------------------------------------------------------------------------------
# From a Linen module to a Model
# --------------------------------------------------------------------------------------------------

#: Variable collection in which a layer's input and output are handed out. Sowing into a collection
#: (instead of keeping a tracer aside) stays correct under nn.remat and nn.jit.
_TAPS = "ggl_jax_taps"

#: Arguments of ``Module.apply`` that ``Module.init`` does not take or must not see.
_APPLY_ONLY = ("mutable", "rngs", "capture_intermediates")

#: Primitives that hand a value on unchanged, but for its type.
_TRANSPARENT = ("convert_element_type", "copy", "copy_p")


def _tap(select: Callable) -> Callable:
    """Interceptor that sows the input and output of every layer that ``select`` picks."""

    def interceptor(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if context.method_name == "__call__" and select(context.module):
            inputs = args[0] if args else next(iter(kwargs.values()))
            context.module.sow(_TAPS, "input", inputs)
            context.module.sow(_TAPS, "output", out)
        return out

    return interceptor


def _run(module, select, apply_kwargs, variables, x):
    """Run ``module`` on x; return its logits and the tree of tapped inputs and outputs."""
    kwargs = dict(apply_kwargs)
    mutable = kwargs.pop("mutable", False)
    if isinstance(mutable, str):
        mutable = [mutable]
    elif mutable is True:
        mutable = list(variables)
    kwargs["mutable"] = [*(mutable or ()), _TAPS]
    with nn.intercept_methods(_tap(select)):
        # Updated running statistics, if any, are dropped: one step's gradient does not need them.
        out, updated = module.apply(variables, x, **kwargs)
    logits = out[0] if isinstance(out, tuple | list) else out
    return logits, updated.get(_TAPS, {})


def _at(tree: Mapping, path: Path) -> Any:
    """The subtree at ``path``, or None."""
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def _dense_paths(taps: Mapping, prefix: Path = ()) -> list[Path]:
    """Paths of all tapped layers."""
    if isinstance(taps.get("output"), tuple):
        return [prefix]
    return [
        path
        for name, sub in taps.items()
        if isinstance(sub, Mapping)
        for path in _dense_paths(sub, (*prefix, name))
    ]


def _find_head(module, apply_kwargs, variables, x) -> Path:
    """Path of the Dense layer whose output is the logits, by following the traced program back."""

    def traced(variables, x):
        return _run(module, lambda m: isinstance(m, nn.Dense), apply_kwargs, variables, x)

    program, shapes = jax.make_jaxpr(traced, return_shape=True)(variables, x)
    jaxpr = program.jaxpr
    taps = shapes[1]
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(shapes)[0]]
    source = {eqn.outvars[0]: eqn for eqn in jaxpr.eqns}
    origin = jaxpr.outvars[0]
    while True:
        # Compared by identity: a literal among the outputs cannot be hashed.
        for path, var in zip(paths[1:], jaxpr.outvars[1:], strict=True):
            names = tuple(entry.key for entry in path[1:] if hasattr(entry, "key"))
            if var is origin and names[-1] == "output":
                return names[:-1]
        eqn = None if hasattr(origin, "val") else source.get(origin)
        if eqn is None or eqn.primitive.name not in _TRANSPARENT:
            break
        origin = eqn.invars[0]

    seen = _dense_paths(taps)
    layers = ", ".join(repr(path) for path in seen) if seen else "none"
    raise GGLError(
        f"from_flax: the logits of {type(module).__name__} are not the output of an nn.Dense layer "
        f"(Dense layers seen: {layers}); name the last layer by its parameter path, "
        f"e.g. head=('Dense_0',)"
    )


def _init(module, preprocess, image_shape, init_kwargs, key):
    dummy = preprocess(jnp.zeros((1, *image_shape)))
    return module.init(key, dummy, **dict(init_kwargs))


_compiled_init = jax.jit(_init, static_argnums=(0, 1, 2, 3))


def _init_fn(module, preprocess, image_shape, init_kwargs) -> Callable[[jax.Array], PyTree]:
    # Compiled, because only then is the forward pass on the dummy image dropped as dead code; with
    # the module as a static argument, because compiling a ResNet's initialisers takes seconds and
    # equal modules (in a process that builds many models) then share the result.
    static = (module, preprocess, image_shape, tuple(init_kwargs.items()))
    try:
        hash(static)
    except TypeError:  # a module or option that holds an array
        return jax.jit(functools.partial(_init, *static))
    return functools.partial(_compiled_init, *static)


def from_flax(
    module: nn.Module,
    image_shape: Sequence[int],
    num_classes: int | None = None,
    head: Sequence[str] | None = None,
    *,
    preprocess: Callable = to_signed,
    apply_kwargs: Mapping[str, Any] | None = None,
    loss: str | Callable | None = None,
    name: str | None = None,
) -> Model:
    """Make a :class:`~ggl_jax.types.Model` of your own Flax Linen module.

    The module is traced once, with shapes only, to find its last Dense layer: the ``nn.Dense``
    whose output the module returns as logits (a cast of the type in between is allowed). Its input
    becomes ``features`` and its parameter path ``head``.

    Args:
        module: maps images [b h w c] to logits [b k]; where it returns a tuple or list, the
            first entry is taken as the logits.
        image_shape: ``(h, w, c)``.
        num_classes: ``k``; read off the module when None, else checked against it.
        head: parameter path of the last layer, e.g. ``("classifier", "Dense_1")``, for modules
            where it cannot be found (the logits are scaled or masked after it, or it is not an
            ``nn.Dense``). The layer must be called with an input [b d] and own a ``kernel``
            [d k].
        preprocess: maps public images in [0, 1] to what the module expects; the default gives
            [-1, 1].
        apply_kwargs: passed on to ``module.apply``, e.g. ``{"train": False}``. A module that
            normalises with batch statistics needs
            ``{"train": True, "mutable": ["batch_stats"]}``; the updated statistics are dropped.
            All but ``mutable``, ``rngs`` and ``capture_intermediates`` also go to
            ``module.init``.
        loss: what it is trained with: a name in :data:`ggl_jax.LOSSES` or ``loss(logits, labels)``,
            see :class:`ggl_jax.types.Model`; None for softmax cross-entropy. With another one
            ``num_classes`` is by default the number of outputs, and at least 2.
        name: shown in results; the class name in lower case when None.

    Returns:
        A ``Model``. ``init(key)`` computes the parameters only, not the network's output.
        ``apply`` works under ``jit``, ``vmap``, ``grad`` and an outer ``nn.intercept_methods``,
        and raises GGLError for images of another shape or of an integer type.

    Raises:
        GGLError: the last Dense layer cannot be found, ``head`` names no such layer, the output
            is not [b k], or ``num_classes`` differs from it.

    Edge cases: a layer called several times counts with its last call. A head inside
    ``nn.scan`` or ``nn.vmap`` cannot be read.

    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.Dense(10)(x.reshape(x.shape[0], -1))
    >>> model = from_flax(Net(), (8, 8, 3))
    >>> model.head, model.num_classes
    (('Dense_0',), 10)
    """
    image_shape = as_image_shape("image_shape", image_shape)
    if not isinstance(module, nn.Module):
        raise GGLError(
            f"from_flax: module is {type(module).__name__}, not a flax.linen.Module instance; "
            f"pass e.g. MyNet(num_classes=10)"
        )
    loss = loss_named(loss)
    kwargs = dict(apply_kwargs or {})
    init_kwargs = {key: value for key, value in kwargs.items() if key not in _APPLY_ONLY}
    title = type(module).__name__

    init = _init_fn(module, preprocess, image_shape, init_kwargs)
    what = f"from_flax: {title}"
    variables = shapes(f"{what}.init", init, jax.random.key(0))
    # Two images, so that a batch axis cannot be mistaken for any other of size one.
    dummy_images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    dummy = shapes("from_flax: preprocess", preprocess, dummy_images)
    run_alone = functools.partial(_run, module, _nothing, kwargs)
    shapes(f"{what}.apply", run_alone, variables, dummy)
    path = _find_head(module, kwargs, variables, dummy) if head is None else tuple(head)
    is_head = functools.partial(_has_path, path)

    def run(variables, x):
        logits, taps = _run(module, is_head, kwargs, variables, x)
        inputs = (_at(taps, path) or {}).get("input", (None,))[-1]
        return logits, inputs

    params = _at(variables["params"], path)
    kernel = params.get("kernel") if isinstance(params, Mapping) else None
    logits, features = jax.eval_shape(run, variables, dummy)
    if kernel is None or features is None:
        raise GGLError(
            f"from_flax: head={path!r} is not a layer of {title} that owns a 'kernel' and is "
            f"called once per forward pass; parameters at the top are "
            f"{sorted(variables['params'])}"
        )
    check_logits(what, logits)
    num_logits = logits.shape[1]
    num_classes = count_classes("from_flax", title, num_logits, num_classes, loss)
    check_features(what, features, kernel, num_logits, path)

    def apply(variables: PyTree, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        check_images(images, image_shape, title)
        return run(variables, preprocess(images))

    def statistics(variables: PyTree, images: jax.Array) -> PyTree:
        is_norm = functools.partial(_is_instance, nn.BatchNorm)
        return _moments(_run(module, is_norm, kwargs, variables, preprocess(images))[1])

    return Model(
        init=init,
        apply=apply,
        head=path,
        image_shape=image_shape,
        num_classes=num_classes,
        name=name or title.lower(),
        statistics=statistics if jax.eval_shape(statistics, variables, dummy_images) else None,
        loss=loss,
    )


def count_classes(
    what: str, title: str, num_logits: int, given: int | None, loss: Callable | None
) -> int:
    """The number of classes of a model with so many outputs, if it is not given otherwise."""
    if loss is None and num_logits == 1:
        raise GGLError(one_logit(f"{what}: {title}"))
    if loss is None and given not in (None, num_logits):
        raise GGLError(
            f"{what}: num_classes={given}, but {title} returns {num_logits} logits; leave "
            "num_classes out or mend the module"
        )
    return max(2, num_logits) if given is None else given


def check_images(images: jax.Array, image_shape: tuple[int, int, int], title: str) -> None:
    if images.ndim != 4 or tuple(images.shape[1:]) != image_shape:
        raise GGLError(
            f"images have shape {tuple(images.shape)}, but {title} takes "
            f"[b {_dims(image_shape)}]; resize them or build the model with their image_shape"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise GGLError(
            f"images have dtype {images.dtype}; give floats in [0, 1], "
            f"e.g. images.astype('float32') / 255"
        )


def _nothing(module: nn.Module) -> bool:
    return False


def _has_path(path: Path, module: nn.Module) -> bool:
    return module.path == path


def _is_instance(kind: type, module: nn.Module) -> bool:
    return isinstance(module, kind)


def _moments(taps: Mapping) -> PyTree:
    """Tapped inputs [b ... c] to each layer's mean and (population) variance over all but c."""
    if isinstance(taps.get("input"), tuple):
        x = taps["input"][-1]
        axes = tuple(range(x.ndim - 1))
        return {"mean": jnp.mean(x, axes), "var": jnp.var(x, axes)}
    return {name: _moments(sub) for name, sub in taps.items() if isinstance(sub, Mapping)}


def _dims(shape: Sequence[int]) -> str:
    return " ".join(str(n) for n in shape)


# --------------------------------------------------------------------------------------------------
# Factories
# --------------------------------------------------------------------------------------------------


def _norm_kind(norm: str, batch_norm: str) -> tuple[str, dict[str, Any]]:
    """The kind of normalisation of :mod:`networks`' modules, and what a module of it needs."""
    check_known("norm", norm, ("batch", "group", "layer"))
    check_known("batch_norm", batch_norm, ("eval", "train"))
    if norm == "batch":
        return batch_norm, {"mutable": ["batch_stats"]} if batch_norm == "train" else {}
    if batch_norm != "eval":
        raise GGLError(f"batch_norm={batch_norm!r}: norm={norm!r} has no batches; leave one out")
    return norm, {}


def resnet18(
    num_classes: int = 2,
    image_shape: Sequence[int] = (32, 32, 3),
    *,
    batch_norm: str = "eval",
    norm: str = "batch",
    stem: str | None = None,
    weight_init: str = "torchvision",
) -> Model:
    """ResNet-18, the federated model of the paper's experiments.

    Args:
        num_classes: at least 2. The paper: 2 (CelebA gender), 1000 (ImageNet).
        image_shape: ``(h, w, c)``. The paper: (32, 32, 3) and (224, 224, 3).
        batch_norm: ``"eval"``: running statistics, mean 0 and variance 1 after ``init``, as in
            the published code. ``"train"``: statistics of the batch whose gradient is taken; the
            update of the running statistics is dropped. With one image they are taken over its
            positions only.
        norm: ``"batch"``; or, in place of every BatchNorm and then without ``batch_norm``,
            ``"group"``: GroupNorm of 8 groups; or ``"layer"``: over positions and channels, that is
            one group. Neither has statistics, so images never mix.
        stem: ``"cifar"`` (3x3, no max-pooling) or ``"imagenet"`` (7x7/2 and max-pooling); None
            takes ``"cifar"`` for images of up to 64 pixels a side, else ``"imagenet"``.
        weight_init: ``"torchvision"`` or ``"torch"``, see :class:`ResNet18`. With ``"torch"``
            and eval-mode BatchNorm the signal dies out with depth: at 32x32 the whole gradient
            has norm 1.0 (14 with ``"torchvision"``), no tensor reaches the paper's clipping bound
            of 4, and noise of 0.1 drowns everything.

    Returns:
        A ``Model`` with 512 features and ``head=("fc",)``; 11,169,858 parameters in 62 tensors
        at the defaults.

    Raises:
        GGLError: an argument is outside its range.

    Reference: He et al., "Deep Residual Learning for Image Recognition"; torchvision's
    ``resnet18`` and, for the CIFAR stem, the widely used ``ResNet18`` for 32x32 images. Wu & He
    2018, "Group Normalization".
    """
    image_shape = as_image_shape("image_shape", image_shape)
    check_classes("num_classes", num_classes)
    if stem is None:
        stem = "cifar" if max(image_shape[:2]) <= 64 else "imagenet"
    check_known("stem", stem, ("cifar", "imagenet"))
    check_known("weight_init", weight_init, ("torch", "torchvision"))
    kind, apply_kwargs = _norm_kind(norm, batch_norm)
    module = ResNet18(num_classes, stem, kind, weight_init)
    return from_flax(
        module, image_shape, num_classes, ("fc",), apply_kwargs=apply_kwargs, name="resnet18"
    )


def lenet(num_classes: int = 2, image_shape: Sequence[int] = (32, 32, 3)) -> Model:
    """The sigmoid LeNet of DLG, see :class:`LeNet`.

    Args:
        num_classes: at least 2.
        image_shape: ``(h, w, c)``.

    Returns:
        A ``Model`` with 768 features at 32x32 and ``head=("fc",)``.

    Raises:
        GGLError: an argument is outside its range.
    """
    check_classes("num_classes", num_classes)
    return from_flax(LeNet(num_classes), image_shape, num_classes, ("fc",), name="lenet")


def convnet(
    num_classes: int = 2,
    image_shape: Sequence[int] = (32, 32, 3),
    *,
    width: int = 16,
    batch_norm: str = "eval",
    norm: str = "batch",
) -> Model:
    """A small convolution - normalisation - ReLU network, see :class:`ConvNet`.

    Args:
        num_classes: at least 2.
        image_shape: ``(h, w, c)``, at least 4 pixels a side.
        width: channels of the first convolution, at least 1.
        batch_norm: ``"eval"`` or ``"train"``, as in :func:`resnet18`.
        norm: ``"batch"``, ``"group"`` or ``"layer"``, as there.

    Returns:
        A ``Model`` with 4,096 features at the defaults and ``head=("fc",)``.

    Raises:
        GGLError: an argument is outside its range.
    """
    image_shape = as_image_shape("image_shape", image_shape)
    if min(image_shape[:2]) < 4:
        raise GGLError(f"image_shape={image_shape!r}: convnet needs at least 4 pixels a side")
    check_classes("num_classes", num_classes)
    at_least(1, width=width)
    kind, apply_kwargs = _norm_kind(norm, batch_norm)
    module = ConvNet(num_classes, width, kind)
    model = from_flax(
        module, image_shape, num_classes, ("fc",), apply_kwargs=apply_kwargs, name="convnet"
    )
    # Backwards: the largest of its pool, 3 pooled pixels, so 6, 8 and 10. Other norms mix them all.
    return model._replace(reach=10 if kind == "eval" else None)


def mlp(
    num_classes: int = 2,
    image_shape: Sequence[int] = (32, 32, 3),
    *,
    width: int = 256,
    depth: int = 2,
) -> Model:
    """Dense layers and ReLUs on the flattened image, see :class:`MLP`.

    Args:
        num_classes: at least 2.
        image_shape: ``(h, w, c)``.
        width: units of each hidden layer, at least 1.
        depth: hidden layers, at least 1.

    Returns:
        A ``Model`` with ``width`` features and ``head=("fc",)``.

    Raises:
        GGLError: an argument is outside its range.
    """
    check_classes("num_classes", num_classes)
    at_least(1, width=width, depth=depth)
    return from_flax(MLP(num_classes, width, depth), image_shape, num_classes, ("fc",), name="mlp")


def vit(
    num_classes: int = 2,
    image_shape: Sequence[int] = (32, 32, 3),
    *,
    patch: int = 4,
    width: int = 96,
    depth: int = 4,
    heads: int = 3,
) -> Model:
    """A small Vision Transformer with LayerNorm, see :class:`ViT`.

    Args:
        num_classes: at least 2.
        image_shape: ``(h, w, c)``; sides are multiples of ``patch``.
        patch: pixels of a patch's side, at least 1.
        width: entries of a token, a multiple of ``heads``.
        depth: blocks, at least 1.
        heads: of each block's attention, at least 1.

    Returns:
        A ``Model`` with ``width`` features and ``head=("fc",)``; 458,594 parameters in 55 tensors
        at the defaults.

    Raises:
        GGLError: an argument is outside its range.
    """
    image_shape = as_image_shape("image_shape", image_shape)
    check_classes("num_classes", num_classes)
    at_least(1, patch=patch, width=width, depth=depth, heads=heads)
    if image_shape[0] % patch or image_shape[1] % patch:
        raise GGLError(
            f"patch={patch!r}: does not divide images of {_dims(image_shape[:2])} pixels; choose a "
            "divisor of both sides"
        )
    if width % heads:
        raise GGLError(f"heads={heads!r}: does not divide width={width}; choose a divisor of it")
    module = ViT(num_classes, patch, width, depth, heads)
    return from_flax(module, image_shape, num_classes, ("fc",), name="vit")


#: The built-in models by name: ``MODELS[name](num_classes, image_shape, **options) -> Model``.
MODELS: dict[str, Callable[..., Model]] = grammar.named(resnet18, lenet, convnet, mlp, vit, precode)


def get_model(text: str, num_classes: int = 2, image_shape: Sequence[int] = (32, 32, 3)) -> Model:
    """A built-in model by its name in :data:`MODELS`, with options (:mod:`ggl_jax.grammar`).

    Args:
        text: e.g. ``"resnet18:batch_norm=train"`` or ``"convnet:width=32"``.
        num_classes: at least 1.
        image_shape: (h, w, c).

    Raises:
        GGLError: an unknown name or option; the message lists those there are.
    """
    sizes = {"num_classes": num_classes, "image_shape": tuple(image_shape)}
    return grammar.build(MODELS, text, what="model", **sizes)
