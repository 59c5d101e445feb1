"""The main job on a problem that must be solved: an image that lies in a tiny prior's range."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_SHAPE

import ggl_jax as gx
from ggl_jax.adversary.search import release_programs
from ggl_jax.audit.run import AuditInterrupted
from ggl_jax.images import assign

SETTINGS = gx.Search(optimizer="cma_es:16", steps=60, restarts=2, regularizer="none")


def tiny_audit(tiny_model, tiny_prior, params, images, labels, defenses, **options):
    options.setdefault("search", SETTINGS)
    return gx.audit(
        images,
        labels,
        model=tiny_model,
        prior=tiny_prior,
        prior_params=params,
        defenses=defenses,
        num_controls=32,
        ceiling_steps=150,
        **options,
    )


def test_recovers_an_image_in_the_priors_range(
    tiny_model, tiny_prior, tiny_prior_params, tiny_images
):
    result = tiny_audit(
        tiny_model,
        tiny_prior,
        tiny_prior_params,
        tiny_images[:1],
        [1],
        ["none", "clip:0.5", "soteria:0.3", "sparsify:0.5"],
    )
    assert [row["label_inferred"] for row in result.rows] == [1] * 4
    for row in result.rows:
        assert row["psnr"] > 30, row["defense"]
        assert row["psnr"] > row["psnr_control_best"] + 5
        assert row["evaluations"] == 60 * 2 * 16
    assert result.rows[0]["psnr_ceiling"] > 35


def test_noise_hides_the_image_and_the_audit_says_so(
    tiny_model, tiny_prior, tiny_prior_params, tiny_images
):
    rows = tiny_audit(
        tiny_model, tiny_prior, tiny_prior_params, tiny_images[:1], [1], ["none", "noise:10"]
    ).rows
    assert rows[1]["psnr"] < rows[0]["psnr"] - 10


def test_adam_and_a_batch_of_two(tiny_model, tiny_prior, tiny_prior_params, tiny_images):
    settings = gx.Search(optimizer="adam", steps=200, restarts=8, start="prior", regularizer="none")
    result = tiny_audit(
        tiny_model,
        tiny_prior,
        tiny_prior_params,
        tiny_images,
        [0, 2],
        ["none"],
        search=settings,
        client=gx.Client(batch_size=2),
    )
    assert sorted(row["label_inferred"] for row in result.rows) == [0, 2]
    assert min(row["psnr"] for row in result.rows) > 20


def test_fedavg_update(tiny_model, tiny_prior, tiny_prior_params, tiny_images):
    rows = tiny_audit(
        tiny_model,
        tiny_prior,
        tiny_prior_params,
        tiny_images[:1],
        [1],
        ["none"],
        client=gx.Client(local_steps=3, local_learning_rate=0.05),
    ).rows
    assert rows[0]["psnr"] > 25


def test_soteria_on_the_representation_defends_single_steps_only(
    tiny_model, tiny_prior, tiny_prior_params, tiny_images
):
    with pytest.raises(gx.GGLError, match="local_steps"):
        tiny_audit(
            tiny_model,
            tiny_prior,
            tiny_prior_params,
            tiny_images[:1],
            [1],
            ["soteria:0.3"],
            client=gx.Client(local_steps=3),
        )


def test_a_users_own_model_defense_and_images(tiny_model, tiny_prior, tiny_prior_params):
    def halve_and_round(key, update):
        del key
        return jax.tree.map(lambda g: jnp.round(0.5 * g, 3), update)

    mine = gx.from_function(
        halve_and_round,
        name="halve",
        simulate=lambda estimated, u: jax.tree.map(lambda g: g / 2, u),
    )
    image = np.full((1, *TINY_SHAPE), 0.5, np.float32)
    rows = tiny_audit(
        tiny_model,
        tiny_prior,
        tiny_prior_params,
        image,
        [2],
        [mine],
        search=gx.Search(optimizer="cma_es:8", steps=3),
    ).rows
    assert rows[0]["defense"] == "halve"
    assert rows[0]["label_inferred"] == 2


def test_results_on_disk_and_resumption(
    tmp_path, tiny_model, tiny_prior, tiny_prior_params, tiny_images
):
    def go(**options):
        return tiny_audit(
            tiny_model,
            tiny_prior,
            tiny_prior_params,
            tiny_images,
            [0, 1],
            ["none", "clip:0.5"],
            search=gx.Search(optimizer="cma_es:8", steps=4),
            out=tmp_path,
            **options,
        )

    phases = []

    def interrupt(phase, number, total, fraction, loss):
        phases.append(phase)
        if number == 2 and "search" in phase:
            raise KeyboardInterrupt

    with pytest.raises(AuditInterrupted) as caught:
        go(progress=interrupt)
    assert len(caught.value.result.rows) == 2
    result = go()
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(r["image"], r["defense"]) for r in rows] == [
        ("image-0", "none"),
        ("image-0", "clip:0.5"),
        ("image-1", "none"),
        ("image-1", "clip:0.5"),
    ]
    assert rows == result.rows
    assert rows[:2] == caught.value.result.rows
    for row, image in zip(result.rows, result.reconstructions, strict=True):
        stored = gx.load(str(tmp_path / row["reconstruction"]), image_size=8).images[0]
        np.testing.assert_allclose(stored, image, atol=0.51 / 255)
    # What is read from the folder is what was found, in every bit.
    again = go()
    assert again.rows == rows
    np.testing.assert_array_equal(again.reconstructions, result.reconstructions)
    np.testing.assert_array_equal(again.reconstructions[:2], caught.value.result.reconstructions)
    for name, controls in result.controls.items():
        for a, b in zip(
            controls.pictures().values(), again.controls[name].pictures().values(), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    # The interrupted and resumed run found what an undisturbed one finds.
    undisturbed = tiny_audit(
        tiny_model,
        tiny_prior,
        tiny_prior_params,
        tiny_images,
        [0, 1],
        ["none", "clip:0.5"],
        search=gx.Search(optimizer="cma_es:8", steps=4),
    )
    for a, b in zip(undisturbed.rows, rows, strict=True):
        np.testing.assert_allclose(a["psnr"], b["psnr"], rtol=1e-4)


def test_a_cell_is_three_calls(tiny_model, tiny_prior, tiny_prior_params, tiny_images):
    """The client's, the adversary's and the judge's, which a user can make one by one."""
    settings, defense = gx.Search(optimizer="cma_es:8", steps=4), gx.parse("noise:0.1")
    variables = tiny_model.init(jax.random.key(3))
    given = (tiny_model, tiny_prior, tiny_prior_params, tiny_images[:1], [1], [defense])
    (row,) = tiny_audit(*given, search=settings, variables=variables, seed=5).rows
    key = jax.random.fold_in(jax.random.key(5), 0)
    public = gx.Public(tiny_model, variables, tiny_prior, tiny_prior_params)
    noise, search = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    sent, record = gx.share(noise, public, tiny_images[:1], np.asarray([1]), defense=defense)
    found = gx.reconstruct(search[None], public, [sent], view=defense.view, search=settings)
    (judged,) = gx.judge(found[0], tiny_images[:1], np.asarray([1]), public=public, record=record)
    assert "psnr_ceiling" not in judged
    for name in set(judged) - {"search_seconds"}:
        assert judged[name] == row[name], name


def test_instance_streams_do_not_depend_on_the_batch(
    tiny_model, tiny_prior, tiny_prior_params, tiny_images
):
    settings = gx.Search(optimizer="cma_es:8", steps=4)
    both = tiny_audit(
        tiny_model,
        tiny_prior,
        tiny_prior_params,
        tiny_images,
        [0, 1],
        ["noise:0.1"],
        search=settings,
    )
    second = tiny_audit(
        tiny_model,
        tiny_prior,
        tiny_prior_params,
        tiny_images[1:],
        [1],
        ["noise:0.1"],
        search=settings,
        instance_ids=[1],
    )
    np.testing.assert_allclose(both.rows[1]["loss"], second.rows[0]["loss"], rtol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux counts memory mappings")
def test_programs_are_released_before_mappings_run_out():
    def used():
        return len(Path("/proc/self/maps").read_text().splitlines())

    def compiled(i):
        program = jax.jit(lambda x: jnp.sin(x @ x.T + i).sum())
        program(jnp.ones((8, 8)))
        return program

    programs = [compiled(i) for i in range(20)]
    before = used()
    assert not release_programs(1.0)
    assert used() >= before
    assert release_programs(0.0)
    assert used() < before - len(programs)
    assert programs[3](jnp.zeros((2, 2))) == pytest.approx(4 * np.sin(3.0), rel=1e-5)


def test_nan_gradient_is_one_clear_error(tiny_model, tiny_prior, tiny_prior_params, tiny_images):
    poison = gx.from_function(
        lambda key, update: jax.tree.map(lambda g: g * jnp.nan, update), name="poison"
    )
    with pytest.raises(gx.GGLError, match=r"(?i)nan|finite"):
        tiny_audit(tiny_model, tiny_prior, tiny_prior_params, tiny_images[:1], [1], [poison])


@pytest.mark.parametrize(
    ("images", "labels", "word"),
    [
        (np.zeros((1, 9, 8, 3)), [0], "images"),
        (np.full((1, 8, 8, 3), 255.0), [0], "images"),
        (np.full((1, 8, 8, 3), np.nan), [0], "images"),
        (np.zeros((1, 8, 8, 3)), [3], "labels"),
        (np.zeros((1, 8, 8, 3)), [0, 1], "labels"),
        (np.zeros((1, 8, 8, 3)), ["cat"], "labels: got <U3"),
        (np.zeros((1, 8, 8, 3)), [0.5], "labels: got float64"),
        (np.zeros((0, 8, 8, 3)), [], "images: got none"),
    ],
)
def test_bad_inputs_are_named(tiny_model, tiny_prior, tiny_prior_params, images, labels, word):
    with pytest.raises(gx.GGLError, match=word):
        tiny_audit(tiny_model, tiny_prior, tiny_prior_params, images, labels, ["none"])


def test_assignment_undoes_a_permutation():
    images = np.random.default_rng(0).random((4, 8, 8, 3))
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(assign(images[order], images), np.argsort(order))
