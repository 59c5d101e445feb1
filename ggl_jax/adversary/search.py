"""Drives an attack's steps: from the host on CPU, in compiled chunks on accelerators."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ggl_jax.errors import GGLError
from ggl_jax.types import OK, STALLED, Attack, Problem, PyTree

#: Which parts of a problem differ between the instances of one batch: each client has its own
#: update and labels, while the global model and the prior are shared.
_INSTANCE_AXES = Problem(0, None, None, 0, 0)  # type: ignore[arg-type]


class SearchResult(NamedTuple):
    """Outcome of :func:`run_search` for ``i`` instances.

    Attributes:
        images: [i b h w c], the candidates of lowest loss, in [0, 1].
        losses: [i], their losses.
        evaluations: gradient evaluations spent on each instance.
        history: [i steps], lowest loss so far after each step.
        status: [i], OK, NONFINITE (no step of a call had a finite loss) or STALLED.
    """

    images: jax.Array
    losses: jax.Array
    evaluations: int
    history: jax.Array
    status: jax.Array


def default_steps_per_call() -> int:
    """Optimiser steps in one compiled call.

    XLA runs a convolution inside a loop on one CPU thread only, so CPUs are stepped from the host;
    accelerators keep a chunk of steps on the device and meet the host once in a chunk.
    """
    return 1 if jax.default_backend() == "cpu" else 25


@functools.lru_cache(maxsize=64)
def _compiled(attack: Attack, batched: bool):
    def advance(key: jax.Array, problem: Problem, state: PyTree, first: jax.Array, num: int):
        def body(state, index):
            state, info = attack.step(jax.random.fold_in(key, index), problem, state)
            return state, (state.loss, info.status)

        if num == 1:
            state, report = body(state, first)
            return state, jax.tree.map(lambda x: x[None], report)
        return jax.lax.scan(body, state, first + jnp.arange(num))

    init, decode = attack.init, attack.decode
    if not batched:
        return jax.jit(init), jax.jit(advance, static_argnums=4), jax.jit(decode)

    def advance_all(keys, problems, states, first, num):
        each = functools.partial(advance, first=first, num=num)
        return jax.vmap(each, in_axes=(0, _INSTANCE_AXES, 0))(keys, problems, states)

    return (
        jax.jit(jax.vmap(init, in_axes=(0, _INSTANCE_AXES))),
        jax.jit(advance_all, static_argnums=4),
        jax.jit(jax.vmap(decode, in_axes=(_INSTANCE_AXES, 0))),
    )


def stack_problems(problems: list[Problem]) -> Problem:
    """Stack the instances' own parts (updates, labels, estimates) along a new first axis."""
    first = problems[0]
    own = [(p.observed, p.labels, p.estimated) for p in problems]
    observed, labels, estimated = jax.tree.map(lambda *xs: jnp.stack(xs), *own)
    return Problem(observed, first.variables, first.prior_params, labels, estimated)


def run_search(
    attack: Attack,
    keys: jax.Array,
    problems: list[Problem],
    *,
    steps: int,
    steps_per_call: int | None = None,
    callback: Callable[[int, jax.Array], None] | None = None,
) -> SearchResult:
    """Run an attack on one or more instances that share model, prior and defense.

    Several instances run in one batched program. An instance's random stream is its own key's, so
    it does not depend on which others it is batched with.

    Args:
        attack: from :mod:`ggl_jax.adversary.attacks`.
        keys: [i] typed keys, one for each instance.
        problems: ``i`` problems with the same ``variables`` and ``prior_params``.
        steps: optimiser steps, at least 1.
        steps_per_call: steps per compiled call; None for :func:`default_steps_per_call`.
        callback: ``callback(steps_done, losses[i])`` after each call.

    Returns:
        A :class:`SearchResult`.

    Edge cases:
        The search ends early when every instance's whole call was non-finite. An instance whose
        best loss did not improve at all after its first step is marked STALLED.
    """
    if steps < 1:
        raise GGLError(f"steps: got {steps}, allowed: whole numbers of at least 1")
    batched = len(problems) > 1
    init, advance, decode = _compiled(attack, batched)
    problem = stack_problems(problems) if batched else problems[0]
    pairs = jax.vmap(jax.random.split)(keys)
    key_start, key = (pairs[:, 0], pairs[:, 1]) if batched else (pairs[0, 0], pairs[0, 1])
    state = init(key_start, problem)
    per_call = min(steps_per_call or default_steps_per_call(), steps)
    history, statuses, done = [], [], 0
    while done < steps:
        num = min(per_call, steps - done)
        state, (losses, status) = advance(key, problem, state, jnp.asarray(done), num)
        losses, status = (x if batched else x[None] for x in (losses, status))
        history.append(losses)
        statuses.append(status)
        done += num
        if callback is not None:
            callback(done, losses[:, -1])
        if bool(jnp.all(status != OK)):
            break
    images, losses = decode(problem, state)
    if not batched:
        images, losses = images[None], losses[None]
    all_losses = jnp.concatenate(history, axis=1)
    failed = jnp.max(jnp.concatenate(statuses, axis=1), axis=1)
    flat = (all_losses.shape[1] > 1) & (all_losses[:, -1] >= all_losses[:, 0])
    return SearchResult(
        images=images,
        losses=losses,
        evaluations=done * attack.evaluations_per_step,
        history=all_losses,
        status=jnp.where(failed != OK, failed, jnp.where(flat, STALLED, OK)),
    )
