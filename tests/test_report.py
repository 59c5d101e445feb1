"""Reports and checks, from rows whose means and intervals are known."""

import base64
import html
import html.parser
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import xml.etree.ElementTree

import numpy as np
import pytest
import rich.console
import scipy.stats
from PIL import Image

import ggl_jax as gx
from ggl_jax.audit import folder as folders
from ggl_jax.audit import metrics, report
from ggl_jax.audit.check import check
from ggl_jax.audit.tables import family_of, leakage, sentences
from ggl_jax.cli import run
from ggl_jax.commands.status import remaining


def make_row(cell, image, defense, psnr, *, attack="ggl", seed=0, **changes):
    sigma = float(defense.split(":")[-1]) if ":" in defense else None
    return {
        "cell": cell,
        "part": 0,
        "parts": 1,
        "image": image,
        "axes": {"attack": attack, "defense": defense, "seed": seed, "image": image},
        "defense": defense,
        "attack": attack,
        "optimizer": "adam",
        "seed": seed,
        "label_true": 1,
        "label_inferred": 1,
        "label_accuracy": 1.0,
        "defense_true": {} if sigma is None else {"sigma": sigma},
        "defense_estimated": {} if sigma is None else {"sigma": 1.02 * sigma},
        "psnr": psnr,
        "ssim": 0.5,
        "mse_r": 0.01,
        "lpips": None,
        "psnr_control_mean": 9.0,
        "psnr_control_best": 12.0,
        "psnr_mean_image": 11.0,
        "psnr_ceiling": 22.0,
        "evaluations": 100,
        "seconds": 2.0,
        "status": "ok",
        "ok": True,
        "loss_curve": [[1, 2, 3], [3.0, 2.0, 1.0]],
    } | changes


def make_sweep(folder, rows, *, failed=(), left=(), pictures=True):
    cells = {row["cell"]: {**row["axes"], "evaluations": 100} for row in rows}
    for cell in (*failed, *left):
        axes = {"attack": "ggl", "defense": "none", "seed": 9, "image": "x", "evaluations": 100}
        cells[cell] = axes
    config = {"command": "ggl-jax sweep <g>.toml", "options": {"axes": {}}, "inputs": {}}
    folders.prepare(folder, config, cells)
    for row in rows:
        folders.keep(folder, row["cell"], [row], np.full((1, 4, 4, 3), 0.5))
        if not pictures:
            (folder / f"cells/{row['cell']}-0.png").unlink()
    for cell in failed:
        folders.fail(folder, cell, "ValueError: <b>no</b>")
    return folders.read(folder)


def write(records):
    return report.write(report.make(records), records.folder)


def grid_rows(defenses, attacks, images, seeds=1):
    rng = np.random.default_rng(0)
    return [
        make_row(f"{d}{a}{i}{s}".replace(":", "-"), f"face-{i}.png", d,
                 12 + i + rng.normal(), attack=a, seed=s)
        for d in defenses for a in attacks for i in range(images) for s in range(seeds)
    ]  # fmt: skip


def test_means_and_intervals_are_over_images_with_seeds_averaged_first(tmp_path):
    values = {"a": [12.0, 14.0], "b": [15.0, 17.0], "c": [20.0, 20.0]}
    rows = [
        make_row(f"{image}{seed}", image, "none", psnr, seed=seed)
        for image, own in values.items()
        for seed, psnr in enumerate(own)
    ]
    (found,) = leakage(make_sweep(tmp_path / "s", rows).rows)
    means = [13.0, 16.0, 20.0]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(means), scipy.stats.sem(means))
    np.testing.assert_allclose(found.means["psnr"], (np.mean(means), low, high), rtol=1e-12)
    # The mean image (11 dB) is the stronger guess here.
    gain = np.asarray(found.means["psnr"]) - 11.0
    np.testing.assert_allclose(found.means["gain"], gain, rtol=1e-12)
    assert (len(found.images), len(found.rows)) == (3, 6)


def test_labels_of_a_batch_count_as_multisets():
    # The rows were put in order by likeness, so row by row the labels differ.
    batch = [
        make_row("b", f"{i}", "none", 12.0, label_true=i % 4, label_inferred=(i + 1) % 4)
        for i in range(16)
    ]
    (found,) = leakage(batch)
    assert found.means["label"].mean == 100.0
    assert "read off the update exactly under no defense" in " ".join(sentences([found]))
    # Not where another attack, model or client had one wrong, although less leaked there.
    other = [dict(row, psnr=9.0, label_accuracy=0.75) for row in batch]
    both = [found, leakage(other)[0]._replace(variant="batch 16")]
    assert "read off the update exactly" not in " ".join(sentences(both))


def test_intervals_end_where_the_score_does():
    (found,) = leakage([make_row(f"{i}", f"{i}", "none", 12.0, ssim=i * 0.5) for i in range(2)])
    assert found.means["ssim"] == (0.25, -1.0, 1.0)


@pytest.mark.parametrize(
    ("values", "leaked"),
    [
        ([None, None], True),  # exact copies: an infinite PSNR, no interval
        ([None, 11.5], True),
        ([11.9, 11.95], False),  # less than can be seen
        ([12.5], True),
        ([40.0, 10.0], False),  # an interval that reaches below zero
    ],
)
def test_one_verdict(tmp_path, values, leaked):
    rows = [make_row(f"{i}", f"{i}", "none", v) for i, v in enumerate(values)]
    (found,) = leakage(rows)
    assert found.leaked == leaked
    said = " ".join(sentences([found]))
    assert ("leaked beyond the blind guess** under no defense" in said) == leaked
    assert ("shown** under no defense" in said) == (not leaked)
    assert "under none" not in said
    assert "nan" not in said


def test_a_broken_search_is_no_exact_copy():
    # NaN is null in a row, as an infinite PSNR is.
    (found,) = leakage([make_row("a", "a", "none", None, mse=None)])
    assert not found.leaked
    (found,) = leakage([make_row("a", "a", "none", None, mse=0.0)])
    assert found.leaked


@pytest.mark.parametrize(
    ("defense", "expected"),
    [
        ("none", ("none", None)),
        ("clip:4", ("clip", 4.0)),
        ("clip:4+noise:0.1", ("clip+noise:0.1", 4.0)),
        ("noise:1e-2", ("noise", 0.01)),
        ("noise:1e+2", ("noise", 100.0)),
        ("soteria:0.8,chunk_size=3", ("soteria,chunk_size=3", 0.8)),
        ("soteria:rate=0.8", ("soteria:rate=0.8", None)),
    ],
)
def test_families(defense, expected):
    assert family_of(defense) == expected


# --- check --------------------------------------------------------------------------------------


def check_command(folder, *options):
    return run(["check", str(folder), *options])


def test_check_compares_the_upper_end_of_the_interval(tmp_path, capsys):
    # Gains of "none": 4 +- 0 dB; of noise: mean 0, and an interval that reaches beyond 2 dB.
    rows = [make_row(f"n{i}", f"{i}", "none", 15.0) for i in range(3)]
    rows += [make_row(f"z{i}", f"{i}", "noise:0.1", 11.0 + d) for i, d in enumerate((-2, 0, 2))]
    make_sweep(tmp_path / "s", rows)
    folder = tmp_path / "s"
    upper = scipy.stats.t.ppf(0.975, 2) * 2 / np.sqrt(3)  # 4.97
    assert check_command(folder, "--max-psnr-over-control", "5") == 0
    assert "none, noise:0.1" in capsys.readouterr().out
    assert check_command(folder, "--max-psnr-over-control", "4.5") == 1
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("noise:0.1 may leak more than 4.5")
    assert f"upper end of the 95 % interval {upper:.3g}, by ggl by adam, 3 images" in said[0]
    assert check_command(folder, "--max-psnr-over-control", "4.5", "--defense", "none") == 0
    capsys.readouterr()
    assert check_command(folder, "--max-psnr-over-control", "1", "--max-ssim", "0.4") == 1
    assert len(capsys.readouterr().out.strip().splitlines()) == 4
    assert check_command(folder, "--max-ssim", "0.5") == 0


def test_check_takes_the_attack_that_got_furthest(tmp_path):
    rows = [make_row(f"w{i}", f"{i}", "none", 11.0, attack="ig") for i in range(2)]
    rows += [make_row(f"s{i}", f"{i}", "none", 16.0) for i in range(2)]
    records = make_sweep(tmp_path / "s", rows)
    (finding,) = check(records, {"gain": 2.0})
    assert finding.violated
    assert finding.worst == 5.0
    assert finding.group.variant == "ggl"


@pytest.mark.parametrize(
    ("rows", "more", "options", "words"),
    [
        ([("a", 12.0)], {}, {"bounds": {"ssim": 1}}, "one image"),
        ([("a", 12.0), ("b", 12.0)], {}, {"bounds": {}}, "no bound"),
        ([("a", 12.0), ("b", 12.0)], {"left": ["x"]}, {"bounds": {"ssim": 1}}, "not run yet"),
        ([("a", 12.0), ("b", 12.0)], {"failed": ["x"]}, {"bounds": {"ssim": 1}}, "failed"),
        (
            [("a", 12.0), ("b", 12.0)],
            {},
            {"bounds": {"ssim": float("nan")}},
            "ssim=nan, .* -1 to 1",
        ),
        ([("a", 12.0), ("b", 12.0)], {}, {"bounds": {"ssim": float("inf")}}, "-1 to 1"),
        ([("a", 12.0), ("b", 12.0)], {}, {"bounds": {"ssim": -1.1}}, "-1 to 1"),
        ([("a", 12.0), ("b", 12.0)], {}, {"bounds": {"gain": float("inf")}}, "finite"),
        ([("a", 12.0), ("b", 12.0)], {}, {"bounds": {"ssmi": 0.5}}, "did you mean 'ssim'"),
        ([("a", 12.0), ("b", 12.0)], {}, {"bounds": {"lpips": 0.5}}, "lpips was not measured"),
        (
            [("a", 12.0), ("b", 12.0)],
            {},
            {"bounds": {"ssim": 1}, "defenses": ["x"]},
            "allowed: none",
        ),
        ([], {}, {"bounds": {"ssim": 1}}, "no results"),
    ],
)
def test_check_claims_nothing_without_grounds(tmp_path, rows, more, options, words):
    rows = [make_row(name, name, "none", psnr) for name, psnr in rows]
    records = make_sweep(tmp_path / "s", rows, **more)
    with pytest.raises(gx.GGLError, match=words):
        check(records, **options)


def test_check_counts_exact_copies_and_broken_searches(tmp_path, capsys):
    rows = [make_row(f"{i}", f"{i}", "none", None) for i in range(2)]
    (finding,) = check(make_sweep(tmp_path / "a", rows), {"gain": 50.0})
    assert finding.violated
    broken = {"status": "the matching loss became NaN or infinite", "ok": False}
    rows = [make_row(f"{i}", f"{i}", "none", 9.0, **broken) for i in range(2)]
    make_sweep(tmp_path / "b", rows)
    assert check_command(tmp_path / "b", "--max-ssim", "1") == 2
    assert "broke down" in capsys.readouterr().err
    assert check_command(tmp_path / "nowhere", "--max-ssim", "1") == 2


def test_check_bounds_any_score_in_its_own_direction(tmp_path, capsys):
    rows = [
        make_row(f"{i}", f"{i}", "none", 12.0, lpips=0.4 + d, lpips_backbone="alex")
        for i, d in enumerate((-0.1, 0, 0.1))
    ]
    make_sweep(tmp_path / "s", rows)
    low = 0.4 - scipy.stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3)  # 0.15
    assert check_command(tmp_path / "s", "--bound", "lpips=0.1", "ssim=0.6") == 0
    assert check_command(tmp_path / "s", "--bound", "lpips=0.2") == 1
    assert f"lower end of the 95 % interval {low:.3g}" in capsys.readouterr().out
    assert check_command(tmp_path / "s", "--bound", "lpips") == 2
    assert "SCORE=NUMBER" in capsys.readouterr().err


def test_check_names_the_searches_that_stalled(tmp_path, capsys):
    stalled = {"status": "the search stopped making progress", "ok": False}
    rows = [make_row(f"{i}", f"face-{i}", "none", 12.0, **(stalled if i else {})) for i in range(3)]
    rows += [make_row(f"c{i}", f"face-{i}", "clip:4", 12.0) for i in range(3)]
    make_sweep(tmp_path / "s", rows)
    assert check_command(tmp_path / "s", "--max-ssim", "0.5") == 0
    said = capsys.readouterr().out
    assert "2 of 3 searches by ggl by adam under no defense stopped" in said
    assert "face-1, face-2" in said
    assert "face-0" not in said
    assert check_command(tmp_path / "s", "--max-ssim", "0.5", "--defense", "clip:4.0") == 0
    assert "stopped" not in capsys.readouterr().out


def test_what_was_asked_for_and_is_not_there_yet_is_no_pass(tmp_path, capsys):
    """An audit that was interrupted between two images."""
    rows = [make_row(f"{i}", f"{i}", "none", 12.0) for i in range(2)]
    for row in rows:
        row["axes"] = {"defense": "none", "seed": 0, "image": row["image"]}
    records = make_sweep(tmp_path / "a", rows)
    assert write(records).is_file()
    assert not check(records, {"gain": 2}, defenses=["none"])[0].violated
    assert len(make_sweep(tmp_path / "b", rows, left=["2"]).left) == 1
    assert check_command(tmp_path / "b", "--max-psnr-over-control", "5") == 2
    assert "1 cell of none failed or not run yet" in capsys.readouterr().err
    assert run(["status", str(tmp_path / "b")]) == 0
    assert "3 cells: 2 done, 0 failed, 1 left" in capsys.readouterr().out


def test_defenses_are_found_in_any_spelling(tmp_path):
    names = ["clip:4", "noise:0.1", "sparsify:0.9"]
    rows = [make_row(f"{d}{i}", f"{i}", d, 12.0) for d in names for i in range(2)]
    for row in rows:
        row["axes"]["defense"] = row["defense"].replace("clip:4", "clip:4.0")
    records = make_sweep(tmp_path / "s", rows)
    found = check(records, {"ssim": 0.6}, defenses=["clip:bound=4", "noise:1e-1", "sparsify:.9"])
    assert [finding.group.defense for finding in found] == names
    assert [f.group.defense for f in check(records, {"ssim": 0.6})] == names


# --- status -------------------------------------------------------------------------------------


def test_status_says_what_is_left_and_how_long(tmp_path, capsys):
    rows = [make_row("a", "1", "none", 12.0), make_row("b", "1", "noise:1", 12.0, seconds=40.0)]
    records = make_sweep(tmp_path / "s", rows, failed=["f"], left=["l", "m"])
    # 100 evaluations took 2 s under the defense of the cells that are left.
    assert remaining(records) == pytest.approx(4.0)
    assert run(["status", str(tmp_path / "s")]) == 0
    said = capsys.readouterr().out
    assert "5 cells: 2 done, 1 failed, 2 left" in said
    assert "0:00:04" in said
    assert "ValueError: <b>no</b>" in said


# --- report -------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Checks that tags match and nothing outside is referred to; collects what is in the page."""

    void = frozenset(("meta", "img", "br", "path", "use", "line", "rect", "circle", "link", "hr"))

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.tables, self.text = [], [], 0, []
        self.feed(text)
        self.close()
        assert not self.open

    @property
    def said(self):
        return "".join(self.text)

    def figure(self, start):
        """The SVG text of the one picture whose description starts so."""
        (found,) = (image for image in self.images if image["alt"].startswith(start))
        return base64.b64decode(found["src"].partition("base64,")[2]).decode()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        for name in ("src", "href", "xlink:href", "data", "action"):
            link = values.get(name, "#")
            assert link.startswith(("data:", "#")), link
        assert tag not in ("script", "link", "iframe", "object", "b")
        if tag == "img":
            assert values["alt"]
            self.images.append(values)
        self.tables += tag == "table"
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def rendered(report_, width=80):
    """What an 80-column terminal shows."""
    console = rich.console.Console(width=width, file=io.StringIO(), color_system=None)
    console.print(report.terminal(report_))
    return console.file.getvalue()


def test_the_page_needs_nothing_else_and_says_what_was_found(tmp_path):
    rows = grid_rows(["none", "noise:0.1", "noise:0.2"], ["ggl", "ig"], 3)
    records = make_sweep(tmp_path / "s", rows, failed=["f"], left=["l"])
    path = write(records)
    text = path.read_text()
    page = Page(text)
    # By defense, by noise's parameter, three images, losses under three defenses.
    assert len(page.images) == 1 + 1 + 3 + 3
    for image in page.images:
        svg = base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,")).decode()
        root = xml.etree.ElementTree.fromstring(svg)
        assert float(root.get("width").removesuffix("pt")) <= 72 * report.figures.WIDTH + 1
        assert "prefers-color-scheme" in svg
        assert not re.search(r"@import|(href|src)=\"(?!#|data:)|url\((?!#|data:)", svg)
    assert "prefers-color-scheme" in text
    assert "default-src 'none'" in text
    assert "1 cell failed. 1 cell not run yet." in page.said
    assert "ValueError: <b>no</b>" in page.said  # escaped: else the parser saw a tag
    means = {g.defense + g.variant: g.means["psnr"].mean for g in leakage(records.rows)}
    assert f"{means['noise:0.2ig']:.1f}" in page.said
    assert "0.102" in page.said  # the estimated sigma
    assert "sweep <g>.toml" in page.said
    # The file has the same words and figures.
    markdown = path.with_suffix(".md").read_text()
    for line in markdown.splitlines():
        if line.startswith("!["):
            assert (path.parent / line.rpartition("(")[2].rstrip(")")).is_file()
    assert f"| noise:0.2 | ig | {means['noise:0.2ig']:.1f} |" in markdown


def test_the_three_views_say_the_same(tmp_path):
    rows = [make_row(f"{d}{i}", f"{i}", d, psnr) for d, psnr in (("none", 15), ("clip:4", 11))
            for i in range(3)]  # fmt: skip
    records = make_sweep(tmp_path / "s", rows)
    path = write(records)
    views = (
        Page(path.read_text()).said,
        path.with_suffix(".md").read_text(),
        rendered(report.make(records)),
    )
    for view in views:
        words = " ".join(view.replace("**", "").split())
        assert "The images leaked beyond the blind guess under no defense (15.0 dB" in words
        assert "No leak beyond the blind guess was shown under clip:4 (11.0 dB" in words
        assert "6 cells on 3 images." in words
        assert "under none" not in words


@pytest.mark.parametrize("name", ["<b>|x`*_y_", "a & b ~~c~~ [d](e)", "\\|", "$x^$"])
def test_names_are_shown_as_they_are(tmp_path, name):
    rows = [make_row(f"{i}", f"{name}{i}", f"{name}:1", 12.0 + i, attack=a)
            for i in range(3) for a in ("ggl", name)]  # fmt: skip
    for number, row in enumerate(rows):
        row["cell"] = f"c{number}"
    records = make_sweep(tmp_path / "s", rows)
    report_ = report.make(records)
    shown = " ".join(name.split())
    page = Page(report.page(report_))
    assert page.said.count(f"{shown}:1") >= 5
    assert f"{shown}:1" in rendered(report_, width=200)
    assert any(f"{shown}0" in image["alt"] for image in page.images)


def test_users_metrics_are_in_every_view(tmp_path, monkeypatch):
    worst = metrics.Metric(lambda x, y, *_: 0.0, "the worst pixel", "Worst", "", 2, "lower")
    monkeypatch.setitem(metrics.METRICS, "worst", worst)
    monkeypatch.setitem(metrics.METRICS, "plain", lambda x, y, *_: 0.0)
    rows = [make_row(f"{i}", f"{i}", "mine", 12.0, worst=0.25, plain=7.0) for i in range(3)]
    records = make_sweep(tmp_path / "s", rows)
    report_ = report.make(records)
    for view in (Page(report.page(report_)).said, report_.text(), rendered(report_, width=120)):
        for word in ("mine", "Worst", "0.25 [0.25", "the worst pixel", "lower is nearer", "plain"):
            assert word in view, word
    assert check(records, {"worst": 0.3})[0].violated
    assert not check(records, {"plain": 7.5})[0].violated


def test_lpips_names_its_network(tmp_path):
    rows = [make_row(f"{i}", f"{i}", "none", 12.0, lpips=0.3, lpips_backbone="alex")
            for i in range(2)]  # fmt: skip
    assert "LPIPS (alex)" in report.make(make_sweep(tmp_path / "a", rows)).text()
    note = {"lpips_backbone": "vgg", "lpips_note": "its weights are not installed"}
    rows = [make_row(f"{i}", f"{i}", "none", 12.0, **note) for i in range(2)]
    text = report.make(make_sweep(tmp_path / "b", rows)).text()
    assert "LPIPS (vgg) was not measured: its weights are not installed." in text
    assert "**LPIPS" not in text


def test_a_gain_is_the_difference_that_is_printed(tmp_path):
    rows = [make_row(f"{i}", f"{i}", "none", 14.04, psnr_mean_image=10.86) for i in range(2)]
    text = report.make(make_sweep(tmp_path / "s", rows)).text()
    assert "| none | 14.0 | 10.9 | +3.1 [" in text
    assert "+3.2" not in text.split("[")[0]


def test_a_terminal_of_80_columns_shows_intervals_whole(tmp_path):
    names = ["none", "noise:0.1", "clip:4", "sparsify:0.9", "soteria:0.8", "clip:4+noise:0.1"]
    rows = [make_row(f"{d}{i}", f"{i}", d, 12.0 + i) for d in names for i in range(3)]
    shown = rendered(report.make(make_sweep(tmp_path / "s", rows)))
    (line,) = re.findall(r"clip:4\+noise:0.1 .*yes|clip:4\+noise:0.1 .*not shown", shown)
    assert re.search(r"\+2\.0 \[-0\.5,\s\+4\.5\]", line)


def test_one_image(tmp_path):
    text = report.make(make_sweep(tmp_path / "s", [make_row("a", "face", "none", 15.0)])).text()
    assert "1 cell on 1 image." in text
    assert "One image gives no interval" in text
    assert "Identified) was not tested" in text
    assert "| none | 15.0 | 11.0 | +4.0 | 12.0 | 22.0 | **yes** |" in text


def test_refinement_has_a_curve_of_its_own(tmp_path):
    # Its loss is another one, and may start higher.
    row = make_row("a", "a", "none", 12.0, refinement_steps=2,
                   loss_curve=[[1, 2, 3, 4, 5], [3.0, 2.0, 1.0, 9.0, 8.0]])  # fmt: skip
    assert report.figures.stages(row) == {
        "search": ([1, 2, 3], [3.0, 2.0, 1.0]), "refinement": ([4, 5], [9.0, 8.0])
    }  # fmt: skip
    records = make_sweep(tmp_path / "s", [row])
    drawn = Page(report.page(report.make(records))).figure("Lowest")
    assert "step of the search" in drawn
    assert "step of the refinement" in drawn
    plain = make_row("b", "b", "none", 12.0, refinement_steps=0)
    assert list(report.figures.stages(plain)) == ["search"]
    assert report.figures.stages(make_row("c", "c", "none", 12.0, loss_curve=[[], []])) == {}


def test_loss_axes_have_plain_numbers(tmp_path):
    row = make_row("a", "a", "noise:1", 12.0, loss_curve=[[1, 2, 3], [57.18, 57.16, 57.15]])
    svg = Page(report.page(report.make(make_sweep(tmp_path / "s", [row])))).figure("Lowest")
    ticks = re.findall(r">(57\.\d+)</text>", svg)
    assert len(ticks) >= 3
    assert "e+" not in svg.split("</style>")[-1]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_in_a_browser(tmp_path):
    records = make_sweep(tmp_path / "s", grid_rows(["none", "noise:0.1"], ["ggl"], 3))
    page = write(records)
    for width, dark in ((400, False), (1200, True)):
        shot = tmp_path / f"{width}.png"
        browser = [
            "chromium",
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            f"--user-data-dir={tmp_path / str(width)}",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            f"--window-size={width},1200",
            "--enable-logging=stderr",
            f"--screenshot={shot}",
            page.as_uri(),
        ]
        done = subprocess.run(browser, capture_output=True, text=True, timeout=90, env=os.environ)
        if not shot.is_file():
            pytest.skip(f"chromium does not run here: {done.stderr[-300:]}")
        assert "CONSOLE" not in done.stderr  # no script, style or image was refused
        pixels = np.asarray(Image.open(shot).convert("L"), np.float32)
        ground = np.median(pixels)
        assert (ground < 60) if dark else (ground > 200)
        # Something is drawn on it that can be told from it.
        assert np.mean(np.abs(pixels - ground) > 100) > 0.005


#: A page's width, and where the first table's columns end, in a frame of a width: of its own it has
#: no scripts.
_MEASURE = """<body style="margin:0">
<iframe id="frame" src="{page}" style="border:0;width:{width}px"></iframe>
<pre id="said"></pre><script>onload = () => {{
const page = frame.contentDocument, ends = {{"": page.documentElement.scrollWidth}};
for (const one of page.querySelector("thead").querySelectorAll("th"))
  ends[one.textContent] = one.getBoundingClientRect().right;
said.textContent = JSON.stringify(ends);}}</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize(("width", "seen"), [(400, "PSNR"), (800, "Leak"), (1200, "Leak")])
def test_the_page_fits_every_width(tmp_path, width, seen):
    long = "soteria:0.8,representation=False+sparsify:0.9"
    page = write(make_sweep(tmp_path / "s", grid_rows(["none", long], ["ggl", "ig"], 3)))
    frame = tmp_path / "frame.html"
    frame.write_text(_MEASURE.format(page=page.as_uri(), width=width))
    browser = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,900"),
        *("--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'browser'}"),
        *("--virtual-time-budget=5000", "--dump-dom", frame.as_uri()),
    ]
    done = subprocess.run(browser, capture_output=True, text=True, timeout=90, env=os.environ)
    found = re.search(r'<pre id="said">(.+?)</pre>', done.stdout)
    if found is None:
        pytest.skip(f"chromium does not run here: {done.stderr[-300:]}")
    ends = json.loads(html.unescape(found[1]))
    assert ends.pop("") <= width  # wide tables scroll in boxes of their own
    assert ends[seen] <= width


def test_a_thousand_cells_stay_readable(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    defenses = ["none", *(f"noise:{s}" for s in (0.01, 0.03, 0.1, 0.3))]
    rows = grid_rows(defenses, ["ggl", "dlg", "ig", "gi"], 25, seeds=2)
    assert len(rows) == 1000
    page = Page(report.page(report.make(make_sweep(tmp_path / "s", rows))))
    assert len(page.said) < 60_000
    # overview, by noise's parameter, a curve for each defense
    assert len(page.images) == report.MAX_IMAGES + 2 + 5


def test_an_empty_folder_and_others_are_refused(tmp_path, capsys):
    make_sweep(tmp_path / "s", [], left=["l"])
    assert run(["report", str(tmp_path / "s")]) == 2
    assert "no finished cell" in capsys.readouterr().err
    assert run(["report", str(tmp_path)]) == 2
    assert run(["report", str(tmp_path / "s"), "--compare"]) == 2
    capsys.readouterr()
    assert run(["report", str(tmp_path / "s"), f"{tmp_path}/./s", "--compare"]) == 2
    assert "given twice" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["plan.json", "cells/c.npy", "controls/c.npz"])
def test_a_damaged_folder_is_refused(tmp_path, capsys, file):
    folder = make_sweep(tmp_path / "s s", [make_row("c", "a", "none", 12.0)]).folder
    row = {"controls": "controls/c.npz"} if "npz" in file else {}
    folders.keep(folder, "c", [make_row("c", "a", "none", 12.0, **row)], np.ones((1, 4, 4, 3)))
    (folder / file).write_bytes(b"{}")
    assert run(["report", str(folder)]) == 2
    assert f"s s/{file}" in capsys.readouterr().err


def test_the_report_says_a_command_that_a_shell_takes(tmp_path):
    folder = tmp_path / "a 'b"
    text = report.make(make_sweep(folder, [make_row("c", "a", "none", 12.0)])).text()
    assert f"ggl-jax utility {shlex.quote(str(folder))} trains" in text


def test_comparison_is_paired_by_image(tmp_path):
    # Images differ widely; the difference between the runs is the same for each, but for 0.1 dB.
    a = [make_row(f"a{i}", f"{i}", "none", 12.0 + 5 * i) for i in range(3)]
    b = [make_row(f"b{i}", f"{i}", "none", 13.0 + 5 * i + d) for i, d in enumerate((-0.1, 0, 0.1))]
    b.append(make_row("b9", "9", "none", 90.0))  # not in both
    first, second = (make_sweep(tmp_path / n, rows) for n, rows in (("a", a), ("b", b)))
    ((defense, _, images, in_a, in_b, difference),) = report.compare(first, second)
    assert (defense, images) == ("none", 3)
    assert in_a.mean == pytest.approx(6.0)
    assert in_b.mean == pytest.approx(7.0)
    reach = scipy.stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3)
    np.testing.assert_allclose(difference, (1.0, 1.0 - reach, 1.0 + reach), rtol=1e-9)
    path = tmp_path / "out"
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert run(["report", *folders, "--compare", "--out", str(path)]) == 0
    page = Page((path / "comparison.html").read_text())
    assert "+1.0 [+0.8,\N{NO-BREAK SPACE}+1.2]" in page.said
    assert run(["report", folders[0], folders[0], "--compare", "--out", str(path)]) == 2
