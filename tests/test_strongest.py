"""Attack strongest: several attacks on one update, of which the best by the update is kept."""

import dataclasses

import jax
import numpy as np
import pytest

import ggl_jax as gx
from ggl_jax import cli
from ggl_jax.adversary import attacks, reconstruct
from ggl_jax.adversary.attacks import members
from ggl_jax.adversary.resume import Checkpoints
from ggl_jax.audit import cells, landscape, report, run
from ggl_jax.audit import folder as folders

NAMES = ("idlg", "ggl", "ig")


@pytest.fixture
def short(monkeypatch):
    """Three attacks of a few steps, of which ggl is over latents."""
    monkeypatch.setitem(attacks.MEMBERS, "quick", NAMES)
    for name in NAMES:
        small = {"steps": 3, "restarts": 2}
        small |= {"pool": 4, "refine": "none"} if name == "ggl" else {}
        monkeypatch.setitem(attacks.PRESETS["quick"], name, attacks.PRESETS["quick"][name] | small)
    return gx.search_of("quick", "strongest")


@pytest.fixture
def public(tiny_model, tiny_variables, tiny_prior, tiny_prior_params):
    return gx.Public(tiny_model, tiny_variables, tiny_prior, tiny_prior_params)


def attacked(public, images, defense, search, **options):
    defense = gx.parse(defense)
    labels = [1, 2][: len(images)]
    sent, _ = gx.share(jax.random.key(1), public, images, labels, defense=defense)
    keys, client = jax.random.key(0)[None], gx.Client(batch_size=len(images))
    options |= {"view": defense.view, "client": client, "search": search}
    (found,) = gx.reconstruct(keys, public, [sent], **options)
    return found


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_one_nearest_to_the_update_is_kept_as_it_is_alone(
    batch_size, public, tiny_images, short
):
    images, phases = tiny_images[:batch_size], []
    found = attacked(
        public, images, "clip:0.2", short, progress=lambda *told: phases.append(told[:2])
    )
    each = {one.attack: attacked(public, images, "clip:0.2", one) for one in members(short)}
    view, client = gx.parse("clip:0.2").view, gx.Client(batch_size=batch_size)
    misfits = {
        name: reconstruct.mismatch(one, public=public, view=view, client=client)
        for name, one in each.items()
    }
    assert found.search["mismatches"] == misfits
    assert len(set(misfits.values())) == 3
    assert found.search["won"] == min(misfits, key=misfits.__getitem__)
    best = each[found.search["won"]]
    np.testing.assert_array_equal(found.images, best.images)
    assert (found.loss, found.distance) == (best.loss, best.distance)
    assert found.evaluations == sum(one.evaluations for one in each.values())
    fractions = [fraction for phase, fraction in phases if "search" in phase]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_the_update_decides_and_not_the_likeness(public, tiny_images):
    """The private image itself, of another label, explains the update worse than another image."""
    one = attacked(public, tiny_images[:1], "none", gx.Search(optimizer="adam", steps=1))
    dull = one._replace(images=np.asarray(0.9 * tiny_images[:1] + 0.05), labels=np.asarray([1]))
    nearer = one._replace(images=np.asarray(tiny_images[:1]), labels=np.asarray([0]))
    broken = one._replace(images=np.full((1, 8, 8, 3), np.nan, np.float32))
    view = gx.parse("none").view
    names, found = ("broken", "nearer", "dull"), (broken, nearer, dull)
    kept = reconstruct._nearest(names, found, public, view, gx.Client())
    assert kept.search["won"] == "dull"
    assert kept.images is dull.images


def test_free_pixels_do_not_fit_noise():
    noisy, plain = (gx.parse(name).view for name in ("clip:1+noise:0.1", "clip:1"))
    for preset, names in attacks.MEMBERS.items():
        search = gx.search_of(preset, "strongest")
        assert tuple(one.attack for one in members(search, plain)) == names
        assert members(search) == [gx.search_of(preset, name) for name in names]
        left = [one.attack for one in members(search, noisy)]
        assert left == [name for name in names if name in ("map", "ggl")]


def test_where_all_are_on_pixels_they_stay(monkeypatch):
    monkeypatch.setitem(attacks.MEMBERS, "quick", ("ig", "gi"))
    found = members(gx.search_of("quick", "strongest"), gx.parse("noise").view)
    assert [one.attack for one in found] == ["ig", "gi"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"optimizer": "adam"}, "optimizer: attack strongest has no options"),
        ({"steps": 800}, "steps: attack strongest has no options"),
        ({"attack": "strongest:fast"}, "got 'strongest:fast', allowed: strongest:quick"),
    ],
)
def test_it_has_no_options(given, says):
    with pytest.raises(gx.GGLError, match=says):
        gx.search_of("quick", **{"attack": "strongest", **given})


def test_options_set_afterwards_are_refused(tiny_model, tiny_prior):
    changed = dataclasses.replace(gx.search_of("quick", "strongest"), steps=7)
    with pytest.raises(gx.GGLError, match="steps: attack strongest has no options"):
        members(changed)
    for one in ("strongest", "strongest:quick"):
        with pytest.raises(gx.GGLError, match="attack: got"):
            gx.search_attack(tiny_model, tiny_prior, gx.Search(attack=one))


def test_a_landscape_is_around_one_search(public, tiny_images):
    inputs = cells.Inputs(tiny_images[:1], [1], public.model, public.prior, public.prior_params)
    with pytest.raises(gx.GGLError, match=r"strongest:quick.*those on latents"):
        landscape.find_center(inputs, search=gx.search_of("quick", "strongest"))


def test_it_is_for_one_round(public):
    search, view = gx.search_of("quick", "strongest"), gx.parse("none").view
    with pytest.raises(gx.GGLError, match="rounds: got 2"):
        reconstruct.prepare(public.model, public.prior, view, gx.Client(rounds=2), search)


def test_the_command_line_names_the_preset():
    for words, name in (
        (["--attack", "strongest"], "strongest:quick"),
        (["--attack", "strongest", "--preset", "standard"], "strongest:standard"),
        (["--attack", "strongest:paper"], "strongest:paper"),
        (["--attack", "ig"], "ig"),
    ):
        assert cli._parse(["audit", *words]).search.attack == name


def test_a_cell_is_what_its_attacks_are(public, tiny_images, short, monkeypatch):
    def cell(search):
        inputs = cells.Inputs(tiny_images[:1], [1], public.model, public.prior, public.prior_params)
        maker = cells.Cells(inputs)
        return maker.make({}, search, gx.Client(), maker.defense("clip:0.2"), 0, (0,))

    first, each = cell(short), [cell(one) for one in members(short)]
    assert first.id == cell(short).id
    assert first.id not in {one.id for one in each}
    assert first.evaluations == sum(one.evaluations for one in each) > 0
    known = attacks.PRESETS["quick"]
    monkeypatch.setitem(known, "ig", known["ig"] | {"steps": 4})
    assert cell(short).id != first.id


def test_an_audit_tells_which_won_and_goes_on(tmp_path, public, tiny_images, short, monkeypatch):
    given = {
        **{"model": public.model, "prior": public.prior, "prior_params": public.prior_params},
        **{"num_controls": 2, "ceiling_steps": 1, "search": short, "out": tmp_path / "run"},
        "defenses": ["clip:0.2", "noise:0.01"],
        "fit": True,
    }
    monkeypatch.setattr(run, "mismatch", None)  # the winner's is known
    rows = gx.audit(tiny_images, [1, 2], **given).rows
    assert {row["attack"] for row in rows} == {"strongest:quick"}
    for row in rows:
        noisy = row["defense"] == "noise:0.01"
        assert row["mismatches"].keys() == ({"ggl"} if noisy else set(NAMES))
        assert row["won"] == min(row["mismatches"], key=row["mismatches"].__getitem__)
        assert row["mismatch"] == row["mismatches"][row["won"]]
    records = folders.read(tmp_path / "run")
    text = report.make(records).text("")
    assert "Kept by attack strongest, as nearest to the update: clip:0.2: " in text
    assert "noise:0.01: ggl (2 of 2)." in text
    knows = [one["knows"] for one in records.config["threat_model"]]
    assert len(knows) == 3
    monkeypatch.setattr(run, "reconstruct", None)
    assert gx.audit(tiny_images, [1, 2], **given).rows == rows


def test_it_is_a_value_of_a_sweeps_axis(tmp_path, public, tiny_images, short):
    found = gx.sweep(
        tiny_images[:1],
        [1],
        model=public.model,
        axes={"attack": ["idlg", "strongest"]},
        out=tmp_path / "run",
        search="quick",
        **{"prior": public.prior, "prior_params": public.prior_params},
        **{"num_controls": 2, "ceiling_steps": 1},
    )
    assert not found.failures
    assert [(row["axes"]["attack"], "won" in row) for row in found.rows] == [
        ("idlg", False),
        ("strongest", True),
    ]


def test_searches_keep_their_states_apart(tmp_path, public, tiny_images, short):
    """Each goes on from its own last state: none is another's."""
    kept = Checkpoints(tmp_path / "state", seconds=0.0)
    first = attacked(public, tiny_images[:1], "none", short, checkpoints=kept)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == sorted(NAMES)
    again = attacked(public, tiny_images[:1], "none", short, checkpoints=kept)
    np.testing.assert_array_equal(first.images, again.images)
    assert first.search == again.search
