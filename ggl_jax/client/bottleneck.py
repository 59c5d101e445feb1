"""PRECODE's model: another one with a variational bottleneck before its last layer."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ggl_jax import trees
from ggl_jax.errors import GGLError, about
from ggl_jax.grammar import at_least
from ggl_jax.spec import check
from ggl_jax.types import Model, PyTree

#: Name of the bottleneck among the parameters, and of the collection with its noise.
NAME = "bottleneck"


def precode(
    num_classes: int = 2,
    image_shape: Sequence[int] = (32, 32, 3),
    *,
    base: str = "resnet18",
    size: int = 256,
) -> Model:
    """A model with a variational bottleneck between its features and its last layer.

    The features r [d] become ``(m, s) = r E + e`` and ``z = m + softplus(s) n`` [size], and
    ``z D + c`` [d] enters the last layer. n is standard normal noise for each image that the client
    draws under the defense ``precode``. ``Model.apply`` draws nothing: it takes n from the
    variables (``["bottleneck"]["noise"]``, [1 size] or [b size]), where it is 0, so the logits are
    those at the bottleneck's mean.

    Args:
        num_classes: as of the base model.
        image_shape: (h, w, c).
        base: a built-in model, as in ``precode:convnet``; with options, which are joined by ``/``
            in place of ``:`` and ``,``: ``precode:base=convnet/width=8/norm=group,size=64``.
        size: entries of the bottleneck; the paper has 256.

    Raises:
        GGLError: an unknown base model or option.

    The loss is the base model's alone. The released code adds 0.001 times the Kullback-Leibler
    divergence of (m, softplus(s)) from a standard normal law.

    Reference: Scheliga, Mäder and Seeland 2022 (WACV), "PRECODE - A Generic Model Extension to
    Prevent Deep Gradient Leakage"; initialisation as torch's Linear.
    """
    from ggl_jax.client.models import get_model  # which has this model in its registry

    at_least(1, size=size)
    base = check("base", base, str)
    with about("base"):
        own = get_model(base.replace("/", ":", 1).replace("/", ","), num_classes, image_shape)
    return with_bottleneck(own, size)


def with_bottleneck(base: Model, size: int) -> Model:
    """The model with a bottleneck of that size; see :func:`precode`."""

    def init(key):
        variables = base.init(key)
        width = trees.head_parts(variables["params"], base.head)[0].shape[0]
        keys = jax.random.split(jax.random.fold_in(key, 1), 4)
        layers = {
            "encoder": _dense(keys[:2], width, 2 * size),
            "decoder": _dense(keys[2:], size, width),
        }
        params = {**variables["params"], NAME: layers}
        return {**variables, "params": params, NAME: {"noise": jnp.zeros((1, size))}}

    def plain(variables):
        own = {name: value for name, value in variables.items() if name != NAME}
        params = {name: value for name, value in own["params"].items() if name != NAME}
        return {**own, "params": params}

    def apply(variables, images):
        _, features = base.apply(plain(variables), images)
        encoder, decoder = (variables["params"][NAME][part] for part in ("encoder", "decoder"))
        law = features @ encoder["kernel"] + encoder["bias"]
        drawn = law[:, :size] + jax.nn.softplus(law[:, size:]) * variables[NAME]["noise"]
        decoded = drawn @ decoder["kernel"] + decoder["bias"]
        kernel, bias = trees.head_parts(variables["params"], base.head)
        logits = decoded @ kernel
        return (logits if bias is None else logits + bias), decoded

    statistics = base.statistics
    return base._replace(
        init=init,
        apply=apply,
        name="precode",
        statistics=None if statistics is None else lambda v, x: statistics(plain(v), x),
        reach=None,
    )


def _dense(keys: jax.Array, rows: int, columns: int) -> dict[str, jax.Array]:
    reach = rows**-0.5
    return {
        "kernel": jax.random.uniform(keys[0], (rows, columns), minval=-reach, maxval=reach),
        "bias": jax.random.uniform(keys[1], (columns,), minval=-reach, maxval=reach),
    }


def size_of(variables: PyTree) -> int:
    """Entries of the bottleneck.

    Raises:
        GGLError: the model has none.
    """
    if NAME not in variables:
        raise GGLError(
            "precode: the model has no bottleneck in which noise could be drawn; give it one, such "
            "as --model precode:resnet18"
        )
    return variables[NAME]["noise"].shape[-1]


def with_noise(variables: PyTree, noise: jax.Array) -> PyTree:
    """The variables with another noise [1 size] or [b size] in the bottleneck."""
    return {**variables, NAME: {"noise": noise}}
