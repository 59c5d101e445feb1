"""The attacks: published settings, adaptivity, stages, and what each searches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import attack_of
from flax import linen as nn

import ggl_jax as gx
from ggl_jax.adversary.attack import refinement_of
from ggl_jax.adversary.attacks import ATTACKS, search_of
from ggl_jax.adversary.estimation import estimate, noise_level
from ggl_jax.adversary.losses import parse_regularizer
from ggl_jax.adversary.search import Stage, run_stages
from ggl_jax.adversary.stages import mean_image
from ggl_jax.audit import data
from ggl_jax.errors import GGLError
from ggl_jax.priors.pixels import pixels_of
from ggl_jax.types import Candidates, Problem


class SmoothNet(nn.Module):
    """Sigmoids, as DLG wants: second derivatives everywhere."""

    @nn.compact
    def __call__(self, x):
        x = nn.sigmoid(nn.Conv(12, (5, 5), strides=2)(x))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def model():
    return gx.from_flax(SmoothNet(), image_shape=(8, 8, 3))


@pytest.fixture(scope="module")
def variables(model):
    return jax.tree.map(lambda w: 3 * w, model.init(jax.random.key(7)))


def problem_of(model, variables, image, label, spec="none"):
    defense = gx.parse(spec)
    images, labels = image[None], jnp.asarray([label])
    update = jax.jit(gx.gradient, static_argnums=0)(model, variables, images, labels)
    context = gx.Context(model, variables, images, labels)
    observed, _ = defense.apply(jax.random.key(1), update, context)
    estimated = estimate(defense.view, observed, model.head)
    noise = noise_level(defense.view, estimated)
    return defense, Problem(observed, variables, {}, labels, estimated, noise)


def psnr(a, b):
    return float(-10 * jnp.log10(jnp.mean((jnp.clip(a, 0, 1) - b) ** 2)))


def test_published_settings():
    ig = search_of("paper", "ig")
    assert (ig.steps, ig.restarts, ig.adaptive, ig.distance) == (8000, 4, False, "cosine")
    assert search_of() == gx.Search() == ATTACKS["ggl"]
    assert gx.Search().adaptive
    # What is given wins; what was published for another optimiser does not apply.
    other = search_of("paper", "ig", "cma_es", steps=5, adaptive=True)
    assert (other.steps, other.adaptive, other.optimizer) == (5, True, "cma_es")
    # The published code of GGL: D1 over the number of tensors but for Adam, which starts at noise.
    code = search_of("code")
    assert (code.distance, code.optimizer, code.steps) == ("mean_squared_l2", "cma_es:18", 2222)
    assert search_of("code", optimizer="cma_es:50").optimizer == "cma_es"
    assert (code.regularizer, code.labels) == ("kld_mean:0.1", "smallest")
    adam = search_of("code", optimizer="adam")
    assert (adam.start, adam.distance, adam.steps) == ("normal", "squared_l2", 2500)
    assert search_of("code", "dlg").distance == "squared_l2"
    assert search_of(optimizer="adam").start == "zeros"
    for wrong, words in (
        ({"attack": "idgl"}, "did you mean 'idlg'"),
        ({"preset": "qiuck"}, "did you mean 'quick'"),
        ({"optimizer": "adm"}, "did you mean 'adam'"),
        ({"stps": 4}, "did you mean 'steps'"),
    ):
        with pytest.raises(GGLError, match=words):
            search_of(**wrong)


def test_presets_change_what_they_name():
    for preset, attacks in gx.PRESETS.items():
        for name, changes in attacks.items():
            attack, _, optimizer = name.partition("/")
            found = search_of(preset, attack, optimizer or None)
            assert changes.items() <= dataclasses.asdict(found).items()
    # Options of the optimiser that are not named are the preset's.
    named = search_of("quick", optimizer="adam:0.05,signed=True")
    assert named.optimizer == "adam:0.05,schedule=ramp"
    assert search_of("quick", optimizer="turbo").optimizer == "turbo"


@pytest.mark.parametrize("name", ["dlg", "idlg", "ig", "gi"])
def test_baselines_find_the_image(name, model, variables, tiny_images, tiny_prior):
    defense, problem = problem_of(model, variables, tiny_images[0], 1)
    # The tiny prior's images are not smooth. L-BFGS diverges from some starts.
    options = {"restarts": 8, "steps": 150, "regularizer": "none"}
    if name in ("ig", "gi"):
        options["optimizer"] = "adam:0.05"
    attack = attack_of(name, model, tiny_prior, view=defense.view, **options)
    found = gx.run_search(attack, jax.random.split(jax.random.key(3), 1), [problem], steps=150)
    assert psnr(found.images[0], tiny_images[:1]) > 20
    assert found.labels[0, 0] == 1  # DLG had to find it
    assert bool(jnp.all(jnp.diff(found.candidates.losses[0]) >= 0))
    np.testing.assert_array_equal(found.losses, found.distances)


def test_adaptive_attacks_see_the_defense(model, variables, tiny_images, tiny_prior):
    defense, problem = problem_of(model, variables, tiny_images[0], 1, "clip:0.05")
    losses = {}
    for adaptive in (True, False):
        attack = attack_of(
            "ig",
            model,
            tiny_prior,
            view=defense.view,
            adaptive=adaptive,
            distance="squared_l2",
            restarts=1,
            steps=1,
            regularizer="none",
        )
        key = jax.random.key(0)
        state = jax.jit(attack.init)(key, problem, pixels_of(tiny_images[None, :1]))
        losses[adaptive] = float(jax.jit(attack.step)(key, problem, state)[1].losses[0])
    assert losses[True] < 1e-6  # the private image itself, clipped as the client's
    assert losses[False] > 1e-3


def test_the_best_of_the_pool_start(tiny_model, tiny_variables, tiny_prior, tiny_prior_params):
    z = jnp.asarray([0.4, -1.0, 0.2, 0.9])
    image = tiny_prior.apply(tiny_prior_params, z[None], jnp.asarray([0]))[0]
    _, problem = problem_of(tiny_model, tiny_variables, image, 0)
    problem = problem._replace(prior_params=tiny_prior_params)
    attack = attack_of(
        "ggl",
        tiny_model,
        tiny_prior,
        optimizer="adam",
        steps=1,
        restarts=2,
        pool=64,
        regularizer="none",
    )
    state = jax.jit(attack.init)(jax.random.key(0), problem)
    points = tiny_prior.sample_latent(
        jax.random.split(jax.random.split(jax.random.key(0))[0])[0], 64
    )
    images = tiny_prior.apply(tiny_prior_params, points, jnp.zeros(64, jnp.int32))
    loss = gx.matching_loss(tiny_model, tiny_variables, problem.observed)
    losses = jax.jit(loss)(images[:, None], problem.labels)
    np.testing.assert_allclose(state.latents, points[jnp.argsort(losses)[:2]], atol=1e-6)
    assert attack.evaluations_at_start == 64


def test_refinement_leaves_the_prior_behind(model, variables, tiny_images, tiny_prior):
    defense, problem = problem_of(model, variables, tiny_images[0], 1)
    problem = problem._replace(prior_params=tiny_prior.init(jax.random.key(0)))
    search = attack_of("ggl", model, tiny_prior, optimizer="cma_es:8", view=defense.view, steps=5)
    pixels = dataclasses.replace(
        refinement_of(gx.Search(refine_steps=150)),
        optimizer="adam:0.05,schedule=ramp,signed=False,box=1",
        regularizer="none",
    )
    refine = gx.search_attack(model, tiny_prior, pixels, view=defense.view)
    stages = [
        Stage(search, 5),
        Stage(refine, 150, lambda found: jax.vmap(pixels_of)(jnp.clip(found.images[:, :1], 0, 1))),
    ]
    keys, seen = jax.random.split(jax.random.key(3), 1), []
    found = run_stages(stages, keys, [problem], callback=lambda done, losses: seen.append(done))
    alone = gx.run_search(search, keys, [problem], steps=5)
    assert psnr(found.images[0], tiny_images[:1]) > psnr(alone.images[0], tiny_images[:1]) + 10
    assert found.evaluations == 5 * 8 + 150
    assert found.history.shape == (1, 155)
    assert seen == list(range(1, 156))


def test_regularizers_by_hand():
    latents = jnp.asarray([[[1.0, 3.0]]])  # mean 2, variance 1, norm^2 10
    nothing = jnp.zeros((1, 1, 1, 1, 1))
    # KLD to N(0, 1): (variance + mean^2 - 1 - log variance) / 2, once, or for each of 2 entries.
    for name, expected in (("kld_mean", 2.0), ("kld", 4.0)):
        found = parse_regularizer(name)(latents, nothing)
        np.testing.assert_allclose(found, [expected], rtol=1e-6)
    np.testing.assert_allclose(parse_regularizer("norm:0.5")(latents, nothing), [0.5 * 8.0**2])
    code = parse_regularizer("norm_score:0.5")
    np.testing.assert_allclose(code(latents, nothing), [0.5 * 9.0**2])
    assert not jax.grad(lambda z: code(z, nothing)[0])(latents).any()
    # [-1, 1]: vertical differences 0.4 and 0.4, horizontal 0.8 and 0.8.
    image = jnp.asarray([[0.5, 0.9], [0.7, 1.1]])[None, None, ..., None] - 0.1
    zeros = jnp.zeros((1, 1, 1))
    np.testing.assert_allclose(parse_regularizer("total_variation")(zeros, image), [1.2], rtol=1e-6)
    np.testing.assert_allclose(
        parse_regularizer("l2")(zeros, image), [(0.2**2 + 0.6**2 + 0.2**2 + 1.0) / 4], rtol=1e-5
    )
    both = parse_regularizer("total_variation:2+l2:0")(zeros, image)
    np.testing.assert_allclose(both, [2.4], rtol=1e-6)


def test_group_consistency():
    group = parse_regularizer("group:2")
    images = jnp.stack([jnp.full((1, 2, 2, 1), value) for value in (0.25, 0.75)])
    # Means at 0.5: 0.25 in [0, 1] is 0.5 in [-1, 1].
    np.testing.assert_allclose(group(jnp.zeros((2, 1, 1)), images), 2 * 0.25)
    assert float(group(jnp.zeros((1, 1, 1)), images[:1])[0]) == 0.0
    pull = jax.grad(lambda x: jnp.sum(group(jnp.zeros((2, 1, 1)), x)))(images)
    assert bool(jnp.all(pull[0] < 0) and jnp.all(pull[1] > 0))


def test_likelihood_scales_by_the_noise(model, variables, tiny_images, tiny_prior):
    defense, problem = problem_of(model, variables, tiny_images[0], 1, "clip:1+noise:0.05")
    options = {"optimizer": "adam", "steps": 1, "restarts": 1}
    losses = []
    for distance in ("squared_l2", "likelihood"):
        attack = attack_of(
            "ig",
            model,
            tiny_prior,
            view=defense.view,
            regularizer="none",
            **options,
            distance=distance,
        )
        key = jax.random.key(0)
        state = jax.jit(attack.init)(key, problem, pixels_of(tiny_images[None, 1:]))
        losses.append(float(jax.jit(attack.step)(key, problem, state)[1].losses[0]))
    sigma = float(problem.estimated[1]["sigma"])
    assert losses[1] == pytest.approx(losses[0] / (2 * sigma**2), rel=1e-5)
    # Minus log-likelihood: at any other level of noise it is as if the update told more or less.
    gaussian = parse_regularizer("gaussian")(jnp.full((1, 2, 3), 2.0), tiny_images[None])
    assert float(gaussian[0]) == pytest.approx(0.5 * 6 * 4)


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_relative_distances(noise, model, variables, tiny_images, tiny_prior):
    _, problem = problem_of(model, variables, tiny_images[0], 1)
    problem = problem._replace(noise=jnp.float32(noise))
    losses = {}
    for relative in (False, True):
        attack = attack_of(
            "gi", model, tiny_prior, steps=1, restarts=1, relative=relative, regularizer="none"
        )
        key = jax.random.key(0)
        state = jax.jit(attack.init)(key, problem, pixels_of(tiny_images[None, 1:]))
        losses[relative] = float(jax.jit(attack.step)(key, problem, state)[1].losses[0])
    leaves = jax.tree.leaves(problem.observed)
    squares, entries = sum(float(jnp.sum(y**2)) for y in leaves), sum(y.size for y in leaves)
    left = max(squares - entries * noise**2, 1e-3 * squares)
    assert losses[True] == pytest.approx(losses[False] / left, rel=1e-3)


def test_noise_changes_what_is_combined_and_refined(tiny_model, tiny_prior):
    search = gx.Search(
        optimizer="adam", restarts=4, finalists=2, combine="auto", refine="auto", steps=3
    )
    names = {
        spec: [stage.attack.name for stage in gx.make_stages(
            search, tiny_model, tiny_prior, gx.parse(spec).view)]
        for spec in ("clip:1", "clip:1+noise:0.1")
    }  # fmt: skip
    assert names == {"clip:1": ["ggl", "ggl", "refine"], "clip:1+noise:0.1": ["ggl"]}
    images = jnp.stack([jnp.full((1, 2, 2, 1), value) for value in (0.2, 0.4, 1.8)])[None]
    found = Candidates(None, images, None, None, None)
    np.testing.assert_allclose(mean_image(found), jnp.full((1, 1, 2, 2, 1), 1.6 / 3), rtol=1e-6)
    with pytest.raises(GGLError, match="combine: got 'average'"):
        gx.make_stages(
            dataclasses.replace(search, combine="average"), tiny_model, tiny_prior,
            gx.parse("none").view,
        )  # fmt: skip


def test_dlg_inverts_lenet_and_fails_under_noise():
    image = data.load("embedded", image_size=16).images[0]
    model = gx.lenet(num_classes=10, image_shape=(16, 16, 3))
    variables = model.init(jax.random.key(0))
    attack = attack_of("dlg", model, None, steps=300, restarts=1)
    found = {}
    for spec, steps in (("none", 300), ("noise:0.1", 100)):
        _, problem = problem_of(model, variables, jnp.asarray(image), 3, spec)
        keys = jax.random.split(jax.random.key(5), 1)
        found[spec] = gx.run_search(attack, keys, [problem], steps=steps)
    assert psnr(found["none"].images[0], image[None]) > 30
    assert int(found["none"].labels[0, 0]) == 3
    assert psnr(found["noise:0.1"].images[0], image[None]) < 12


class NormNet(nn.Module):
    """Convolutions with BatchNorm, one of them inside a submodule."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="outer")(x))
        x = nn.Sequential([nn.Conv(5, (3, 3)), nn.BatchNorm(use_running_average=True)])(x)
        return nn.Dense(3)(nn.relu(x).reshape(x.shape[0], -1))


@pytest.mark.slow
def test_batch_norm_statistics(tiny_images, tiny_prior):
    model = gx.from_flax(NormNet(), image_shape=(8, 8, 3))
    variables = model.init(jax.random.key(0))
    found = model.statistics(variables, tiny_images)
    assert jax.tree.structure(found) == jax.tree.structure(variables["batch_stats"])
    # By hand: the first layer's input is the first convolution's output.
    y = jax.lax.conv_general_dilated(
        2 * tiny_images - 1, variables["params"]["conv"]["kernel"], (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ) + variables["params"]["conv"]["bias"]  # fmt: skip
    np.testing.assert_allclose(found["outer"]["mean"], np.mean(y, (0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["outer"]["var"], np.var(y, (0, 1, 2)), rtol=1e-4, atol=1e-5)
    # A sum of l2 norms, 0 for the client's own batch; running ones stand in where none are shared.
    weight = 0.5
    _, problem = problem_of(model, variables, tiny_images[0], 1)
    losses = {}
    for name, penalty, statistics in (
        ("without", "none", None),
        ("own", f"batch_norm:{weight}", model.statistics(variables, tiny_images[1:])),
        ("batch", f"l2:0+batch_norm:{weight}", found),
        ("running", f"batch_norm:{weight}", None),
    ):
        attack = attack_of(
            "gi",
            model,
            tiny_prior,
            speed=gx.Speed(method="direct"),
            steps=1,
            restarts=1,
            regularizer=penalty,
        )
        given = problem._replace(statistics=statistics)
        state = jax.jit(attack.init)(jax.random.key(0), given, pixels_of(tiny_images[None, 1:]))
        state, info = jax.jit(attack.step)(jax.random.key(0), given, state)
        losses[name] = float(info.losses[0])
        distance = float(attack.candidates(given, state).distances[0])
        assert distance == pytest.approx(losses["without"], rel=1e-4)
    assert losses["own"] == pytest.approx(losses["without"], rel=1e-5)
    alone = gx.from_flax(NormNet(), image_shape=(8, 8, 3)).statistics(variables, tiny_images[1:])
    expected = sum(
        float(np.linalg.norm(np.asarray(a) - np.asarray(b)))
        for a, b in zip(
            jax.tree.leaves(alone), jax.tree.leaves(variables["batch_stats"]), strict=True
        )
    )
    assert losses["running"] - losses["without"] == pytest.approx(weight * expected, rel=1e-3)
    assert losses["own"] < losses["batch"]


def test_batch_norm_needs_statistics(model, tiny_images, tiny_prior, tiny_prior_params):
    assert model.statistics is None
    with pytest.raises(GGLError, match="batch_norm needs a model with BatchNorm"):
        attack_of("gi", model, tiny_prior, regularizer="l2+batch_norm:1")
    with pytest.raises(GGLError, match="share_statistics"):
        gx.audit(
            tiny_images, [0, 1], model=model, defenses=["none"], prior=tiny_prior,
            prior_params=tiny_prior_params, client=gx.Client(share_statistics=True),
        )  # fmt: skip


def test_shared_statistics_reach_the_search(tiny_images, tiny_prior, tiny_prior_params):
    model = gx.from_flax(NormNet(), image_shape=(8, 8, 3))
    losses = []
    for share in (False, True):
        result = gx.audit(
            tiny_images, [0, 1], model=model, defenses=["none"], prior=tiny_prior,
            prior_params=tiny_prior_params, num_controls=4, ceiling_steps=2,
            client=gx.Client(share_statistics=share),
            search=gx.search_of("paper", "gi", steps=1, restarts=2, regularizer="batch_norm:1"),
            speed=gx.Speed(instances=2, method="direct"),
        )  # fmt: skip
        losses.append([row["loss"] for row in result.rows])
    assert losses[0] != losses[1]


def test_unknown_options_are_refused(model, tiny_prior):
    with pytest.raises(GGLError, match=r"regularizr.*did you mean 'regularizer'"):
        attack_of("gi", model, tiny_prior, regularizr="none")
    with pytest.raises(GGLError, match=r"'popsize=8' in .*cma_es takes population, sigma0"):
        gx.search_attack(model, tiny_prior, gx.Search(optimizer="cma_es:popsize=8"))
    with pytest.raises(GGLError, match=r"learning_rate=0.1' in .* is not understood; cma_es"):
        search_of(optimizer="cma_es:learning_rate=0.1")
    with pytest.raises(GGLError, match="restarts: got 0"):
        gx.search_attack(model, tiny_prior, gx.Search(restarts=0))


def test_every_option_of_an_optimizer_is_reachable(model, tiny_prior):
    for text in ("turbo:num_initial=10", "lbfgs_wolfe:5", "cma_es:std_min=1e-3", "adam:box=2"):
        assert gx.search_attack(model, tiny_prior, gx.Search(optimizer=text)).name == "ggl"


def test_stages_need_what_they_work_on(model, tiny_prior):
    with pytest.raises(GGLError, match="local_steps: soteria"):
        gx.make_stages(
            gx.Search(),
            model,
            tiny_prior,
            gx.parse("soteria:0.5").view,
            client=gx.Client(local_steps=2),
        )
    for name in ("final_steps", "refine_steps"):
        with pytest.raises(GGLError, match=f"{name}: got 0"):
            gx.make_stages(
                gx.Search(**{name: 0}), model, tiny_prior, gx.parse("none").view
            )  # fmt: skip


def test_refinement_keeps_the_attacks_distance(model, variables, tiny_images, tiny_prior):
    _, problem = problem_of(model, variables, tiny_images[0], 1)
    for attack, distance in (("ig", "cosine"), ("gi", "squared_l2")):
        settings = gx.search_of("paper", attack, refine="pixels", refine_steps=2, steps=2)
        stages = gx.make_stages(settings, model, tiny_prior, gx.parse("none").view)
        distances = jax.jit(stages[-1].attack.distances)
        found = distances(problem, tiny_images[1:, None], problem.labels)
        expected = gx.matching_loss(model, variables, problem.observed, distance=distance)
        # Relative to an update of zero, whose cosine distance is 1.
        scale = 1.0
        if distance == "squared_l2":
            scale = sum(float(jnp.sum(y**2)) for y in jax.tree.leaves(problem.observed))
        np.testing.assert_allclose(
            found, jax.jit(expected)(tiny_images[1:, None], problem.labels) / scale, rtol=1e-4
        )


def test_a_mean_finds_the_order_of_a_batch():
    # Two restarts found the same three images in other places; the labels of two are equal.
    images = jnp.stack([jnp.full((2, 2, 1), value) for value in (0.1, 0.9, 0.5)])
    labels = jnp.asarray([[[0, 0, 1], [0, 0, 1]]])
    swapped = images[jnp.asarray([1, 0, 2])] + 0.02
    found = Candidates(None, jnp.stack([images, swapped])[None], labels, None, None)
    np.testing.assert_allclose(mean_image(found)[0], images + 0.01, atol=1e-6)
    # An image of another label is not taken for it, however alike.
    apart = Candidates(None, jnp.stack([images, swapped])[None], labels.at[0, 1].set(
        jnp.asarray([0, 1, 0])), None, None)  # fmt: skip
    first = mean_image(apart)[0, 2]
    np.testing.assert_allclose(first, (images[2] + swapped[1]) / 2, atol=1e-6)


def test_local_steps_cost_a_gradient_each(model, tiny_prior):
    one, three = (
        attack_of(
            "ggl",
            model,
            tiny_prior,
            optimizer="cma_es:8",
            client=gx.Client(local_steps=steps),
            pool=5,
        )
        for steps in (1, 3)
    )
    assert (one.evaluations_per_step, one.evaluations_at_start) == (8, 5)
    assert (three.evaluations_per_step, three.evaluations_at_start) == (24, 15)


def test_given_points_need_no_pool(model, variables, tiny_images, tiny_prior):
    _, problem = problem_of(model, variables, tiny_images[0], 1)
    attack = attack_of("gi", model, tiny_prior, pool=6, restarts=1, steps=2)
    key = jax.random.split(jax.random.key(0), 1)
    points = pixels_of(tiny_images[1:2])[None]
    assert gx.run_search(attack, key, [problem], steps=2, points=points).evaluations == 2
    assert gx.run_search(attack, key, [problem], steps=2).evaluations == 8
