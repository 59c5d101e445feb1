"""L-BFGS without a line search: torch's path step by step, and restarts that fail alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ggl_jax.adversary.optimizers import best_so_far, lbfgs
from ggl_jax.errors import GGLError
from ggl_jax.types import NONFINITE, OK, STALLED


def rosenbrock(z, xp=jnp):
    rows = (1 - z[..., :-1]) ** 2 + 5.0 * (z[..., 1:] - z[..., :-1] ** 2) ** 2
    return xp.sum(rows, -1)


def rough(z, xp=jnp):
    """A bowl with ripples and kinks, where moves of negative curvature occur."""
    return xp.sum(0.1 * z**2 + 0.3 * xp.cos(4 * z) + 0.2 * xp.abs(z - 0.3), -1)


def run(optimizer, loss_fn, start, steps):
    """Points [s r z], losses [s r] and statuses of all steps."""
    state = optimizer.init(jax.random.key(0), start)
    step = jax.jit(lambda state: optimizer.step(jax.random.key(0), state, loss_fn))
    infos = []
    for _ in range(steps):
        state, info = step(state)
        infos.append(info)
    assert step._cache_size() == 1
    return (
        np.stack([info.latents for info in infos]),
        np.stack([info.losses for info in infos]),
        [int(info.status) for info in infos],
    )


@pytest.mark.parametrize("memory_size", [3, 100])
@pytest.mark.parametrize("loss_fn", [rosenbrock, rough])
def test_takes_the_path_of_torch(loss_fn, memory_size):
    torch = pytest.importorskip("torch")
    start = np.random.default_rng(0).normal(size=40)
    point = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([point], history_size=memory_size)
    visited = []

    def closure():
        search.zero_grad()
        loss = loss_fn(point, torch)
        loss.backward()
        visited.append(point.detach().numpy().copy())
        return loss

    # Two of its iterations of up to 20 evaluations, before its tolerances repeat one.
    for _ in range(2):
        search.step(closure)
    with jax.enable_x64(True):
        ours, _, _ = run(
            lbfgs(memory_size=memory_size), loss_fn, jnp.asarray(start)[None], len(visited)
        )
    assert len(visited) > 30
    assert np.all(np.any(np.diff(visited, axis=0) != 0, axis=1))
    np.testing.assert_allclose(ours[:10, 0], visited[:10], rtol=1e-6, atol=1e-8)
    # Ripples multiply the difference in rounding by about five at each step.
    np.testing.assert_allclose(ours[:, 0], visited, rtol=1e-2, atol=5e-3)


def test_the_first_steps_by_hand():
    # f = z^2 in two dimensions with gradient 2 z: |g|_1 = 10, so the first step is g / 10.
    points, _, _ = run(lbfgs(), lambda z: jnp.sum(z**2, 1), jnp.asarray([[3.0, 2.0]]), 3)
    np.testing.assert_allclose(points[:, 0], [[3, 2], [2.4, 1.6], [0, 0]], atol=1e-5)
    # A gradient shorter than 1 is taken whole; the learning rate scales every step.
    slow = lbfgs(learning_rate=0.5)
    points, _, _ = run(slow, lambda z: 0.1 * jnp.sum(z**2, 1), jnp.asarray([[2.0]]), 3)
    np.testing.assert_allclose(points[:, 0, 0], [2.0, 1.8, 0.9], rtol=1e-5)


def test_a_move_of_negative_curvature_is_forgotten():
    # Downhill from the top of a cosine: the slope steepens, so nothing is learnt but -g itself.
    points, _, _ = run(lbfgs(), lambda z: jnp.cos(z[:, 0]), jnp.asarray([[0.5]]), 3)
    first = 0.5 + np.sin(0.5)
    np.testing.assert_allclose(points[:, 0, 0], [0.5, first, first + np.sin(first)], rtol=1e-5)


def test_goes_uphill_over_a_jump_and_keeps_the_best():
    # A step of the loss in the way, as where a ReLU flips: no line search would cross it.
    def stairs(z):
        return jnp.sum((z - 1.0) ** 2, 1) + 10.0 * (z[:, 0] > -1.0)

    start = jnp.asarray([[-2.0, 0.5]])
    points, losses, _ = run(lbfgs(), stairs, start, 6)
    assert np.any(np.diff(losses[:, 0]) > 0)
    np.testing.assert_allclose(points[-1, 0], 1.0, atol=1e-3)
    optimizer = best_so_far(lbfgs())
    state = optimizer.init(jax.random.key(0), start)
    for _ in range(6):
        state, _ = optimizer.step(jax.random.key(0), state, stairs)
    assert float(state.losses[0]) == losses.min()


def test_one_batch_is_many_searches():
    starts = jax.random.normal(jax.random.key(2), (3, 5))
    together, _, _ = run(lbfgs(), rosenbrock, starts, 12)
    for i in range(3):
        alone, _, _ = run(lbfgs(), rosenbrock, starts[i : i + 1], 12)
        np.testing.assert_allclose(together[:, i], alone[:, 0], rtol=1e-3, atol=1e-4)
    assert lbfgs().evaluations_per_step(3) == 3


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_restart_that_is_not_finite_stays_and_disturbs_no_other(broken):
    def partial(z):
        bowl = jnp.sum((z - 0.5) ** 2, 1)
        if broken == "loss":
            return jnp.where(z[:, 0] > 5, jnp.nan, bowl)
        # a finite value with a slope of infinity at 9
        return bowl + jnp.sqrt(jnp.where(z[:, 0] > 5, z[:, 0] - 9.0, 1.0))

    points, losses, statuses = run(lbfgs(), partial, jnp.asarray([[9.0, 0.0], [1.0, 1.0]]), 10)
    np.testing.assert_array_equal(points[:, 0], np.broadcast_to([9.0, 0.0], (10, 2)))
    np.testing.assert_allclose(points[-1, 1], 0.5, atol=1e-4)
    assert np.all(np.isnan(losses[:, 0])) == (broken == "loss")
    assert statuses[0] == OK
    _, _, statuses = run(lbfgs(), partial, jnp.asarray([[9.0, 0.0]]), 2)
    assert statuses == [NONFINITE if broken == "loss" else STALLED] * 2


@pytest.mark.parametrize(
    "flat",
    [
        lambda z: 1e-8 * jnp.sum(z, 1),  # no entry of the gradient above 1e-7
        lambda z: 2e-5 * jnp.sum(z, 1),  # its square, the slope, under 1e-9
    ],
)
def test_stalls_where_torch_stays(flat):
    points, _, statuses = run(lbfgs(), flat, jnp.zeros((1, 2)), 3)
    assert statuses == [STALLED] * 3
    assert not points.any()


@pytest.mark.parametrize(
    ("options", "word"),
    [({"memory_size": 0}, "memory_size"), ({"learning_rate": 0.0}, "learning_rate")],
)
def test_bad_options_are_named(options, word):
    with pytest.raises(GGLError, match=word):
        lbfgs(**options)
