"""A search that was killed goes on from its last state, and ends as if it had not been."""

import contextlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ggl_jax as gx
from ggl_jax.adversary.resume import Checkpoints
from ggl_jax.client.gradients import gradient
from ggl_jax.types import Problem


@pytest.fixture
def problems(tiny_model, tiny_variables, tiny_prior_params, tiny_images):
    return [
        Problem(
            gradient(tiny_model, tiny_variables, image[None], jnp.asarray([label])),
            tiny_variables,
            tiny_prior_params,
            jnp.asarray([label]),
            {},
        )
        for image, label in zip(tiny_images, (0, 1), strict=True)
    ]


def keys(num):
    return jax.random.split(jax.random.key(5), num)


class Killed(Exception):
    pass


def killer(at):
    """A callback that remembers the steps, and dies at one of them."""
    seen = []

    def callback(step, losses):
        seen.append(step)
        if step == at:
            raise Killed

    return seen, callback


def assert_same(a, b):
    for name in ("points", "losses", "images"):
        np.testing.assert_array_equal(getattr(a.candidates, name), getattr(b.candidates, name))
    np.testing.assert_array_equal(a.history, b.history)
    np.testing.assert_array_equal(a.status, b.status)
    assert a.evaluations == b.evaluations


@pytest.mark.parametrize("optimizer", ["cma_es", "adam", "turbo", "lbfgs", "lbfgs_wolfe"])
@pytest.mark.parametrize("num", [1, 2])
def test_a_killed_search_goes_on(tmp_path, tiny_model, tiny_prior, problems, optimizer, num):
    if num == 2 and optimizer not in ("cma_es", "adam"):
        pytest.skip("one instance is enough there")
    attack = gx.make_attack(
        "ggl",
        tiny_model,
        tiny_prior,
        optimizer=optimizer,
        steps=6,
        start="prior",
        regularizer="none",
    )

    def search(callback=None, folder=tmp_path / "kept"):
        return gx.run_search(
            attack,
            keys(num),
            problems[:num],
            steps=6,
            steps_per_call=1,
            checkpoints=folder and Checkpoints(folder, seconds=0.0),
            callback=callback,
        )

    undisturbed = search(folder=None)
    with pytest.raises(Killed):
        search(killer(4)[1])
    seen, callback = killer(None)
    assert_same(search(callback), undisturbed)
    assert seen == [4, 5, 6]
    # A finished search is not repeated.
    seen, callback = killer(None)
    assert_same(search(callback), undisturbed)
    assert seen == []


def test_only_the_same_search_is_gone_on_with(tmp_path, tiny_model, tiny_prior, problems):
    attack = gx.make_attack("ggl", tiny_model, tiny_prior, optimizer="adam", steps=4)

    def steps_of(seed=0, problem=problems[0], steps=4, die=None):
        seen, callback = killer(die)
        with contextlib.suppress(Killed):
            gx.run_search(
                attack,
                jax.random.key(seed)[None],
                [problem],
                steps=steps,
                checkpoints=Checkpoints(tmp_path, seconds=0.0),
                callback=callback,
            )
        return seen

    assert steps_of(die=4) == [1, 2, 3, 4]
    assert steps_of(seed=1, die=1) == [1]
    assert steps_of(problem=problems[1], die=1) == [1]
    assert steps_of(steps=5, die=1) == [1]
    # None of these wrote anything; the newest slot is lost, the one before is whole.
    newest = max(tmp_path.iterdir(), key=lambda p: (p / "card.json").stat().st_mtime_ns)
    shutil.rmtree(newest / "weights")
    assert steps_of() == [3, 4]


def test_stages_go_on_where_they_were(tmp_path, tiny_model, tiny_prior, problems):
    from ggl_jax.adversary.strategy import AttackSettings, make_stages

    settings = AttackSettings(
        optimizer="adam", steps=3, restarts=2, finalists=1, final_steps=3, refine="pixels",
        refine_steps=3, pool=4,
    )  # fmt: skip
    stages, _ = make_stages(settings, tiny_model, tiny_prior, gx.parse("none").view)

    def search(callback=None, folder=tmp_path):
        kept = folder and Checkpoints(folder, seconds=0.0)
        return gx.run_stages(stages, keys(1), problems[:1], checkpoints=kept, callback=callback)

    undisturbed = search(folder=None)
    with pytest.raises(Killed):
        search(killer(5)[1])
    seen, callback = killer(None)
    assert_same(search(callback), undisturbed)
    assert seen == [5, 6, 7, 8, 9]


def test_an_audit_keeps_long_searches_and_clears_them(
    tmp_path, tiny_model, tiny_prior, tiny_prior_params, tiny_images, monkeypatch
):
    monkeypatch.setattr(Checkpoints.__init__, "__kwdefaults__", {"seconds": 0.0, "write": True})

    def audit(progress=None):
        return gx.audit(
            tiny_images[:1],
            [0],
            model=tiny_model,
            prior=tiny_prior,
            prior_params=tiny_prior_params,
            defenses=["none"],
            settings=gx.AttackSettings(population=8, steps=4),
            num_controls=4,
            ceiling_steps=2,
            out=tmp_path,
            progress=progress,
        )

    fractions = []

    def die(phase, number, total, fraction, loss):
        if phase.endswith(": search"):
            fractions.append(fraction)
            if fraction == 0.75:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(die)
    assert any((tmp_path / "searches").rglob("card.json"))
    fractions.clear()
    with pytest.raises(KeyboardInterrupt):
        audit(die)
    assert fractions == [0.75]
    assert audit().rows
    assert not any((tmp_path / "searches").rglob("card.json"))
