"""Several rounds of one client attacked together: as their mean, for every defense that has one."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DEFENSE_SPECS, TINY_SHAPE, write_tiny_prior

import ggl_jax as gx
from ggl_jax import trees
from ggl_jax.adversary.estimation import estimate, pooled
from ggl_jax.adversary.reconstruct import prepare
from ggl_jax.audit import bounds, cells
from ggl_jax.audit.cells import Cells, Inputs
from ggl_jax.audit.sweep import plan
from ggl_jax.audit.threat import threat_model
from ggl_jax.cli import run
from ggl_jax.client.defenses import summary
from ggl_jax.spec import Client

NOISE = 0.1


@pytest.fixture(scope="module")
def world(tiny_model, tiny_variables, tiny_prior, tiny_prior_params):
    """What is public, and four images."""
    images = jnp.asarray(np.random.default_rng(0).random((4, *TINY_SHAPE)), jnp.float32)
    return gx.Public(tiny_model, tiny_variables, tiny_prior, tiny_prior_params), images


def shared(world, spec, rounds, num=1, **client):
    """An update, the labels of whose images are 1, 2, 0, 1; and the client."""
    public, images = world
    client = Client(num, rounds=rounds, **client)
    labels = np.array([1, 2, 0, 1])[:num]
    options = {"defense": gx.parse(spec), "client": client}
    return gx.share(jax.random.key(3), public, images[:num], labels, **options)[0], client


@functools.lru_cache
def gradient_of(model):
    return jax.jit(lambda variables, image: gx.gradient(model, variables, image, jnp.array([1])))


def vector(update):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(update)])


@pytest.mark.parametrize(
    "client", [{}, {"num": 4, "local_steps": 2}, {"num": 4, "clients": 2}], ids=str
)
def test_a_client_shares_the_same_with_noise_of_its_own_in_each_round(world, client):
    plain, _ = shared(world, "none", 1, **client)
    noisy, _ = shared(world, f"noise:{NOISE}", 5, **client)
    rounds = [vector(jax.tree.map(lambda x, r=r: x[r], noisy.update)) for r in range(5)]
    draws = np.stack(rounds) - vector(plain.update)
    level = NOISE / np.sqrt(client.get("clients", 1))
    size = draws.shape[1]
    np.testing.assert_allclose(draws.std(axis=1), level, rtol=4 / np.sqrt(2 * size))
    apart = np.corrcoef(draws) - np.eye(5)
    assert np.abs(apart).max() < 5 / np.sqrt(size)
    # Fewer rounds are the first ones, so that a sweep over their number compares like with like.
    two, _ = shared(world, f"noise:{NOISE}", 2, **client)
    np.testing.assert_array_equal(vector(jax.tree.map(lambda x: x[1], two.update)), rounds[1])


def test_the_likelihood_of_all_rounds_is_that_of_their_mean(world):
    """Of R rounds of noise s that of one of s / sqrt(R), but for a constant: in closed form."""
    public, images = world
    sent, _ = shared(world, f"noise:{NOISE}", 4)
    view = gx.parse("noise").view
    known = public.variables["params"], public.model.head
    mean, _, level = pooled(view, sent.update, *known, 4)
    assert float(level) == pytest.approx(NOISE / 2, rel=0.25)
    np.testing.assert_allclose(vector(mean), vector(jax.tree.map(lambda x: x.mean(0), sent.update)))
    own = [gradient_of(public.model)(public.variables, x[None]) for x in images]

    def minus_log(update, sigma):
        return np.array([float(trees.sq_distance(g, update)) / (2 * sigma**2) for g in own])

    rounds = [jax.tree.map(lambda x, r=r: x[r], sent.update) for r in range(4)]
    apart = sum(minus_log(one, NOISE) for one in rounds) - minus_log(mean, NOISE / 2)
    spread = np.ptp(minus_log(mean, NOISE / 2))
    assert np.ptp(apart) < 1e-3 * spread


SEARCHES = {
    "clip:0.05,layerwise=False+noise:0.03": gx.Search(optimizer="adam", steps=2, restarts=2),
    "noise:0.03": gx.search_of("quick", "regression", bank=20),
}


@pytest.mark.parametrize("spec", SEARCHES)
def test_an_attack_on_rounds_is_that_on_their_mean_in_one(world, spec):
    public, _ = world
    sent, client = shared(world, spec, 4)
    mean = gx.Shared(jax.tree.map(lambda x: x.mean(0), sent.update))
    options = {"view": gx.parse(spec).view, "search": SEARCHES[spec]}
    keys = jax.random.split(jax.random.key(0), 1)
    (several,) = gx.reconstruct(keys, public, [sent], client=client, **options)
    (one,) = gx.reconstruct(keys, public, [mean], client=Client(), **options)
    np.testing.assert_array_equal(several.images, one.images)
    assert several.loss == one.loss
    # What is told of the defense is a round's, beside which the client's record stands.
    sigmas = [summary(found.estimated)["sigma"] for found in (several, one)]
    np.testing.assert_allclose(sigmas, [0.03, 0.015], rtol=0.25)
    # And it is the same compiled program.
    named = (public.model, public.prior, options["view"])
    ready = [prepare(*named, c, options["search"]).stages[0].attack for c in (client, Client())]
    assert ready[0] is ready[1]


CHAINS = {
    "clip:0.05+noise:0.1": "mean", "sparsify:0.5+noise:0.1+laplace:0.1": "mean",
    "soteria:0.2+noise:0.1": "mean", "clip:0.5+randomk:0.3": "each", "qsgd:3+noise:0.1": "each",
    "noise:0.1+clip:1": None, "noise:0.1+qsgd:3": None, "dropout:0.5+sign": None,
    "mixup:2+noise:0.1": None, "noise:0.1+flower:1": None,
}  # fmt: skip
REFUSED = {"censor", "mixup", "ats", "precode", "graddefense"}


@pytest.mark.parametrize("spec", [*DEFENSE_SPECS.values(), *CHAINS])
def test_the_mean_of_rounds_is_what_the_view_makes_of_the_update(world, spec):
    """What it is away from that falls with the rounds, as noise does, or is nothing."""
    public, images = world
    view = gx.parse(spec).view
    refused = spec.partition(":")[0] in REFUSED if spec in DEFENSE_SPECS.values() else False
    if spec in CHAINS:
        assert view.rounds == CHAINS[spec]
        refused = CHAINS[spec] is None
    if refused:
        with pytest.raises(gx.GGLError, match=r"rounds: got 2, allowed: 1 for .* let noise come"):
            prepare(public.model, public.prior, view, Client(rounds=2), gx.Search())
        return
    prepare(public.model, public.prior, view, Client(rounds=2), gx.Search())

    def residual(rounds):
        sent, _ = shared(world, spec, rounds)
        known = public.variables["params"], public.model.head
        mean, estimated, _ = pooled(view, sent.update, *known, rounds)
        variables = public.variables
        if view.rewire is not None:
            variables = view.rewire(estimated, variables, public.model.head)
        own = gradient_of(public.model)(variables, images[:1])
        away = vector(view.simulate(estimated, own)) - vector(mean)
        return float(np.sum(away**2)) / float(np.sum(vector(own) ** 2))

    one, many = residual(1), residual(16)
    # Rates are estimated. OUTPOST's pruned entries are compared unpruned where noise hides them.
    slack = 0.03 if "randomk" in spec or "dropout" in spec else 1e-6
    assert many < (1 if spec.startswith("outpost") else 1 / 3) * one + slack


def test_updates_of_other_rounds_are_refused(world):
    public, _ = world
    sent, _ = shared(world, "none", 2)
    for rounds in (3, 1):
        mean = gx.Shared(jax.tree.map(lambda x: x[0], sent.update)) if rounds == 1 else sent
        with pytest.raises(gx.GGLError, match="rounds: got 3, but the update is not of so many"):
            gx.reconstruct(
                jax.random.split(jax.random.key(0), 1),
                public,
                [mean],
                view=gx.parse("none").view,
                client=Client(rounds=3),
            )


def test_the_leak_of_noise_grows_with_the_rounds(world):
    """To that of one round with less noise."""
    public, _ = world
    latents = public.prior.sample_latent(jax.random.key(8), 6)
    images = public.prior.apply(public.prior_params, latents, jnp.zeros(6, jnp.int32))
    parts = {"model": public.model, "prior": public.prior, "prior_params": public.prior_params}

    def error(spec, rounds):
        found = gx.audit(
            images,
            [1] * 6,
            **parts,
            variables=public.variables,
            defenses=[spec],
            client=Client(rounds=rounds),
            search=gx.search_of("quick", "regression", bank=60),
            num_controls=4,
            ceiling_steps=1,
        )
        return np.mean([row["mse"] for row in found.rows])

    one, many = (error("noise:1", rounds) for rounds in (1, 16))
    assert one > 2 * many
    assert 0.5 < many / error("noise:0.25", 1) < 2


def test_cells_of_one_round_keep_their_names(world, monkeypatch):
    public, images = world
    inputs = Inputs(images[:1], [0], public.model, public.prior, public.prior_params)
    seen, digest = [], cells.digest
    monkeypatch.setattr(cells, "digest", lambda *parts: seen.append(parts) or digest(*parts))
    maker = Cells(inputs)
    defense = maker.defense("noise:0.1")

    def name(client):
        return maker.make({}, gx.Search(), client, defense, 0, (0,)).id

    assert name(Client()) != name(Client(rounds=2)) != name(Client(rounds=3))
    told = [parts[0][2] for parts in seen if isinstance(parts[0], list)]
    assert ["rounds" in client for client in told[:2]] == [False, True]
    grid = plan(inputs, {"rounds": [1, 2], "defense": ["noise:0.1"]}, search="quick")
    assert [cell.client.rounds for cell in grid.cells] == [1, 2]


def test_the_server_is_said_to_see_them(world):
    public, _ = world
    search = gx.search_of("paper", "ig")
    found = threat_model(search, Client(rounds=4), public.model, public.prior)
    assert "the updates in 4 rounds at one state of one image" in found.knows
    assert found.letter == "B"  # no training is told


def test_bounds_are_those_of_less_noise(world):
    public, images = world
    others = np.asarray(images[1:])
    found = bounds.Bounds(public, jax.random.key(0), 4)

    def row(spec, rounds):
        return found.row(gx.parse(spec), Client(rounds=rounds), images[:1], [1], others)

    assert row("noise:0.1", 4) == pytest.approx(row("noise:0.05", 1))
    several, one = row("clip:0.05+noise:0.1", 4), row("clip:0.05+noise:0.05", 1)
    assert several == pytest.approx(one)
    assert several["bound_identified_any"] > row("clip:0.05+noise:0.1", 1)["bound_identified_any"]
    # Masks that are drawn anew are not the same function in each round.
    assert row("randomk:0.5+noise:0.1", 1)
    assert row("randomk:0.5+noise:0.1", 2) == {}


def test_masks_are_read_off_each_round(world):
    public, _ = world
    sent, _ = shared(world, "dropout:0.5", 3)
    view, known = gx.parse("dropout").view, (public.variables["params"], public.model.head)
    _, estimated, _ = pooled(view, sent.update, *known, 3)
    each = [
        estimate(view, jax.tree.map(lambda x, r=r: x[r], sent.update), public.model.head)
        for r in range(3)
    ]
    wanted = np.mean([vector(one["mask"]) for one in each], axis=0)
    np.testing.assert_allclose(vector(estimated["mask"]), wanted, rtol=1e-6)


def test_from_the_command_line_to_the_report(tmp_path):
    rng = np.random.default_rng(0)
    data = tmp_path / "faces.npz"
    np.savez(data, images=rng.integers(0, 256, (4, 32, 32, 3), np.uint8), labels=[0, 1, 0, 1])
    prior = write_tiny_prior(tmp_path / "prior")
    start = ["audit", "--data", str(data), "--indices", "0:2", "--model", "convnet:2"]
    start += ["--prior", str(prior)]
    small = ["--preset", "quick", "--attack", "ig", "--steps", "1", "--num-controls", "4"]
    small += ["--ceiling-steps", "1", "--out", str(tmp_path / "out"), "--batch-size", "2"]
    defenses = ["--defenses", "noise:0.1"]
    assert run([*start, *small, "--rounds", "3", *defenses]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["options"]["rounds"] == 3
    assert "the updates in 3 rounds at one state of 2 images" in " ".join(
        config["threat_model"][0]["knows"]
    )
    rows = [json.loads(p.read_text())["rows"][0] for p in (tmp_path / "out/cells").glob("*.json")]
    (noisy,) = (row for row in rows if row["part"] == 0)
    assert noisy["defense_estimated"]["sigma"] == pytest.approx(0.1, rel=0.2)
    assert noisy["estimation_error"]["sigma_error"] < 0.2
    assert "updates in 3 rounds" in (tmp_path / "out" / "report.md").read_text()
