"""Regression from updates to images, against ridge regressions that are fitted anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ggl_jax as gx
from ggl_jax import trees
from ggl_jax.adversary import bank as banks
from ggl_jax.adversary import reconstruct, regression, stages
from ggl_jax.adversary.bank import Bank, Held
from ggl_jax.adversary.matching.factored import FACTORED, as_data
from ggl_jax.adversary.regression import regress
from ggl_jax.adversary.search import _compiled
from ggl_jax.priors import fit_latents, project
from ggl_jax.types import Factored, Guess

NUM, PIXELS, SIZES = 24, 6, (5, 40)


@pytest.fixture
def linear(monkeypatch):
    """A bank whose gradients are linear in the images but for a little noise, and its map."""
    rng = np.random.default_rng(0)
    images = rng.uniform(0.2, 0.8, (NUM, PIXELS)).astype(np.float32)
    maps = [rng.normal(size=(PIXELS, size)).astype(np.float32) for size in SIZES]
    # Values that bfloat16 holds exactly, so that a fit in float64 is the same one.
    gradients = [
        np.asarray(jnp.asarray(images @ m, jnp.bfloat16).astype(jnp.float32)) for m in maps
    ]
    norms = np.stack([np.sum(g**2, axis=1) for g in gradients], axis=1)
    bank = Bank(
        images,
        tuple(Held(leaf, size) for leaf, size in enumerate(SIZES)),
        [[np.asarray(jnp.asarray(g, jnp.bfloat16))] for g in gradients],
        [g @ g.T for g in gradients],
        norms,
    )
    return bank, gradients


def ridge_fit(features, images, ridge):
    """Primal ridge regression with a free intercept: a function of new features."""
    mean, centre = images.mean(0), features.mean(0)
    f = features - centre
    solution = np.linalg.solve(f.T @ f + ridge * np.eye(f.shape[1]), f.T @ (images - mean))
    return lambda new: mean + (new - centre) @ solution


def leave_one_out(gradients, images, weights, ridge):
    """Features under weights of the tensors, and residuals of fits without each of the samples."""
    features = np.concatenate(
        [g * np.sqrt(w) for g, w in zip(gradients, weights, strict=True)], axis=1
    ).astype(np.float64)
    residuals = [
        images[i]
        - ridge_fit(np.delete(features, i, 0), np.delete(images, i, 0), ridge)(features[i])
        for i in range(NUM)
    ]
    return features, np.asarray(residuals)


def test_it_is_ridge_regression_and_its_error_is_leave_one_out(linear, monkeypatch):
    bank, gradients = linear
    monkeypatch.setattr(regression, "_RIDGES", np.asarray([0.3]))
    observed = [np.random.default_rng(1).normal(size=size).astype(np.float32) for size in SIZES]
    energies = np.asarray([np.sum((g - g.mean(0)) ** 2) for g in gradients])
    fits = []
    for weights in (1 / energies, np.ones(2) / energies.sum()):
        # The ridge is a share of the kernel's mean eigenvalue.
        ridge = 0.3 * np.sum(weights * energies) / NUM
        features, residuals = leave_one_out(gradients, bank.images, weights, ridge)
        new = np.concatenate([y * np.sqrt(w) for y, w in zip(observed, weights, strict=True)])
        estimate = ridge_fit(features, bank.images, ridge)(new)
        fits.append((np.mean(residuals**2), estimate, residuals))
    assert fits[0][0] != pytest.approx(fits[1][0], rel=0.01)
    expected, estimate, of_each = min(fits, key=lambda fit: fit[0])
    found, residuals, error = regress(bank, observed, Factored(), 0.0)
    np.testing.assert_allclose(found, estimate, atol=1e-3)
    np.testing.assert_allclose(residuals, of_each, atol=1e-3)
    assert error == pytest.approx(expected, rel=1e-3)


def test_noise_adds_what_it_does_to_the_estimate(linear, monkeypatch):
    bank, gradients = linear
    monkeypatch.setattr(regression, "_RIDGES", np.asarray([0.3]))
    sigma, rng = 0.7, np.random.default_rng(2)
    clean = [g[3] for g in gradients]
    base, _, still = regress(bank, clean, Factored(), 0.0)
    _, _, noisy = regress(bank, clean, Factored(), sigma)
    moved = []
    for _ in range(400):
        observed = [y + sigma * rng.normal(size=y.shape).astype(np.float32) for y in clean]
        moved.append(np.mean((regress(bank, observed, Factored(), 0.0)[0] - base) ** 2))
    assert noisy - still == pytest.approx(np.mean(moved), rel=0.15)


def test_masks_and_scales_are_the_defenses(linear):
    """Simulating the defense is as good as a bank of defended gradients."""
    bank, gradients = linear
    mask = [np.ones(SIZES[0], np.float32), (np.arange(SIZES[1]) % 3 == 0).astype(np.float32)]

    def scale(norms):
        return [1.0 / (1.0 + jnp.sqrt(n)) for n in norms]

    defended = []
    for g, m in zip(gradients, mask, strict=True):
        g = g * m
        defended.append(g / (1.0 + np.linalg.norm(g, axis=1, keepdims=True)))
    own = Bank(
        bank.images,
        bank.held,
        [[np.asarray(g)] for g in defended],
        [g @ g.T for g in defended],
        np.stack([np.sum(g**2, axis=1) for g in defended], axis=1),
    )
    observed = [g[5] for g in defended]
    factored = Factored([jnp.asarray(m) for m in mask], scale)
    found, _, error = regress(bank, observed, factored, 0.0)
    expected, _, of_own = regress(own, observed, Factored(), 0.0)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert error == pytest.approx(of_own, rel=0.05)


@pytest.fixture(scope="module")
def formed():
    """A bank in which most kernels are held unformed, and its gradients by ``jax.grad``."""
    model, (prior, params) = gx.convnet(width=48, num_classes=3), gx.load_prior("dcgan32_faces")[:2]
    variables = model.init(jax.random.key(0))
    public = gx.Public(model, variables, prior, params)
    bank = banks.make_bank(public, 2, 18, jax.random.key(1))
    gradients = [
        jax.tree.leaves(gx.gradient(model, variables, image, jnp.asarray([2])))
        for image in bank.images.reshape(-1, 1, *model.image_shape)
    ]
    return bank, [np.stack(one) for one in zip(*gradients, strict=True)]


def test_a_bank_knows_each_samples_gradient(formed):
    bank, gradients = formed
    assert [one.leaf for one in bank.held] == list(range(len(gradients)))
    norms = [np.sum(g.reshape(len(g), -1) ** 2, axis=1) for g in gradients]
    known = [np.diagonal(kernel) for kernel in bank.kernels]
    np.testing.assert_allclose(known, norms, rtol=0.02, atol=1e-12)
    for one, arrays, own in zip(bank.held, bank.arrays, gradients, strict=True):
        parts = list(banks._parts(one, np.arange(own[0].size).reshape(own[0].shape) + 1))
        order = np.concatenate(parts)
        found = np.concatenate([np.asarray(x) for x in banks._formed(one, arrays)], axis=1)
        expected = own.reshape(len(own), -1)[:, order[order > 0] - 1]
        scale = float(np.abs(own).max())
        np.testing.assert_allclose(found[:, order > 0], expected, atol=0.02 * scale + 1e-12)
        assert sorted(order[order > 0]) == list(range(1, own[0].size + 1))


def near(found, expected, lengths):
    """Products of gradients of these lengths, which are held in bfloat16."""
    np.testing.assert_allclose(found, expected, atol=0.02 * lengths + 1e-12)


@pytest.mark.parametrize("by_pairs", [False, True])
def test_kernels_are_the_gradients_products(formed, monkeypatch, by_pairs):
    bank, gradients = formed
    monkeypatch.setattr(banks.layers, "pair_work", lambda layer: 0 if by_pairs else 1e12)
    monkeypatch.setattr(banks, "_WIDTHS", (2**4, 2**8))
    unformed = 0
    for one, arrays, own in zip(bank.held, bank.arrays, gradients, strict=True):
        if one.layer is not None and one.layer.positions <= 256:
            g = own.reshape(len(own), -1)
            near(banks._kernel(one, arrays), g @ g.T, np.sum(g**2, axis=1).max())
            unformed += 1
    assert unformed >= 2


@pytest.mark.parametrize("masked", ["not", "a number", "entries"])
def test_products_are_those_of_the_gradients(formed, monkeypatch, masked):
    bank, gradients = formed
    monkeypatch.setattr(banks, "_WIDTHS", (2**4, 2**8))
    rng = np.random.default_rng(0)
    for place, own in enumerate(gradients):
        y = rng.normal(size=own[0].shape).astype(np.float32)
        some = rng.uniform(size=y.shape) < 0.3
        mask = {"not": None, "a number": np.asarray(0.5), "entries": some}[masked]
        g = (own if mask is None else own * mask).reshape(len(own), -1)
        kernel, inner = banks.products(bank, place, y, mask)
        lengths = np.linalg.norm(g, axis=1)
        near(kernel, g @ g.T, lengths.max() ** 2)
        near(inner, g @ y.ravel(), lengths.max() * np.linalg.norm(y))


def test_some_channels_stand_for_all(formed, monkeypatch):
    """Of a large masked kernel: products of its first parts, as large as those of all."""
    bank, gradients = formed
    monkeypatch.setattr(banks, "_WIDTHS", (2**4, 2**8))
    monkeypatch.setattr(banks, "_ENOUGH", 500)
    place = max(range(len(gradients)), key=lambda place: bank.held[place].size)
    own = gradients[place]
    mask = np.random.default_rng(0).uniform(size=own[0].shape) < 0.3
    part = np.zeros_like(mask)
    order = np.arange(own[0].size).reshape(own[0].shape) + 1
    for block in banks._parts(bank.held[place], order):
        part.flat[block[block > 0] - 1] = True
        if np.sum(part & mask) >= 500:
            break
    part &= mask
    assert 500 <= part.sum() < mask.sum() / 2
    kernel, inner = banks.products(bank, place, own[3] * mask, mask, thin=True)
    g = (own * part).reshape(len(own), -1) * np.sqrt(mask.sum() / part.sum())
    near(kernel, g @ g.T, np.sum(g**2, axis=1).max())
    near(inner, g @ g[3], np.sum(g**2, axis=1).max())


@pytest.mark.parametrize("thin", [False, True])
def test_a_bank_for_one_update_works_its_products_out(formed, monkeypatch, thin):
    """Thinned without a mask as by one of ones; whole as those of any bank."""
    bank, gradients = formed
    monkeypatch.setattr(banks, "_WIDTHS", (2**4, 2**8))
    monkeypatch.setattr(banks, "_ENOUGH", 500)
    once = bank._replace(kernels=None)
    for place, own in enumerate(gradients):
        mask = np.ones(own[0].shape) if thin and own[0].size > 1 else None
        expected = banks.products(bank, place, own[3], mask, thin=thin)
        found = banks.products(once, place, own[3], None, thin=thin)
        for one, other in zip(found, expected, strict=True):
            near(one, other, np.sum(own.reshape(len(own), -1) ** 2, axis=1).max())


def test_the_factor_is_the_residuals_covariance():
    rng = np.random.default_rng(0)
    residuals = rng.normal(size=(50, 12)).astype(np.float32) * 0.1
    guess = regression.guess_of(np.zeros(12, np.float32), residuals)
    covariance = np.asarray(guess.factor @ guess.factor.T)
    expected = residuals.T @ residuals / 50 + regression._FLOOR**2 * np.eye(12)
    np.testing.assert_allclose(covariance, expected, atol=1e-5)


@pytest.fixture(scope="module")
def public(tiny_model, tiny_variables, tiny_prior, tiny_prior_params):
    return gx.Public(tiny_model, tiny_variables, tiny_prior, tiny_prior_params)


def shared_sample(public, defense):
    """A sample of the prior that no bank here holds, what its client sends, and the defense."""
    latent = public.prior.sample_latent(jax.random.key(123), 1)
    image = public.prior.apply(public.prior_params, latent, jnp.zeros(1, int))
    defended = gx.parse(defense)
    sent, _ = gx.share(jax.random.key(1), public, image, np.asarray([2]), defense=defended)
    return image, sent, defended


def reconstructed(public, sent, view, attack, **options):
    search = gx.search_of("quick", attack, bank=60, **options)
    keys = jax.random.split(jax.random.key(0), 1)
    (one,) = gx.reconstruct(keys, public, [sent], view=view, search=search)
    return one


@pytest.mark.parametrize("defense", ["none", "noise:0.001"])
def test_map_gets_nearer_than_what_it_starts_from(public, defense):
    """The mean of the bank, then the regression, then the search: each nearer than the last."""
    image, sent, defended = shared_sample(public, defense)
    found = {}
    for attack in ("regression", "map"):
        one = found[attack] = reconstructed(public, sent, defended.view, attack, refine="none")
        assert one.labels == [2]
    blind = np.mean((banks.bank_of(public, 2, 60).images.mean(0) - image.ravel()) ** 2)
    errors = {name: np.mean((one.images - image) ** 2) for name, one in found.items()}
    assert errors["regression"] < 0.8 * blind
    assert errors["map"] < errors["regression"]
    # Predicted from the bank alone, before the private image is looked at.
    predicted = found["regression"].search["predicted_rmse"] ** 2
    assert 0.3 < errors["regression"] / predicted < 3


def test_under_noise_the_prior_fits_what_was_found(public):
    """``auto``: without noise pixels, with noise a mean with the generator's fits."""
    for defense, refine in [("none", "generator"), ("noise:0.001", "auto")]:
        _, sent, defended = shared_sample(public, defense)
        plain, one = (
            reconstructed(public, sent, defended.view, "map", refine=how, steps=3)
            for how in ("none", refine)
        )
        assert [plain.search["fitted"], one.search["fitted"]] == [False, True]
        assert not one.search["refined"]
        images = project(public.prior, public.prior_params, plain.images, jax.random.key(0))
        assert np.abs(images - plain.images).max() > 0.01
        if refine == "auto":
            read = reconstructed(public, sent, defended.view, "regression").images
            assert np.abs(read - plain.images).max() > 0.01
            images = (plain.images + images + read) / 3
        np.testing.assert_allclose(one.images, images, atol=1e-6)
    _, sent, defended = shared_sample(public, "none")
    one = reconstructed(public, sent, defended.view, "map", steps=3, refine_steps=2)
    assert [one.search["refined"], one.search["fitted"]] == [True, False]
    # What is within the generator already is left there.
    defended = gx.parse("noise:0.1")
    assert not stages.fits(gx.search_of("quick", "ggl"), defended.view)
    assert not stages.fits(gx.search_of("quick", "regression"), defended.view)


@pytest.mark.parametrize(
    # Samples at the shared variables read Soteria's update to 0.32.
    ("defense", "most"),
    [("clip:0.1", 0.8), ("sparsify:0.5", 0.8), ("soteria:0.2", 0.15)],
)
def test_defended_updates_are_read_through_the_defense(public, defense, most):
    image, sent, defended = shared_sample(public, defense)
    bank = banks.bank_of(public, 2, 60)
    view = defended.view.comparing(True)
    estimated = view.estimate(sent.update, public.model.head)
    variables = public.variables
    problem = gx.Problem(sent.update, variables, public.prior_params, jnp.asarray([2]), estimated)
    guess = regression.read(public, problem, view, gx.Client(), 60).guess
    error = np.mean((guess.mean - np.ravel(image)) ** 2)
    blind = np.mean((bank.images.mean(0) - np.ravel(image)) ** 2)
    assert error < most * blind


def test_defenses_alike_share_one_search(public):
    """Their parameters are data: none, noise, clips and their chains compile once."""
    programs = set()
    alike = "none", "clip:0.5", "noise:0.001", "clip:0.5+noise:0.001", "soteria:0.2"
    for defense in (*alike, "clip:2+clip:0.5"):
        _, sent, defended = shared_sample(public, defense)
        one = reconstructed(public, sent, defended.view, "map", steps=2, refine_steps=2)
        programs.add(one.attack)
        assert len(one.history) == (3 if defended.view.adds_noise else 5), defense
    (attack,) = programs
    steps = _compiled(attack, False)[1]._cache_size()
    # All but one are one; a chain of two clips has a form of its own.
    assert steps == 2, steps


@pytest.mark.parametrize(
    "defense", ["none", "clip:0.5", "sparsify:0.5", "clip:0.5+clip:0.2", "soteria:0.2"]
)
def test_a_factored_form_as_data_is_the_defense(public, defense):
    _, sent, defended = shared_sample(public, defense)
    view = defended.view.comparing(True)
    params = public.variables["params"]
    estimated = view.estimate(sent.update, public.model.head)
    head = public.model.head
    form = as_data(view, estimated, public.variables, head)
    other = jax.tree.map(lambda w: w + 0.1, params)
    found, expected = FACTORED.simulate(form, other), view.simulate(estimated, other)
    assert_same(found, expected)
    expected = public.variables
    if view.rewire is not None:
        expected = view.rewire(estimated, public.variables, head)
        kernels = [trees.head_parts(v["params"], head)[0] for v in (public.variables, expected)]
        assert jnp.any(kernels[0] != kernels[1])
    assert_same(FACTORED.rewire(form, public.variables, head), expected)
    _, arrays = jax.tree.flatten(form)
    assert arrays == jax.tree.flatten(jax.tree.map(jnp.zeros_like, form))[1]


def test_a_scale_that_is_a_function_is_no_data(public):
    known = public.variables, public.model.head
    view = gx.parse("clip:1").view
    plain = view._replace(factor=lambda _: Factored(scale=lambda squares: squares))
    assert as_data(plain, {}, *known) is None


def test_other_variables_than_the_last_kernel_are_no_data(public):
    def rewire(estimated, variables, head):
        return jax.tree.map(lambda w: 2 * w, variables)

    view = gx.parse("none").view._replace(rewire=rewire)
    assert as_data(view, {}, public.variables, public.model.head) is None


def assert_same(found, expected):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_the_distance_is_weighed_by_that_of_the_guess(public):
    """The distance of the guess counts SHARPNESS for each pixel."""
    _, sent, defended = shared_sample(public, "none")
    one = reconstructed(public, sent, defended.view, "map", steps=2, refine="none")
    guess = one.problem.guess
    assert guess.weight == 1
    assert guess.smooth == 0
    at_guess = one.history[0]
    assert guess.sharpness * at_guess == pytest.approx(stages.SHARPNESS * 192, rel=1e-4)


@pytest.mark.parametrize("defense", ["none", "clip:0.5"])
@pytest.mark.parametrize(
    ("attack", "options"),
    [
        ("ig", {}),
        ("dlg", {}),
        ("ggl", {"optimizer": "adam"}),
        ("ggl", {"optimizer": "adam", "bound": "tanh"}),
    ],
)
def test_any_search_may_start_at_what_was_read(public, defense, attack, options):
    image, sent, defended = shared_sample(public, defense)
    read = reconstructed(public, sent, defended.view, "regression").images
    options = {**options, "steps": 1, "restarts": 2, "refine": "none", "finalists": 0}
    options = {**options, "combine": "best", "start": "reading", "adaptive": True}
    one = reconstructed(public, sent, defended.view, attack, **options)
    expected = read
    if attack == "ggl":  # and of the first step's two candidates that of lower loss is kept
        expected = np.asarray(
            fit_latents(public.prior, public.prior_params, read[:, :], jax.random.key(0))[1]
        )
    blind = np.mean((banks.bank_of(public, 2, 60).images.mean(0) - image.ravel()) ** 2)
    assert np.mean((one.images - expected) ** 2) < 0.3 * blind
    assert one.search["predicted_rmse"] > 0


def test_searches_whose_loss_hardly_falls_keep_the_reading(public, monkeypatch):
    """Both of them; under noise, which no candidate takes away, what was searched counts."""
    found = {}
    for accept in (0.0, 1.0):
        monkeypatch.setattr(stages, "ACCEPT", accept)
        reconstruct.prepare.cache_clear()
        for defense in ("none", "noise:0.001"):
            _, sent, defended = shared_sample(public, defense)
            options = {"steps": 3, "refine_steps": 3, "refine": "pixels"}
            one = reconstructed(public, sent, defended.view, "map", **options)
            found[defense, accept] = one.images
            read = reconstructed(public, sent, defended.view, "regression").images
            kept = np.allclose(one.images, read, atol=1e-6)
            assert kept == (defense == "none" and accept == 0)
    reconstruct.prepare.cache_clear()
    np.testing.assert_array_equal(found["noise:0.001", 0.0], found["noise:0.001", 1.0])


def test_what_cannot_be_read_starts_from_the_samples(public):
    """Several images, several steps: the guess is the samples' mean and covariance."""
    images = np.full((2, 8, 8, 3), 0.4, np.float32)
    for client in (gx.Client(batch_size=2), gx.Client(local_steps=2)):
        sent, _ = gx.share(
            jax.random.key(1),
            public,
            images[: client.batch_size],
            np.zeros(client.batch_size, int),
            defense=gx.parse("none"),
            client=client,
        )
        (one,) = gx.reconstruct(
            jax.random.split(jax.random.key(0), 1),
            public,
            [sent],
            view=gx.parse("none").view,
            client=client,
            search=gx.search_of("quick", "regression", bank=60),
        )
        bank = banks.bank_of(public, int(one.labels[0]), 60).images
        np.testing.assert_allclose(one.images[0].ravel(), bank.mean(0), atol=1e-4)


def test_what_noise_drowns_is_not_read(public):
    """Where the regression expects a larger error than that of the samples' mean, that is taken."""
    bank = banks.bank_of(public, 2, 60)
    _, sent, _ = shared_sample(public, "none")
    for noise in (0.0, 1e4):
        drawn = jax.tree.map(lambda g, s=noise: g + s, sent.update)
        problem = gx.Problem(drawn, *public[1::2], jnp.asarray([2]), {}, np.float32(noise))
        found = regression.read(public, problem, None, gx.Client(), 60)
        blind = bank.images.mean(0)
        spread = np.sqrt(np.mean((bank.images - blind) ** 2))
        if noise:
            np.testing.assert_allclose(found.guess.mean, blind, atol=1e-6)
            assert found.rmse == pytest.approx(spread, rel=1e-5)
        else:
            assert found.rmse < 0.8 * spread


def test_a_search_of_whitened_pixels_needs_a_bank(public):
    with pytest.raises(gx.GGLError, match="bank: got 1"):
        gx.search_attack(public.model, public.prior, gx.search_of("quick", "map", bank=1))


def test_the_search_lowers_for_accelerators(public):
    """Without such a device: no callback to the host, nothing that only the CPU has."""
    attack = gx.search_attack(public.model, public.prior, gx.search_of("quick", "map", bank=60))
    problem = gx.Problem(
        public.variables["params"],
        public.variables,
        public.prior_params,
        jnp.asarray([1]),
        (),
        guess=Guess(jnp.zeros(192), jnp.zeros((192, 192))),
    )
    key = jax.random.key(0)
    state = jax.eval_shape(attack.init, key, problem)
    traced = jax.jit(attack.step).trace(key, problem, state)
    for platform in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "callback" not in text
