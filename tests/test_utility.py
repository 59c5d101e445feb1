"""Federated training under defenses, epsilon of a clip followed by noise, and their report."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from conftest import TINY_SHAPE
from flax import linen as nn
from scipy.stats import norm
from test_report import Page, make_row, make_sweep, write

import ggl_jax as gx
from ggl_jax import files
from ggl_jax.audit import folder as folders
from ggl_jax.audit import privacy, training, utility
from ggl_jax.audit.paper import FORMS
from ggl_jax.cli import run
from ggl_jax.client.defenses import clip, in_code, noise, parse


class Line(nn.Module):
    """One Dense layer: enough to tell bright from dark, and quick to compile."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x.reshape(len(x), -1))


@pytest.fixture(scope="module")
def toy():
    """Forty bright and sixty dark images, and a model that can tell them apart."""
    rng = np.random.default_rng(2)
    labels = (np.arange(100) % 5 < 2).astype(np.int32)
    noise = rng.uniform(-0.2, 0.2, size=(100, 4, 4, 1))
    images = (np.where(labels, 0.7, 0.3)[:, None, None, None] + noise).astype(np.float32)
    settings = utility.UtilitySettings(rounds=20, clients=2, batch_size=8, learning_rate=(0.1,))
    return {
        "images": images,
        "labels": labels,
        "model": gx.from_flax(Line(), image_shape=(4, 4, 1)),
        "settings": settings,
    }


# --- training -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards():
    """Two clients with three images each."""
    rng = np.random.default_rng(0)
    return (
        rng.uniform(size=(2, 3, *TINY_SHAPE)).astype(np.float32),
        rng.integers(0, 3, size=(2, 3)).astype(np.int32),
    )


def last(states):
    *_, state = states
    return state


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize("rates", [[0.3, 0.3, 0.3, 0.3], [0.3, 0.2, 0.1, 0.05]])
def test_undefended_training_is_sgd_with_momentum(tiny_model, tiny_variables, shards, rates):
    """Beside a loop in numpy on all six images: every client draws all it has."""
    images, labels = shards
    flat, classes = images.reshape(6, *TINY_SHAPE), labels.reshape(6)

    def loss(params):
        logits, _ = tiny_model.apply({"params": params}, flat)
        return -jnp.mean(jnp.log(jax.nn.softmax(logits))[jnp.arange(6), classes])

    slope = jax.jit(jax.grad(loss))
    params = jax.tree.map(np.asarray, tiny_variables["params"])
    velocity = jax.tree.map(np.zeros_like, params)
    for rate in np.asarray(rates, np.float32):
        step = jax.tree.map(np.asarray, slope(params))
        velocity = jax.tree.map(lambda v, g: np.float32(0.6) * v + g, velocity, step)
        params = jax.tree.map(lambda w, v, rate=rate: w - rate * v, params, velocity)

    settings = training.TrainingSettings(2, batch_size=3, momentum=0.6)
    schedule = 0.3 if len(set(rates)) == 1 else lambda round: jnp.asarray(rates)[round]
    made = training.federated(tiny_model, parse("none"), settings, learning_rate=schedule)
    states = list(training.train(made, jax.random.key(3), tiny_variables, *shards, stops=[3, 4]))
    assert [int(state.round) for state in states] == [3, 4]
    close(states[-1].variables["params"], params)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, tiny_variables["params"])
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_every_client_defends_its_own_update(tiny_model, tiny_variables, shards):
    """A step is the mean of two updates that were clipped one by one, with fresh noise on each."""
    images, labels = shards
    settings = training.TrainingSettings(2, batch_size=3, momentum=0.0)

    def step(defense, key=0):
        made = training.federated(tiny_model, defense, settings, learning_rate=1.0)
        state = last(
            training.train(made, jax.random.key(key), tiny_variables, images, labels, stops=[1])
        )
        return jax.tree.map(jnp.subtract, tiny_variables["params"], state.variables["params"])

    own = [gx.gradient(tiny_model, tiny_variables, images[i], labels[i]) for i in range(2)]
    norms = [np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(one))) for one in own]
    bound = 0.5 * min(norms)
    expected = jax.tree.map(lambda a, b: bound / 2 * (a / norms[0] + b / norms[1]), *own)
    close(step(clip(bound=bound, layerwise=False)), expected, rtol=1e-4)

    noisy = jax.tree.map(jnp.subtract, step(noise(sigma=0.2)), step(parse("none")))
    values = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(noisy)])
    # Two independent draws, averaged: sigma / sqrt(2). Four standard errors.
    assert abs(values.std() / (0.2 / np.sqrt(2)) - 1) < 4 / np.sqrt(2 * values.size)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / np.sqrt(values.size)


def test_accuracy_counts_every_image_once(tiny_model, tiny_variables, monkeypatch):
    monkeypatch.setattr(training, "_EVALUATED_AT_ONCE", 4)
    images = np.random.default_rng(1).uniform(size=(11, *TINY_SHAPE)).astype(np.float32)
    logits, _ = tiny_model.apply(tiny_variables, images)
    labels = np.array(np.argmax(logits, axis=1))
    labels[[0, 9]] = (labels[[0, 9]] + 1) % 3  # the first fills the last batch up
    assert training.accuracy(tiny_model, tiny_variables, images, labels) == pytest.approx(9 / 11)
    broken = jax.tree.map(lambda x: x * jnp.nan, tiny_variables)
    zeros = np.zeros(11, np.int32)
    assert training.accuracy(tiny_model, broken, images, zeros) == 0


@pytest.mark.parametrize(
    "options", [{"clients": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"momentum": 1.0}]
)
def test_training_refuses(tiny_model, options):
    given = {k: v for k, v in options.items() if k != "learning_rate"}
    settings, rate = training.TrainingSettings(**given), options.get("learning_rate", 0.1)
    with pytest.raises(gx.GGLError, match=next(iter(options))):
        training.federated(tiny_model, parse("none"), settings, learning_rate=rate)


# --- epsilon ------------------------------------------------------------------------------------


def closed_form(sensitivity, sigma, delta):
    """Balle and Wang 2018, theorem 8, solved for epsilon."""
    ratio = sensitivity / sigma

    def excess(eps):
        tail = np.exp(eps + norm.logcdf(-ratio / 2 - eps / ratio))
        return norm.cdf(ratio / 2 - eps / ratio) - tail - delta

    return scipy.optimize.brentq(excess, 0, ratio**2 + 50 * ratio)


@pytest.mark.parametrize(
    ("bound", "sigma", "rounds", "delta"),
    [(1.0, 1.0, 1, 1e-5), (4.0, 8.0, 30, 1e-6), (0.5, 10.0, 9, 1e-3), (31.5, 1.0, 1, 1e-5)],
)
def test_epsilon_is_that_of_the_analytic_gaussian_mechanism(bound, sigma, rounds, delta):
    pytest.importorskip("dp_accounting")
    reach = np.sqrt(rounds)
    for adjacency, factor in (("add_remove", 1), ("replace", 2)):
        found = privacy.epsilon(bound, sigma, rounds=rounds, delta=delta, adjacency=adjacency)
        assert found == pytest.approx(closed_form(factor * bound * reach, sigma, delta), rel=1e-6)


def test_composition_is_that_of_a_numerical_accountant():
    dp = pytest.importorskip("dp_accounting")
    event = dp.SelfComposedDpEvent(dp.GaussianDpEvent(6.0 / 1.5), 25)
    accountant = dp.pld.PLDAccountant(value_discretization_interval=1e-3).compose(event)
    found = privacy.epsilon(1.5, 6.0, rounds=25, delta=1e-5)
    assert found == pytest.approx(accountant.get_epsilon(1e-5), rel=5e-3)
    assert found > 1.2 * privacy.epsilon(1.5, 6.0, rounds=16, delta=1e-5)


def test_epsilon_refuses(monkeypatch):
    for change in ({"bound": np.inf}, {"sigma": 0.0}, {"rounds": 0}, {"delta": 1.0}):
        arguments = {"bound": 1.0, "sigma": 1.0, "rounds": 1, "delta": 1e-5} | change
        with pytest.raises(gx.GGLError, match=next(iter(change))):
            privacy.epsilon(**arguments)
    with pytest.raises(gx.GGLError, match="adjacency"):
        privacy.epsilon(1.0, 1.0, rounds=1, delta=1e-5, adjacency="swap")
    monkeypatch.setattr(privacy, "accountant_installed", lambda: False)
    with pytest.raises(gx.GGLError, match="pip install 'ggl-jax\\[privacy\\]'"):
        privacy.epsilon(1.0, 1.0, rounds=1, delta=1e-5)


@pytest.mark.parametrize("fidelity", ["paper", "code"])
@pytest.mark.parametrize(
    "spec", ["clip:0.7", "clip:0.7+sparsify:0.5", "clip:2+clip:0.7", "soteria:0.5+clip:0.7"]
)
def test_no_update_is_longer_than_the_bound(toy, spec, fidelity):
    """The bound is kept by an enormous update, and met by it (nothing is pruned in the first)."""
    defense = parse(FORMS[fidelity](spec))
    bound = privacy.mechanism(defense, 2).bound
    assert bound == pytest.approx(0.7 * np.sqrt(2) if fidelity == "paper" else 0.7)
    variables = toy["model"].init(jax.random.key(2))
    rng = np.random.default_rng(1)
    update = jax.tree.map(lambda w: jnp.asarray(1e3 * rng.normal(size=w.shape), jnp.float32),
                          variables["params"])  # fmt: skip
    images, labels = 1e3 * jnp.asarray(toy["images"][:1]), jnp.asarray(toy["labels"][:1])
    context = gx.types.Context(toy["model"], variables, images, labels)
    found = jax.jit(lambda u: defense.apply(jax.random.key(0), u, context)[0])(update)
    length = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(found)))
    assert length <= bound * (1 + 1e-5)
    if spec == "clip:0.7":
        assert length == pytest.approx(bound, rel=1e-5)


def own(name):
    return gx.from_function(lambda key, update: update, name=name)


@pytest.mark.parametrize(
    ("defense", "bound", "sigma", "reason"),
    [
        ("none", np.inf, 0, "no noise"),
        ("clip:2", 2, 0, "no noise"),
        ("noise:0.1", np.inf, 0, "without a clip"),
        ("noise:0.1+clip:2", 2, 0, "after a clip"),
        ("clip:2+noise:0", 2, 0, "no noise"),
        ("clip:2+noise:0.1", 2, 0.1, ""),
        ("clip:2+sparsify:0.9+noise:0.1", 2, 0.1, ""),
        ("clip:2+soteria:0.8+noise:0.1", 2, 0.1, ""),
        ("clip:2+noise:0.3+noise:0.4", 2, 0.5, ""),
        ("clip:2+noise:0.3+sparsify:0.9+noise:0.4", 2, 0.3, ""),
        ("clip:2+noise:0.1+clip:1", 2, 0.1, ""),
        ("noise:9+clip:2+noise:0.1", 2, 0.1, ""),
        ("clip:2+noise:0.1+soteria:0.8", np.inf, 0.1, "private image"),
        ([own("rounding"), clip(bound=2.0, layerwise=False), noise(sigma=0.1)], 2, 0.1, ""),
        ([clip(bound=2.0), own("laplace")], np.inf, 0, "laplace is neither"),
        ([clip(bound=2.0), own("scale"), noise(sigma=0.1)], np.inf, 0, "scale is neither"),
        ([clip(bound=2.0), noise(sigma=0.1), own("mine")], np.inf, 0.1, "mine after the noise"),
    ],
)
def test_what_counts_as_a_clip_and_then_noise(defense, bound, sigma, reason):
    if isinstance(defense, str):
        defense = parse(in_code(defense))
    else:
        defense = gx.chain(gx.chain(*defense[:2]), *defense[2:])
    found = privacy.mechanism(defense, 62)
    assert found[:2] == pytest.approx((bound, sigma))
    assert bool(found.reason) == bool(reason)
    assert reason in found.reason


# --- utility ------------------------------------------------------------------------------------


def test_a_toy_problem_is_learnt_and_strong_noise_destroys_it(toy, tmp_path):
    explode = gx.from_function(
        lambda key, update: jax.tree.map(lambda g: jnp.inf * g, update), name="explode"
    )
    found = utility.measure(
        **toy, defenses=["clip:1+noise:0.05", "clip:1+noise:100", explode], out=tmp_path
    )
    rows = {row["defense"]: row for row in found.rows}
    assert list(rows) == ["none", "clip:1+noise:0.05", "clip:1+noise:100", "explode"]
    assert rows["none"]["accuracy"] > 0.95
    assert rows["clip:1+noise:0.05"]["accuracy"] > 0.9
    assert rows["clip:1+noise:100"]["accuracy"] < 0.8
    assert rows["none"]["curve"][0] == list(range(2, 21, 2))
    assert rows["none"]["curve"][1][-1] == rows["none"]["accuracy"]
    assert rows["explode"]["accuracy"] is None
    assert rows["explode"]["diverged_round"] == 1
    assert utility.accuracy_text(rows["explode"]).startswith("diverged in round")
    # Two tensors, clipped to 1 each; twenty rounds.
    assert rows["clip:1+noise:100"]["bound"] == pytest.approx(np.sqrt(2))
    if privacy.accountant_installed():
        expected = closed_form(np.sqrt(2 * 20), 100, 1e-5)
        assert rows["clip:1+noise:100"]["epsilon"] == pytest.approx(expected, rel=1e-6)
        assert rows["clip:1+noise:100"]["epsilon_replace"] > 1.5 * expected
    assert rows["none"]["epsilon"] is None
    assert utility.epsilon_text(rows["none"]) == "none (unbounded)"
    assert utility.warnings(found) == []
    chance = [row | {"accuracy": 0.65} for row in found.rows]
    config = found.config | {"majority": 0.6, "num_test": 100}  # a standard error of 4.9 %
    assert "not better" in utility.warnings(utility.Utility(config, chance))[0]
    assert utility.warnings(utility.Utility(config | {"num_test": 1000}, chance)) == []
    test = found.config["test_indices"]
    counts = np.bincount(toy["labels"][test], minlength=2)
    assert found.config["majority"] == pytest.approx(counts[0] / 20)


def test_the_step_size_falls_along_a_cosine(toy, tmp_path, monkeypatch):
    seen = []
    real = training.federated

    def spy(*args, learning_rate, **options):
        seen.append([float(learning_rate(round)) for round in (0, 10, 20)])
        return real(*args, learning_rate=learning_rate, **options)

    monkeypatch.setattr(training, "federated", spy)
    found = utility.measure(**toy, defenses=[], out=tmp_path)
    np.testing.assert_allclose(seen, [[0.1, 0.05, 0.0]], atol=1e-7)
    assert found.config["options"]["schedule"] == "cosine"


def split_of(test_images, clients, seed=0):
    return training.TrainingSettings(clients, 1, test_images=test_images, seed=seed)


def test_splits_are_disjoint_and_depend_on_the_seed():
    train, test, none = utility.split(103, split_of(20, 4))
    assert train.shape == (4, 20)
    assert len(np.unique([*train.ravel(), *test])) == 100
    assert len(none) == 0
    assert not np.array_equal(test, utility.split(103, split_of(20, 4, 1))[1])
    several = utility.UtilitySettings(4, 1, test_images=20, learning_rate=(0.1, 0.2))
    parts = utility.split(103, several)
    assert parts.train.shape == (4, 15)
    np.testing.assert_array_equal(parts.test, test)
    assert len(np.unique([*parts.train.ravel(), *parts.test, *parts.validation])) == 60 + 20 + 20
    with pytest.raises(gx.GGLError, match=r"got 52 of 103 images \(and as many .*allowed: 1 to 51"):
        utility.split(103, dataclasses.replace(several, test_images=52))
    assert len(utility.split(10_000, split_of(None, 4))[1]) == 1000
    with pytest.raises(gx.GGLError, match="test_images: got 3 of 3 images, allowed: 1 to 2"):
        utility.split(3, split_of(3, 1))
    with pytest.raises(gx.GGLError, match="images: got 1"):
        utility.split(1, split_of(None, 1))
    labels = np.array([0, 1, 1, 0, 0, 0])
    assert utility.majority_accuracy(labels[:3], labels[3:]) == 0


def test_settings_are_refused_before_any_work(toy, tmp_path):
    for name, value, shown in [
        ("rounds", 0, "0, allowed: whole numbers of at least 1"),
        ("clients", -1, "-1"),
        ("batch_size", 0, "0"),
        ("learning_rate", (0.1, -1.0), "(0.1, -1.0), allowed: a list of numbers above 0"),
        ("learning_rate", (0.1, 0.03, 0.1), "0.1 0.03 0.1, allowed: different numbers"),
        ("learning_rate", (), "none, allowed: different numbers above 0, at least one; name each"),
    ]:
        bad = toy | {"settings": utility.UtilitySettings(**{name: value})}
        with pytest.raises(gx.GGLError, match=re.escape(f"{name}: got {shown}")):
            utility.measure(**bad, defenses=["none"], out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_interrupted_resumed_and_refused(toy, tmp_path):
    calls = []

    def stop(label, number, total, fraction, loss):
        calls.append(label)
        if "clip" in label and fraction > 0.3:
            raise KeyboardInterrupt

    defenses = ["none", "clip:1"]
    broken = utility.measure(**toy, defenses=defenses, out=tmp_path, progress=stop)
    assert broken.interrupted
    assert [row["defense"] for row in broken.rows] == ["none"]
    path = tmp_path / "utility.jsonl"
    kept = path.read_text()
    path.write_text(kept + '{"defense": "cl')  # never written in part by us
    with pytest.raises(gx.GGLError, match=r"utility\.jsonl is damaged .*; move it away"):
        utility.measure(**toy, defenses=defenses, out=tmp_path)
    path.write_text(kept)
    calls.clear()
    whole = utility.measure(
        **toy, defenses=defenses, out=tmp_path, progress=lambda label, *_: calls.append(label)
    )
    assert path.read_text().startswith(kept)
    assert all(label.startswith("clip:1") for label in calls)
    assert [row["defense"] for row in whole.rows] == ["none", "clip:1"]
    fresh = utility.measure(**toy, defenses=["clip:1"], out=tmp_path / "fresh")
    assert fresh.rows[1]["accuracy"] == whole.rows[1]["accuracy"]
    assert fresh.rows[1]["curve"] == whole.rows[1]["curve"]

    changed = toy | {"settings": utility.UtilitySettings(rounds=21, clients=2, batch_size=8)}
    with pytest.raises(gx.GGLError, match=r"learning_rate: 0.1 -> 0.03; rounds: 20 -> 21"):
        utility.measure(**changed, defenses=defenses, out=tmp_path)
    other = toy | {"images": 1 - toy["images"]}
    with pytest.raises(gx.GGLError, match=r"inputs\.data"):
        utility.measure(**other, defenses=defenses, out=tmp_path)
    assert path.read_text().count("\n") == 2
    with folders.lock(tmp_path, "lock-utility"), pytest.raises(gx.GGLError, match="in use"):
        utility.measure(**toy, defenses=defenses, out=tmp_path)


def at_rates(toy, *rates):
    """The toy problem at several learning rates."""
    return toy | {"settings": dataclasses.replace(toy["settings"], learning_rate=rates)}


def test_each_defense_keeps_the_rate_that_is_best_on_validation_images(toy, tmp_path):
    """An update a thousand times as long wants a rate a thousand times as small."""
    long = gx.from_function(
        lambda key, update: jax.tree.map(lambda g: 1e3 * g, update), name="long"
    )
    endless = gx.from_function(
        lambda key, update: jax.tree.map(lambda g: jnp.inf * g, update), name="endless"
    )
    several = at_rates(toy, 3e38, 1e-4, 0.1)
    found = utility.measure(**several, defenses=[long, endless], out=tmp_path / "a")
    none, longer, never = found.rows
    assert (none["learning_rate"], longer["learning_rate"]) == (0.1, 1e-4)
    assert longer["curve"] == none["curve"]
    assert none["accuracy"] == none["curve"][1][-1] > 0.95
    assert never["accuracy"] is None  # at every rate: one that survives is enough for the others
    text = (tmp_path / "a" / "utility.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["learning_rate"] for line in lines] == 3 * [3e38, 1e-4, 0.1]
    assert lines[0]["diverged_round"] == 2
    assert utility.read(tmp_path / "a").rows == found.rows
    said = utility.legend(found)
    assert "learning rate of 3e+38, 0.0001, 0.1 whose accuracy on 20 further images" in said
    assert "costs privacy" in said

    # Labels that are wrong on the validation images alone turn the choice, test images do not.
    parts = utility.split(100, several["settings"])
    for at, rate in (parts.validation, 1e-4), (parts.test, 0.1):
        labels = toy["labels"].copy()
        labels[at] = 1 - labels[at]
        wrong = at_rates(toy, 1e-4, 0.1) | {"labels": labels}
        (row,) = utility.measure(**wrong, defenses=[], out=tmp_path / str(rate)).rows
        assert row["learning_rate"] == rate


def test_equal_rates_keep_the_first_and_what_is_finished_stays(toy, tmp_path):
    calls = []

    def stop(label, number, total, fraction, loss):
        calls.append(label)
        if "at 2e-09" in label and fraction > 0.3:
            raise KeyboardInterrupt

    several = at_rates(toy, 1e-9, 2e-9) | {"defenses": ["none"]}
    broken = utility.measure(**several, out=tmp_path / "a", progress=stop)
    assert broken.interrupted
    assert broken.rows == utility.read(tmp_path / "a").rows == []
    kept = (tmp_path / "a" / "utility.jsonl").read_text()
    calls.clear()
    whole = utility.measure(
        **several, out=tmp_path / "a", progress=lambda label, *_: calls.append(label)
    )
    assert all(label.startswith("none at 2e-09: ") for label in calls)
    lines = (tmp_path / "a" / "utility.jsonl").read_text()
    assert lines.startswith(kept)
    assert lines.count("\n") == 2
    assert whole.rows[0]["learning_rate"] == 1e-9
    turned = at_rates(toy, 2e-9, 1e-9) | {"defenses": ["none"]}
    with pytest.raises(gx.GGLError, match="learning_rate: in another order"):
        utility.measure(**turned, out=tmp_path / "a")
    with pytest.raises(gx.GGLError, match=r"learning_rate: \[1e-09, 2e-09\] -> 0.1"):
        utility.measure(**toy, defenses=[], out=tmp_path / "a")
    assert utility.measure(**turned, out=tmp_path / "b").rows[0]["learning_rate"] == 2e-9


def test_repeats_are_of_the_best_rate_and_their_mean_counts(toy, tmp_path):
    """They start from other weights; more can follow in the same folder, and change no other."""

    def measured(out, repeats, **more):
        own = at_rates(toy, 1e-4, 0.005)
        settings = dataclasses.replace(own["settings"], repeats=repeats, rounds=4)
        return utility.measure(**own | {"settings": settings}, out=out, **more)

    explode = gx.from_function(
        lambda key, update: jax.tree.map(lambda g: jnp.inf * g, update), name="explode"
    )
    numbers = []

    def count(label, number, total, fraction, loss):
        numbers.append((number, total))

    (none,) = measured(tmp_path, 1, defenses=[]).rows
    assert none["accuracies"] == [none["accuracy"]]
    found = measured(tmp_path, 3, defenses=["clip:1", explode], progress=count)
    row, clipped, lost = found.rows
    # Two of none, four of clip; of explode the rates alone, since there is none to repeat.
    assert numbers[0] == (0, 2 + 4 + 4)
    lines = [json.loads(x) for x in (tmp_path / "utility.jsonl").read_text().splitlines()]
    assert [(one["defense"], one["repeat"]) for one in lines] == [
        *[("none", 0), ("none", 0), ("none", 1), ("none", 2)],
        *[("clip:1", 0), ("clip:1", 0), ("clip:1", 1), ("clip:1", 2)],
        *[("explode", 0), ("explode", 0)],
    ]
    assert all(one["learning_rate"] == row["learning_rate"] for one in lines if one["repeat"])
    assert row["accuracies"] == [none["accuracy"], *(one["accuracy"] for one in lines[2:4])]
    assert row["accuracy"] == pytest.approx(np.mean(row["accuracies"]))
    assert row["curve"] == none["curve"]
    assert len({tuple(one["curve"][1]) for one in lines[2:4]} | {tuple(none["curve"][1])}) == 3
    assert lost["accuracy"] is None
    assert lost["diverged_round"] == 1
    interval = utility.accuracy_of(clipped)
    spread = np.std(clipped["accuracies"], ddof=1) / np.sqrt(3)
    wanted = 100 * (clipped["accuracy"] + 4.302653 * spread)  # Student's t, two degrees of freedom
    assert interval.high == pytest.approx(min(wanted, 100), rel=1e-5)
    assert utility.accuracy_text(clipped) == (
        f"{interval.mean:.1f} [{interval.low:.1f},\N{NO-BREAK SPACE}{interval.high:.1f}] %"
    )
    assert "mean of 1 to 3 runs" in utility.legend(found)
    assert utility.read(tmp_path).rows == found.rows


def test_a_folder_from_before_there_were_several_rates_goes_on(toy, tmp_path):
    made = utility.measure(**toy, defenses=[], out=tmp_path)
    config = json.loads((tmp_path / "utility.json").read_text())
    assert config["options"]["learning_rate"] == 0.1
    for name in ("num_validation", "validation_indices"):
        del config[name]
    files.write_json(tmp_path / "utility.json", config)
    old = {k: v for k, v in made.rows[0].items() if k not in ("learning_rate", "validation")}
    (tmp_path / "utility.jsonl").write_text(json.dumps(old) + "\n")
    assert utility.read(tmp_path).rows == [old]
    assert utility.measure(**toy, defenses=[], out=tmp_path).rows == [old]


def test_epsilon_comes_later_where_the_accountant_was_missing(toy, tmp_path, monkeypatch):
    pytest.importorskip("dp_accounting")
    quick = toy | {"settings": utility.UtilitySettings(rounds=1, clients=2, batch_size=8)}
    with monkeypatch.context() as patch:
        patch.setattr(privacy, "accountant_installed", lambda: False)
        made = utility.measure(**quick, defenses=["clip:1+noise:1"], out=tmp_path)
        assert "pip install" in made.rows[1]["epsilon_note"]
        assert utility.epsilon_text(made.rows[1]) == "not computed"
    found = utility.read(tmp_path).rows[1]
    assert found["epsilon"] == pytest.approx(closed_form(np.sqrt(2), 1, 1e-5), rel=1e-6)
    assert found["epsilon_note"] == ""


# --- report -------------------------------------------------------------------------------------


def write_utility(folder, rows):
    config = {
        **{"options": {}, "inputs": {}, "model": "lenet", "majority": 0.58, "num_test": 100},
        **{"rounds": 10, "clients": 2, "batch_size": 4, "delta": 1e-5},
    }
    files.write_json(folder / "utility.json", config)
    lines = []
    for defense, accuracy, eps in rows:
        note = "" if eps else "no noise"
        row = {"defense": defense, "accuracy": accuracy, "epsilon": eps}
        row |= {"epsilon_replace": eps and 3 * eps, "epsilon_note": note}
        row |= {"diverged_round": None if accuracy else 7, "seconds": 1.0}
        lines.append(json.dumps(row) + "\n")
    (folder / "utility.jsonl").write_text("".join(lines))


def test_the_report_draws_privacy_and_utility(tmp_path):
    gains = {"none": 9.0, "clip:4": 9.1, "clip:4+noise:0.1": 3.0, "noise:9": -1.0}
    rows = [
        make_row(f"{d}{i}".replace(":", "-"), f"{i}", d, 11 + gain + i)
        for d, gain in gains.items()
        for i in range(2)
    ]
    records = make_sweep(tmp_path / "run", rows)
    path = write(records)
    hint = f"ggl-jax utility {tmp_path / 'run'}"
    assert hint in path.read_text()
    assert hint in path.with_suffix(".md").read_text()
    assert not (tmp_path / "run" / "figures" / "privacy-utility.svg").exists()

    measured = [("none", 0.9, None), ("clip:4", 0.88, None), ("clip:4+noise:0.1", 0.61, 1234.0)]
    write_utility(tmp_path / "run", [*measured, ("noise:9", None, None), ("clip:1", 0.7, None)])
    page = Page(write(records).read_text())
    (shown,) = (i["alt"] for i in page.images if i["alt"].startswith("Test accuracy"))
    assert "clip:4+noise:0.1 ε 1.23e+03: +3.5" in shown
    assert "majority class: 58.0 %" in shown
    said = page.figure("Test accuracy")
    for label in (
        "none", "clip:4+noise:0.1", "ε 1.23e+03", "noise:9", "diverged",
        "majority class", "undefended", "PSNR above the",
    ):  # fmt: skip
        assert label in said, label
    assert hint not in page.said
    assert "clip:1<" not in said  # not audited: in the table alone
    markdown = path.with_suffix(".md").read_text()
    assert "| clip:4+noise:0.1 | +3.5 [" in markdown
    assert "| 61.0 % | 1.23e+03 | 3.7e+03 |" in markdown
    assert "| clip:1 | – | no | 70.0 % | none (unbounded)" in markdown
    assert "diverged in round 7" in markdown
    assert "(figures/privacy-utility.svg)" in markdown


# --- command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "faces.npz"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, size=(24, 32, 32, 3)).astype(np.uint8)
    np.savez(path, images=images, labels=np.arange(24) % 2)
    return path


SHORT = ["--rounds", "2", "--clients", "2", "--batch-size", "2"]


def test_command_on_its_own(faces, tmp_path, capsys):
    out = tmp_path / "out"
    given = ["utility", "--data", str(faces), "--out", str(out), "--model", "lenet", *SHORT]
    assert run([*given, "--defenses", "clip:1+noise:0.1"]) == 0
    said = capsys.readouterr().out
    assert "Naming the commonest class gives" in " ".join(said.split())
    assert "(unbounded)" in said
    rows = [json.loads(line) for line in (out / "utility.jsonl").read_text().splitlines()]
    assert [row["defense"] for row in rows] == ["none", "clip:1+noise:0.1"]
    assert rows[1]["rounds"] == 2
    assert rows[1]["bound"] == pytest.approx(np.sqrt(8))
    # More defenses go on in the same folder; other options do not.
    assert run([*given, "--defenses", "clip:1"]) == 0
    assert len((out / "utility.jsonl").read_text().splitlines()) == 3
    assert run([*given, "--defenses", "clip:1", "--learning-rate", "0.5"]) == 2
    assert "learning_rate: 0.03 -> 0.5" in capsys.readouterr().err
    assert run([*given, "--defenses", "clip:1", "--learning-rate", "0.5", "0.1"]) == 2
    assert "learning_rate: 0.03 -> [0.5, 0.1]" in capsys.readouterr().err


def test_command_on_a_sweep(faces, tmp_path, capsys):
    rows = [make_row(f"{d[:4]}{i}", f"{i}", d, 12.0 + i)
            for d in ("none", "clip:4") for i in range(2)]  # fmt: skip
    records = make_sweep(tmp_path / "run", rows)
    assert run(["utility", str(records.folder), *SHORT]) == 2
    assert "run from Python" in capsys.readouterr().err
    options = {"preset": "quick", "fixed": {"model": "lenet", "data": str(faces)}}
    options |= {"axes": {"defense": ["none", "clip:4"]}, "exclude": []}
    files.write_json(records.folder / "config.json", records.config | {"options": options})
    assert run(["utility", str(records.folder), *SHORT]) == 0
    found = utility.read(records.folder)
    assert [row["defense"] for row in found.rows] == ["none", "clip:4"]
    assert found.config["options"]["data"] == str(faces)
    assert "Privacy and utility" in (records.folder / "report.html").read_text()
    assert run(["utility", str(tmp_path)]) == 2
    assert run(["utility", "--data", str(faces)]) == 2
    assert "--defenses and --out" in capsys.readouterr().err
