"""Oracles: nothing private and no parameter of a defense reaches the adversary.

Most of it is in the types: the adversary is given a ``Shared`` and a ``View``, which do not hold
such things. These tests say so, and run whole cells on other private images behind one update.
"""

import ast
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DEFENSE_SPECS

import ggl_jax as gx
from ggl_jax import adversary
from ggl_jax.adversary import attacks
from ggl_jax.adversary.estimation import estimate
from ggl_jax.adversary.reconstruct import _nearest, mismatch, prepare, reconstruct
from ggl_jax.adversary.stages import make_stages
from ggl_jax.audit import landscape, run
from ggl_jax.audit.cells import Inputs
from ggl_jax.audit.paper import FORMS
from ggl_jax.client.defenses import DEFENSES, summary
from ggl_jax.priors.pixels import pixels
from ggl_jax.types import Defense, Problem, Public, Shared, View

#: Names of what only clients have, and of what has it.
PRIVATE = {"Defense", "Context", "share", "parse", "chain", "clip", "noise", "sparsify", "soteria"}


def modules(package):
    return sorted(Path(package.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", modules(adversary), ids=lambda path: path.stem)
def test_the_adversary_imports_nothing_private(path):
    """Neither the types that hold private data or parameters, nor the audit, which has them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not {alias.name for alias in node.names} & PRIVATE, path
            assert "audit" not in (node.module or ""), path
        if isinstance(node, ast.Import):
            assert not any("ggl_jax" in alias.name for alias in node.names), path


def test_what_crosses_cannot_hold_the_private_batch():
    assert Shared._fields == ("update", "statistics")
    # "expected" is drawn from the prior.
    assert Public._fields == ("model", "variables", "prior", "prior_params", "expected")
    known = {"observed", "variables", "prior_params", "labels", "estimated", "noise", "statistics"}
    assert set(Problem._fields) == known | {"guess"}  # read off the update with public samples
    choosing = attacks.members, mismatch, _nearest
    for function in (reconstruct, prepare, make_stages, estimate, gx.infer_labels, *choosing):
        parameters = inspect.signature(function).parameters
        assert not parameters.keys() & {"defense", "image", "images", "original", "record"}
        assert Defense not in [p.annotation for p in parameters.values()]


def test_what_is_sent_is_the_update_alone(tiny_model, tiny_variables, tiny_images, tiny_prior):
    public = Public(tiny_model, tiny_variables, tiny_prior, {})
    sent, _ = gx.share(
        jax.random.key(0), public, tiny_images[:1], [1], defense=gx.parse("soteria:0.5")
    )
    assert sent.statistics is None
    shapes = jax.tree.map(jnp.shape, (sent.update, tiny_variables["params"]))
    assert shapes[0] == shapes[1]
    sent, _ = gx.share(
        jax.random.key(0), public, tiny_images[:1], [1], defense=gx.parse("clip:0.01")
    )
    assert max(jnp.linalg.norm(leaf) for leaf in jax.tree.leaves(sent.update)) < 0.0101


def held(function, seen=None):
    """Everything that a function's closures, defaults and partial arguments hold, in depth."""
    seen = set() if seen is None else seen
    if id(function) in seen:
        return
    seen.add(id(function))
    inner = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    inner += [*(getattr(function, "__defaults__", None) or ())]
    inner += [*(getattr(function, "__kwdefaults__", None) or {}).values()]
    inner += [*getattr(function, "args", ()), *getattr(function, "keywords", {}).values()]
    for value in inner:
        values = list(value) if isinstance(value, list | tuple) else [value]
        for one in values:
            if callable(one):
                yield from held(one, seen)
            else:
                yield one


SPECS = [*DEFENSE_SPECS.values(), "censor:3,exact=False", "clip:0.37+noise:0.37"]


@pytest.mark.parametrize("support", [False, True])
@pytest.mark.parametrize("fidelity", ["paper", "code"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_view_holds_no_parameter(spec, fidelity, support):
    assert DEFENSE_SPECS.keys() == DEFENSES.keys()
    view = gx.parse(FORMS[fidelity](spec)).view.comparing(support)
    assert not re.search(r"[\d:=]", view.name)
    for part in view:
        for value in held(part) if callable(part) else ():
            # Switches, and 0.0, the default of `noise`.
            assert isinstance(value, bool | str | type(None) | View) or value == 0.0, (part, value)


@pytest.mark.parametrize("fidelity", ["paper", "code"])
@pytest.mark.parametrize(("used", "taken"), [("clip:0.2", "clip:3"), ("sparsify:0.7", "sparsify")])
def test_an_estimate_is_of_what_was_used(
    used, taken, fidelity, tiny_model, tiny_variables, tiny_images
):
    """Not of the defense at hand: the server takes another of the kind, and finds the same."""
    update = gx.gradient(tiny_model, tiny_variables, 4 * tiny_images[:1], jnp.asarray([1]))
    apply = jax.jit(gx.parse(FORMS[fidelity](used)).apply)
    observed, record = apply(jax.random.key(0), update, None)
    found = [
        summary(estimate(gx.parse(FORMS[fidelity](spec)).view, observed, tiny_model.head))
        for spec in (used, taken)
    ]
    assert found[0] == found[1]
    key = "bound" if used.startswith("clip") else "rate"
    assert found[0][key] == pytest.approx(float(record[key]), rel=0.02)


def conditional_prior(prior, params, num_classes):
    """The prior, darker from class to class: a wrong label shows in every sample."""

    def apply(_, latents, labels):
        images = prior.apply(params, latents, labels)
        return images * (1 - 0.2 * jnp.broadcast_to(labels, len(latents)))[:, None, None, None]

    return prior._replace(init=lambda key: {}, apply=apply, num_classes=num_classes)


#: What an adversary ends up with, among a row's values.
FOUND = ["label_inferred", "loss", "distance", "loss_curve", "evaluations", "defense_estimated"]
FOUND += ["won", "mismatches"]  # of attack strongest


@pytest.mark.parametrize(("batch_size", "rounds"), [(1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("attack", ["ggl", "dlg", "strongest"])
def test_the_private_batch_changes_nothing_but_the_update(
    attack, batch_size, rounds, monkeypatch, tiny_model, tiny_prior, tiny_prior_params, tiny_images
):
    """Behind one and the same update: other images, other labels. The result is bit-equal."""
    rounds = 1 if attack == "strongest" else rounds  # which is for one
    prior = conditional_prior(tiny_prior, tiny_prior_params, tiny_model.num_classes)
    if attack == "dlg":
        prior = pixels(tiny_model.image_shape)
    defense = gx.parse("clip:0.2" if attack == "strongest" else "clip:0.2+noise:0.001")
    sent, controls_of = {}, []
    real_share, real_controls = run.share, run.batch_controls

    def share_once(*arguments, **options):
        if not sent:
            sent["was"] = real_share(*arguments, **options)
        return sent["was"]

    def controls(prior, params, images, labels, *rest, **options):
        controls_of.append(list(labels))
        return real_controls(prior, params, images, labels, *rest, **options)

    monkeypatch.setattr(run, "share", share_once)
    monkeypatch.setattr(run, "batch_controls", controls)
    few = {"steps": 2, "refine": "none"}
    options = {"optimizer": "adam", "pool": 6, "restarts": 3} if attack == "ggl" else {}
    settings = gx.search_of("paper", "dlg" if attack == "strongest" else attack, **few, **options)
    if attack == "strongest":
        for one in ("ig", "ggl"):
            monkeypatch.setitem(attacks.PRESETS["quick"], one, few)
        monkeypatch.setitem(attacks.MEMBERS, "quick", ("ig", "ggl"))
        settings = gx.search_of("quick", attack)
    batch = jnp.concatenate([tiny_images, 1 - tiny_images])[:batch_size]
    true = [1, 2][:batch_size]
    results = [
        gx.audit(
            images,
            labels,
            model=tiny_model,
            prior=prior,
            prior_params={},
            defenses=[defense],
            client=gx.Client(batch_size=batch_size, rounds=rounds),
            search=settings,
            num_controls=2,
            ceiling_steps=1,
        )
        for images, labels in ((batch, true), (1 - 0.3 * batch[::-1], [0] * batch_size))
    ]
    # In the order of the private images, which only the audit knows: so their order is taken off.
    as_set = [sorted(np.asarray(i).tobytes() for i in r.reconstructions) for r in results]
    assert as_set[0] == as_set[1]
    first, second = ([{k: row.get(k) for k in FOUND} for row in r.rows] for r in results)
    assert sorted(map(repr, first)) == sorted(map(repr, second))
    if attack == "ggl":
        # The controls have the labels that the attack inferred, not the true ones.
        inferred = sorted(row["label_inferred"] for row in first)
        assert [sorted(labels) for labels in controls_of] == [inferred, inferred]
    if attack == "ggl" and batch_size == rounds == 1:
        centers = [
            landscape.find_center(
                Inputs(image[None], [label], tiny_model, prior, {}),
                defense=defense,
                search=settings,
            )
            for image, label in ((batch[0], 1), (1 - batch[0], 0))
        ]
        for part in ("images", "labels", "point"):
            np.testing.assert_array_equal(*(getattr(center, part) for center in centers))


def test_the_result_is_the_restart_of_lowest_loss(
    tiny_model, tiny_variables, tiny_images, tiny_prior, tiny_prior_params
):
    public = Public(tiny_model, tiny_variables, tiny_prior, tiny_prior_params)
    key, defense = jax.random.key(0), gx.parse("none")
    sent, _ = gx.share(key, public, tiny_images[:1], [1], defense=defense)
    settings = gx.Search(optimizer="adam", restarts=4, steps=2, start="prior")
    (found,) = reconstruct(key[None], public, [sent], view=defense.view, search=settings)
    candidates = tiny_prior.apply(tiny_prior_params, found.point[None], None)
    np.testing.assert_allclose(found.images[0], jnp.clip(candidates[0], 0, 1), atol=1e-6)
    outcome = gx.run_stages(
        make_stages(settings, tiny_model, tiny_prior, defense.view), key[None], [found.problem]
    )
    assert found.loss == pytest.approx(float(jnp.min(outcome.candidates.losses)), rel=1e-6)
    assert found.loss < float(jnp.max(outcome.candidates.losses))
