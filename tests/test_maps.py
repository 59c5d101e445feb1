"""The map of a sweep, from rows made by hand."""

import re

import pytest
from test_report import Page, make_row, make_sweep

from ggl_jax.audit import figures, maps, report
from ggl_jax.spec import Client, Setup

EVAL, TRAIN = "resnet18:batch_norm=eval", "resnet18:batch_norm=train"


def square(psnrs, *, defense="none", attack="ggl", **axes):
    """Rows of one square; the blind guess of each is at 11 dB."""
    rows = []
    for number, psnr in enumerate(psnrs):
        name = "-".join(map(str, (defense, attack, *axes.values(), number)))
        row = make_row(re.sub(r"\W", "-", name), f"face-{number}", defense, psnr, attack=attack)
        row["axes"] = {**row["axes"], **axes}
        rows.append(row)
    return rows


def two_by_two():
    found = []
    for weights, model, batch, psnrs in (
        ("random", EVAL, 16, [14.0, 16.0, 15.0]),  # +4 [1.5, 6.5]
        ("random", EVAL, 4, [12.0, 20.0]),  # +5, an interval that reaches far below 0
        ("runs/round-0200", TRAIN, 4, [10.0, 10.5, 10.2]),  # below the guess
    ):
        found += square(psnrs, weights=weights, model=model, batch_size=batch)
    return found


def test_rows_and_columns_are_the_axes_that_vary():
    (found,) = maps.maps(two_by_two())
    assert found.defense == "none"
    # Stages by their names, models by what tells them apart, numbers by size; all combinations.
    assert found.rows == (
        "random, batch_norm=eval", "random, batch_norm=train",
        "round-0200, batch_norm=eval", "round-0200, batch_norm=train",
    )  # fmt: skip
    assert found.columns == ("batch 4", "batch 16")
    gains = {place: own.means["gain"].mean for place, own in found.squares.items()}
    assert gains == pytest.approx({(0, 1): 4.0, (0, 0): 5.0, (3, 0): -0.7666667})
    assert [maps.silent(found.squares[p]) for p in ((0, 1), (0, 0), (3, 0))] == [False, True, True]


def test_the_table_has_interval_images_and_brackets():
    (found,) = maps.maps(two_by_two())
    lines = maps.map_table(found).replace("\N{NO-BREAK SPACE}", " ").splitlines()
    assert lines[0] == "**no defense**"
    assert lines[2] == "|  | batch 4 | batch 16 |"
    assert lines[4] == (
        "| random, batch_norm=eval | (+5.0 [-45.8, +55.8], 2) | +4.0 [+1.5, +6.5], 3 |"
    )
    assert lines[5] == "| random, batch_norm=train | – | – |"


@pytest.mark.parametrize(
    ("psnrs", "quiet"), [([12.0], False), ([10.0], True), ([None], False), ([11.0, 11.0], True)]
)
def test_one_image_has_no_interval_and_counts_by_its_mean(psnrs, quiet):
    rows = square(psnrs, batch_size=1) + square([12.0], batch_size=2)
    (found,) = maps.maps(rows)
    assert maps.silent(found.squares[0, 0]) == quiet


def test_of_several_attacks_the_one_that_got_furthest_counts():
    rows = []
    for attack, one, two in (("ggl", 13.0, 15.0), ("ig", 16.0, 12.0)):
        rows += square([one], attack=attack, local_steps=1)
        rows += square([two], attack=attack, local_steps=5)
    (found,) = maps.maps(rows)
    assert found.columns == ("1 step", "5 steps")
    assert [found.squares[0, c].means["psnr"].mean for c in (0, 1)] == [16.0, 15.0]


def test_any_option_of_the_client_can_be_a_column_and_defaults_fill_gaps():
    rows = square([12.0]) + square([13.0], local_optimizer="adam", weights="a/round-1")
    (found,) = maps.maps(rows)
    assert found.rows == ("random", "round-1")
    assert found.columns == ("local optimizer sgd", "local optimizer adam")
    assert set(found.squares) == {(0, 0), (1, 1)}
    assert {"weights": Setup().weights, "model": Setup().model} == maps.ROWS
    assert set(maps.COLUMNS) == set(vars(Client()))


def test_stages_of_one_name_are_told_apart_by_their_folders():
    rows = square([12.0], weights="a/last") + square([13.0], weights="b/last")
    (found,) = maps.maps(rows)
    assert found.rows == ("a/last", "b/last")
    assert found.columns == ("",)
    assert "all" in maps.map_table(found)


def test_without_such_axes_there_is_no_map(tmp_path):
    rows = square([12.0], attack="ggl") + square([13.0], attack="ig") + square([9], defense="clip")
    assert maps.maps(rows) == []
    assert "The map" not in report.make(make_sweep(tmp_path / "s", rows)).sections


def test_the_figure_hatches_what_is_silent_and_writes_gain_and_images():
    place = {"weights": "random", "model": EVAL, "batch_size": 4}
    drawn = maps.maps(two_by_two() + square([14.0, 14.1], defense="clip:4", **place))
    figure = figures.leak_maps(drawn)
    first, second = figure.axes[:2]
    assert [axis.get_title() for axis in (first, second)] == ["no defense", "clip:4"]
    hatched = {
        (int(patch.get_y()), int(patch.get_x())): bool(patch.get_hatch()) for patch in first.patches
    }
    assert hatched == {(0, 1): False, (0, 0): True, (3, 0): True}
    assert {text.get_text() for text in first.texts} == {"+4.0\n3", "+5.0\n2", "-0.8\n3"}
    colors = {(int(p.get_y()), int(p.get_x())): p.get_facecolor() for p in first.patches}
    assert len(set(colors.values())) == 3
    # The same scale in every panel, no gain at its lower end.
    (own,) = second.patches
    assert own.get_facecolor() != colors[0, 0]
    assert first.get_xlim() == (0, 2)
    assert first.get_ylim() == (4, 0)


def test_the_report_has_the_map_as_figure_and_table(tmp_path):
    records = make_sweep(tmp_path / "s", two_by_two(), pictures=False)
    made = report.make(records)
    assert "figures/map.svg" in made.pictures
    # The numbers in squares keep their own colour on dark pages.
    assert re.search(rb"<text[^>]*fill: #(f5f5f5|111111)", made.pictures["figures/map.svg"])
    text = made.text()
    assert "## The map" in text
    assert "In brackets" in text
    assert "hatched" in Page(report.page(made)).figure("Gain by model and client")
