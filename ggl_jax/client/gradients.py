"""What a client shares before any defense: one gradient, or the sum of several local steps.

Pure functions, differentiable with respect to the images and to soft labels, so that the
adversary simulates a candidate's update with the very function that the client ran.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax import grammar
from ggl_jax.client.local import local_optimizer
from ggl_jax.errors import GGLError
from ggl_jax.grammar import at_least
from ggl_jax.spec import Client
from ggl_jax.types import Model, PyTree


def _is_traced(x) -> bool:
    return isinstance(x, jax.core.Tracer)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy over the batch, in nats.

    Args:
        logits: [b k], real numbers.
        labels: class indices, integers [b] in 0 to k - 1; or soft labels, floats [b k], each row
            a distribution (not checked: DLG optimises them; a row that does not sum to one
            weighs its image by its sum).

    Returns:
        Scalar.

    Raises:
        GGLError: the shapes or types do not fit, or an index outside a compiled program is out of
            range. Inside a compiled program an index out of range gives NaN.
    """
    labels = jnp.asarray(labels)
    if logits.ndim != 2:
        raise GGLError(f"logits have shape {tuple(logits.shape)}; they must be [b k]")
    num_images, num_classes = logits.shape
    log_probs = jax.nn.log_softmax(logits)

    if jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == (num_images,):
        if not _is_traced(labels):
            values = np.asarray(labels)
            if values.size and (values.min() < 0 or values.max() >= num_classes):
                raise GGLError(
                    f"labels {values.tolist()} go beyond 0 to {num_classes - 1}, the indices of "
                    f"the model's {num_classes} classes"
                )
        # A negative index would wrap around to the last classes; past the end it reads NaN.
        index = jnp.where(labels < 0, num_classes, labels)
        picked = jnp.take_along_axis(log_probs, index[:, None], axis=1, mode="fill")
        return -jnp.mean(picked)
    if jnp.issubdtype(labels.dtype, jnp.floating) and labels.shape == logits.shape:
        return -jnp.mean(jnp.sum(labels * log_probs, axis=1))
    raise GGLError(
        f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}; give integers "
        f"[{num_images}] or soft labels as floats [{num_images} {num_classes}]"
    )


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean binary cross-entropy of one logit for class 1, or of one for each class, in nats.

    Args:
        logits: [b 1], real numbers; or [b k], each class against all others (summed over them).
        labels: [b] class indices, 0 or 1 (or below k); or soft labels [b 2] (or [b k]).

    Returns:
        Scalar.

    Raises:
        GGLError: the shapes do not fit.
    """
    targets = _targets(logits, labels, 2)
    targets = targets[:, 1:] if logits.shape[1] == 1 else targets
    terms = jax.nn.softplus(logits) - targets * logits
    return jnp.mean(jnp.sum(terms, axis=1))


def mean_squared_error(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean squared error over the batch and the outputs.

    Args:
        logits: [b k] outputs, compared with the label's one-hot vector; or [b 1], compared with
            the label as a number.
        labels: [b] class indices, or soft labels [b k] (a single output is then compared with
            their mean).

    Returns:
        Scalar.

    Raises:
        GGLError: the shapes do not fit.
    """
    if logits.shape[1] > 1:
        return jnp.mean(jnp.square(logits - _targets(logits, labels, logits.shape[1])))
    labels = jnp.asarray(labels)
    if labels.ndim == 2:
        labels = labels @ jnp.arange(labels.shape[1], dtype=logits.dtype)
    return jnp.mean(jnp.square(logits[:, 0] - labels))


def _targets(logits: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """Labels as distributions [b c], c the outputs but at least ``num_classes``."""
    labels, num = jnp.asarray(labels), max(num_classes, logits.shape[1])
    if labels.ndim == 1 and jnp.issubdtype(labels.dtype, jnp.integer):
        labels = jax.nn.one_hot(labels, num, dtype=logits.dtype)
    if labels.shape != (logits.shape[0], num):
        raise GGLError(
            f"labels have shape {tuple(labels.shape)}; give integers [{logits.shape[0]}] or soft "
            f"labels as floats [{logits.shape[0]} {num}]"
        )
    return labels


#: Losses by name, ``loss(logits[b k], labels) -> scalar``.
LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = grammar.named(
    cross_entropy, binary_cross_entropy, mean_squared_error
)


def loss_named(loss: str | Callable | None) -> Callable | None:
    """A loss by its name in :data:`LOSSES`, or as it is; None for cross-entropy.

    Raises:
        GGLError: an unknown name, or no function.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise GGLError(
                f"loss={loss!r}: choose one of {', '.join(LOSSES)}, or give loss(logits, labels)"
            )
        loss = LOSSES[loss]
    elif loss is not None and not callable(loss):
        raise GGLError(f"loss={loss!r}: give a name or a function loss(logits, labels) -> scalar")
    return None if loss is cross_entropy else loss


def loss_of(model: Model) -> Callable:
    """What the model is trained with: ``loss(logits, labels) -> scalar``."""
    return model.loss or cross_entropy


def is_binary(model: Model, num_outputs: int) -> bool:
    """Whether the model has one logit for class 1 of two, a softmax over (0, logit)."""
    return model.loss is binary_cross_entropy and num_outputs == 1


def predicted(model: Model, logits: jax.Array) -> jax.Array:
    """The class [b] of logits [b k]: the largest; of one logit by its sign, or its value."""
    if logits.shape[1] > 1:
        return jnp.argmax(logits, axis=-1)
    return (logits[:, 0] > 0) if is_binary(model, 1) else jnp.round(logits[:, 0])


def gradient(model: Model, variables: PyTree, images: jax.Array, labels: jax.Array) -> PyTree:
    """The gradient of one training step, which federated SGD shares.

    Args:
        model: the federated model.
        variables: as given by ``model.init``.
        images: [b h w c] floats in [0, 1].
        labels: [b] class indices or [b k] soft labels, see :func:`cross_entropy`.

    Returns:
        Gradient of the batch's mean loss (:func:`loss_of`), a pytree like ``variables["params"]``.
        Differentiable with respect to ``images`` and soft ``labels``.

    Raises:
        GGLError: images or labels do not fit the model.

    Reference: paper, the gradient that the client shares before its defense.
    """

    def loss(params):
        logits, _ = model.apply({**variables, "params": params}, images)
        return loss_of(model)(logits, labels)

    return jax.grad(loss)(variables["params"])


def client_update(
    client: Client,
    model: Model,
    variables: PyTree,
    images: jax.Array,
    labels: jax.Array,
    then: Callable[[PyTree], PyTree] = lambda update: update,
) -> PyTree:
    """:func:`local_update` with a client's local steps, step size and optimiser.

    Of several clients the mean: the first has the first images, the second the next, and so on.

    Args:
        client: what they share.
        model: the federated model.
        variables: its variables.
        images: [b h w c] of all clients together.
        labels: [b] or [b k].
        then: what becomes of each client's update before the mean.
    """

    def one(images, labels):
        found = local_update(
            model,
            variables,
            images,
            labels,
            local_steps=client.local_steps,
            learning_rate=client.local_learning_rate,
            optimizer=client.local_optimizer,
        )
        return then(found)

    if client.clients == 1:
        return one(images, labels)

    def add(total, part):
        return jax.tree.map(jnp.add, total, one(*part)), None

    zeros = jax.tree.map(jnp.zeros_like, variables["params"])
    parts = split_among(client.clients, (images, labels))
    total = _folded(add, zeros, parts, client.clients * client.local_steps)
    return jax.tree.map(lambda leaf: leaf / client.clients, total)


def split_among(clients: int, batch: PyTree) -> PyTree:
    """Arrays [b ...] as [clients, b / clients, ...]."""
    return jax.tree.map(lambda x: jnp.reshape(x, (clients, -1, *jnp.shape(x)[1:])), batch)


def local_update(
    model: Model,
    variables: PyTree,
    images: jax.Array,
    labels: jax.Array,
    *,
    local_steps: int = 1,
    learning_rate: float = 0.01,
    batch_size: int | None = None,
    optimizer: str = "sgd",
) -> PyTree:
    """The update of a client that trains for several steps before it shares (FedAvg).

    Runs ``w_{t+1} = w_t - learning_rate * d_t`` with the directions d_t that the optimiser makes of
    the gradients, and returns ``(w_0 - w_E) / learning_rate``, which is the sum of the ``d_t``: of
    plain SGD the sum of the gradients. One step of SGD with the whole batch gives exactly
    :func:`gradient`, whatever the learning rate, so the two can be compared and defended alike.

    Args:
        model: the federated model.
        variables: as given by ``model.init``. Running statistics stay as they are throughout.
        images: [b h w c] floats in [0, 1].
        labels: [b] class indices or [b k] soft labels.
        local_steps: E, the number of steps, at least 1. They are one compiled loop (on a CPU from
            6 steps on) whose steps are computed again in a derivative: compile time and activations
            do not grow with E, but the derivative keeps a copy of the weights for each step, and of
            Adam's state.
        learning_rate: of the local steps, positive; a Python number or a scalar array.
        batch_size: images per step, a divisor of b; step t takes the t-th consecutive block of
            the batch and starts over at its end. None takes the whole batch in every step.
        optimizer: in :data:`ggl_jax.client.local.LOCAL_OPTIMIZERS`, with options; its state starts
            anew.

    Returns:
        A pytree like ``variables["params"]``, differentiable as :func:`gradient`. Through Adam's
        first step little can be seen: its direction is nearly the gradient's sign.

    Raises:
        GGLError: an argument is out of range, or images or labels do not fit the model.

    Reference: McMahan et al. 2017 (FedAvg); local steps in the attacker's simulation as in
    Geiping et al. 2020 ("Inverting Gradients").
    """
    _check_local(local_steps, learning_rate, batch_size)
    own = local_optimizer(optimizer)
    num_images = images.shape[0]
    size = num_images if batch_size is None else batch_size
    if num_images % size:
        raise GGLError(f"batch_size={batch_size} does not divide the batch of {num_images} images")
    start, labels = variables["params"], jnp.asarray(labels)

    def step(carried, t):
        total, state = carried
        params = jax.tree.map(lambda w, d: w - learning_rate * d, start, total)
        batch = images, labels
        if size < num_images:
            first = t * size % num_images
            batch = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size), batch)
        own_gradient = gradient(model, {**variables, "params": params}, *batch)
        direction, state = own.update(own_gradient, state, params)
        return (jax.tree.map(jnp.add, total, direction), state), None

    if local_steps == 1:
        found = gradient(model, variables, images[:size], labels[:size])
        return own.update(found, own.init(start), start)[0]
    # The directions' sum is accumulated instead of taken from w_0 - w_E, whose difference would
    # lose most digits to the size of the weights.
    carried = jax.tree.map(jnp.zeros_like, start), own.init(start)
    return _folded(step, carried, np.arange(local_steps), local_steps)[0]


#: Gradients that a CPU computes without a loop, in which XLA's convolutions take three times as
#: long there (measured on ResNet-18). Each adds to the program.
_UNROLLED = 5


def _folded(step: Callable, carried: PyTree, each: PyTree, gradients: int) -> PyTree:
    """What is carried through ``step(carried, one) -> (carried, None)``, for each of ``each``.

    Steps are computed again in a derivative, and make a loop unless they take few gradients.
    """
    step = jax.checkpoint(step, prevent_cse=False)
    if gradients > _UNROLLED or jax.default_backend() != "cpu":
        return jax.lax.scan(step, carried, each)[0]
    for number in range(len(jax.tree.leaves(each)[0])):
        carried, _ = step(carried, jax.tree.map(lambda x, number=number: x[number], each))
    return carried


def _check_local(local_steps, learning_rate, batch_size) -> None:
    at_least(1, local_steps=local_steps, batch_size=1 if batch_size is None else batch_size)
    if not _is_traced(learning_rate) and not 0 < learning_rate < float("inf"):
        raise GGLError(f"learning_rate={learning_rate!r}: give a positive number")
