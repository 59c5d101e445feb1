"""Local optimisers: what a client makes of its gradients in the steps before it shares.

Each is a transformation of optax that turns gradients into directions, by which the client moves
its weights: ``w_{t+1} = w_t - learning_rate * direction_t``.
"""

import functools
from collections.abc import Callable

import optax

from ggl_jax import grammar
from ggl_jax.errors import GGLError
from ggl_jax.spec import Client, Positive, Share, ranged


@ranged
def sgd(*, momentum: Share = 0.0, nesterov: bool = False) -> optax.GradientTransformation:
    """Stochastic gradient descent as torch's, without dampening.

    Args:
        momentum: m in v_t = m v_{t-1} + g_t, whose v_t is the direction; 0 for plain SGD.
        nesterov: take g_t + m v_t.
    """
    return optax.trace(momentum, nesterov) if momentum else optax.identity()


@ranged
def adam(
    *, b1: Share = 0.9, b2: Share = 0.999, eps: Positive = 1e-8
) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015, algorithm 1), as torch's.

    Args:
        b1: decay of the gradients' mean.
        b2: decay of their squares' mean.
        eps: added to the root.
    """
    # The matching loss takes the root's derivative, which is infinite where a gradient is 0.
    return optax.scale_by_adam(b1, b2, eps, eps_root=1e-30)


#: Local optimisers by name.
LOCAL_OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = grammar.named(sgd, adam)


@functools.lru_cache(maxsize=64)
def local_optimizer(text: str) -> optax.GradientTransformation:
    """A local optimiser by its name, with options (:mod:`ggl_jax.grammar`): ``sgd:momentum=0.9``.

    Raises:
        GGLError: an unknown name or option, or a value out of its range.
    """
    return grammar.build(LOCAL_OPTIMIZERS, text, what="local_optimizer")


def _options(text: str) -> tuple[str, dict]:
    return grammar.read(LOCAL_OPTIMIZERS, text, what="local_optimizer")


def check_client(client: Client) -> None:
    """Refuse a client whose options do not go together.

    Raises:
        GGLError: an unknown local optimiser, clients that do not divide the images, or statistics
            of several clients.
    """
    local_optimizer(client.local_optimizer)
    if client.batch_size % client.clients:
        raise GGLError(
            f"clients: got {client.clients}, allowed: divisors of batch_size, which is "
            f"{client.batch_size} images of all clients together"
        )
    if client.clients > 1 and client.share_statistics:
        raise GGLError(
            "share_statistics: the variances of several clients' batches have no mean that a batch "
            "could match; leave it out, or use clients=1"
        )


def shares_gradient(client: Client) -> bool:
    """Whether an update is one plain gradient (or the mean of several clients'): a step of SGD,
    whose momentum starts at 0."""
    name, given = _options(client.local_optimizer)
    return client.local_steps == 1 and name == "sgd" and not given.get("nesterov")


def gradients_summed(client: Client) -> float | None:
    """How many gradients an update sums up, where each has a weight; None where it is no sum.

    With momentum m, the gradient of a step counts in all later directions, too.

    >>> gradients_summed(Client(local_steps=3))
    3.0
    >>> gradients_summed(Client(local_steps=2, local_optimizer="sgd:momentum=0.5"))
    2.5
    """
    name, given = _options(client.local_optimizer)
    if name != "sgd":
        return None
    m, nesterov = given.get("momentum", 0.0), given.get("nesterov", False)
    velocity = total = 0.0
    for _ in range(client.local_steps):
        velocity = m * velocity + 1.0
        total += 1.0 + m * velocity if nesterov else velocity
    return total
