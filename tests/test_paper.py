"""The paper's experiments: their published numbers, their table, and runs from end to end."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ggl_jax import checkpoint
from ggl_jax.adversary.attacks import ATTACKS
from ggl_jax.audit import metrics, paper
from ggl_jax.audit import run as cell_runs
from ggl_jax.audit.controls import Controls, write_controls
from ggl_jax.audit.folder import Records
from ggl_jax.cli import run
from ggl_jax.client import models
from ggl_jax.commands import landscape
from ggl_jax.priors import BIGGAN_DEEP, biggan_deep, dcgan
from ggl_jax.types import Public

SHARED = Path(__file__).parents[2] / "shared"
EVERY = [(name, half) for name in paper.EXPERIMENTS for half in paper.HALVES]

# --- the published numbers --------------------------------------------------------------------

#: The paper's tables as a person copied them, apart from the program's.
TABLES = """
**Table 1
| R1 (KLD) | 0.0320 ± 0.0173 | 15.6814 ± 2.6387 | 0.03671 ± 0.0227 | 15.3471 ± 3.1093 |
| R2 (norm) | 0.0337 ± 0.0206 | 15.5405 ± 2.7090 | 0.06290 ± 0.0815 | 14.3249 ± 4.1627 |
**Table 2
| CelebA | MSE-I | 0.0427 | 0.0025 | 0.0813 | 0.0131 | 0.0708 | 0.0008 |
| CelebA | PSNR | 13.6965 | 0.2593 | 10.9455 | 0.6816 | 11.4989 | 0.0533 |
| CelebA | LPIPS | 0.1435 | 0.0083 | 0.2162 | 0.0328 | 0.2136 | 0.0133 |
| CelebA | MSE-R | 0.0003 | 0.0001 | 0.0012 | 0.0003 | 0.0015 | 0.0022 |
| ImageNet | MSE-I | 0.5918 | 0.1955 | 0.2648 | 0.0181 | 0.2667 | 0.0119 |
| ImageNet | PSNR | 2.4433 | 1.3565 | 5.7783 | 0.2992 | 5.7420 | 0.1988 |
| ImageNet | LPIPS | 0.7983 | 0.0280 | 0.6166 | 0.0590 | 0.5736 | 0.0209 |
| ImageNet | MSE-R | 0.1051 | 0.0703 | 0.0035 | 0.0005 | 0.0018 | 0.0002 |
**Table 3
| CelebA | DLG | .6479 / 1.8843 / .8197 / .0021 | .2097 / 6.7831 / .7375 / .0326 | .3335 / 4.7679 / .7986 / .0155 | .3624 / 4.4069 / .8007 / .0285 |
| CelebA | iDLG | .6261 / 2.0329 / .8209 / .0025 | .1960 / 7.0762 / .7280 / .0326 | .3301 / 4.8124 / .8035 / .0162 | .3269 / 4.8553 / .8036 / .0396 |
| CelebA | IG | .4880 / 3.1151 / .8260 / .0097 | .0543 / 12.6517 / .2998 / .0003 | .4103 / 3.8687 / .7975 / .0113 | .3441 / 4.6326 / .8008 / .0316 |
| CelebA | GI | .5738 / 2.4116 / .8302 / .0023 | .1790 / 7.4701 / .7142 / .0322 | .2958 / 5.2888 / .7775 / .0163 | .3179 / 4.9768 / .7991 / .0409 |
| CelebA | GGL | .0780 / 11.0766 / .1906 / .0010 | .0760 / 11.1902 / .1670 / .0015 | .0768 / 11.1466 / .1620 / .0007 | .0968 / 10.1434 / .2561 / .0007 |
| ImageNet | DLG | .7438 / 1.2852 / .9353 / .0049 | .3809 / 4.1912 / .9798 / 2.1610 | .4432 / 3.5336 / .8907 / .0075 | .5990 / 2.2253 / .9195 / .5415 |
| ImageNet | iDLG | .7352 / 1.3359 / .9392 / .0041 | .3699 / 4.3190 / .9473 / 1.8810 | .4357 / 3.6077 / .8935 / .0077 | .6089 / 2.1542 / .9198 / .5425 |
| ImageNet | IG | .3081 / 5.1120 / .8677 / .4490 | .1432 / 8.4386 / .7476 / .0214 | .2993 / 5.2376 / .8805 / .0501 | .3683 / 4.3373 / .8700 / .5057 |
| ImageNet | GI | .6593 / 1.8090 / .9448 / .0031 | .3702 / 4.3154 / .9451 / 1.8807 | .4404 / 3.5611 / .8889 / .0072 | .6235 / 2.0511 / .9169 / .5792 |
| ImageNet | GGL | .2686 / 5.7089 / .5915 / .0018 | .2230 / 6.5163 / .5592 / .0015 | .2141 / 6.6920 / .5170 / .0017 | .2484 / 6.0477 / .5685 / .0022 |
**Figure 7
| rate | DLG | iDLG | IG | GI | GGL |
| 0 % | 15.3377 | 13.5702 | 12.7110 | 7.8870 | 11.9983 |
| 10 % | 4.6525 | 4.8764 | 5.1048 | 4.7128 | 13.7856 |
| 20 % | 4.5548 | 4.3438 | 4.6627 | 4.9860 | 9.8979 |
| 40 % | 4.6764 | 4.5971 | 5.0559 | 4.8289 | 12.6424 |
| 80 % | 4.6567 | 4.5129 | 4.6079 | 4.9889 | 9.4066 |
"""  # noqa: E501

NUMBER = re.compile(r"\d*\.\d{4,}")
METRICS = {"MSE-I": "mse_i", "PSNR": "psnr_paper", "LPIPS": "lpips", "MSE-R": "mse_r"}


def values_of(text: str) -> dict[tuple[str, ...], tuple[float, ...]]:
    """(experiment, half, defense, attack, metric) -> value, or value and deviation."""
    found: dict[tuple[str, ...], tuple[float, ...]] = {}
    table = ""
    for line in text.splitlines():
        heading = re.match(r"\*\*(Table|Figure) (\d)", line)
        if heading:
            table = f"{heading[1]}{heading[2]}".lower()
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells or not any(NUMBER.fullmatch(word) for word in line.split()):
            continue
        numbers = [tuple(float(x) for x in NUMBER.findall(cell)) for cell in cells]
        if table == "table1":
            for i, d in ((1, "D1"), (3, "D2")):
                name = f"{d} + {cells[0][:2]}"
                for metric, value in (("mse_i", numbers[i]), ("psnr_paper", numbers[i + 1])):
                    found[table, "celeba", "none", name, metric] = value
        elif table == "table2":
            for i, name in ((2, "Adam"), (4, "BO"), (6, "CMA-ES")):
                key = table, cells[0].lower(), "none", name, METRICS[cells[1]]
                found[key] = numbers[i] + numbers[i + 1]
        elif table == "table3":
            for defense, four in zip(paper.DEFENSES, numbers[2:], strict=True):
                for metric, value in zip(METRICS.values(), four, strict=True):
                    found[table, cells[0].lower(), defense, cells[1], metric] = (value,)
        elif table == "figure7":
            defense = f"soteria:{int(cells[0].split()[0]) / 100:g}"
            for name, value in zip(("DLG", "iDLG", "IG", "GI", "GGL"), numbers[1:], strict=True):
                found[table, "celeba", defense, name, "psnr_paper"] = value
    return found


def programs_values() -> dict[tuple[str, ...], tuple[float, ...]]:
    found = {}
    for name in ("table1", "table2", "table3", "figure7"):
        for half in paper.HALVES:
            cells = paper.EXPERIMENTS[name](half=half).published()
            for (attack, defense), row in cells.items():
                for metric in METRICS.values():
                    if row[metric]:
                        value = tuple(float(x) for x in row[metric].split("±"))
                        found[name, half, defense, attack, metric] = value
    return found


def test_published_numbers_are_the_papers():
    expected = values_of(TABLES)
    assert len(expected) == 8 + 24 + 160 + 25
    assert programs_values() == expected
    # Figures 3 and 4 show the runs of Tables 2 and 3.
    for figure, table in (("figure3", "table2"), ("figure4", "table3")):
        for half in paper.HALVES:
            shown = paper.EXPERIMENTS[figure](half=half)
            assert shown.published() == paper.EXPERIMENTS[table](half=half).published() != {}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the development files are not here")
def test_published_numbers_in_the_other_direction():
    assert values_of((SHARED / "PAPER.md").read_text()) == programs_values()


# --- what they state and run ------------------------------------------------------------------


@pytest.mark.parametrize(("name", "half"), EVERY)
def test_experiments_state_what_they_are(name, half):
    kind = paper.EXPERIMENTS[name]
    for word in (f"``ggl-jax reproduce {name} ", "Command:", "Cost:"):
        assert word in kind.__doc__
    assert kind.title.startswith(f"{name[:-1].title()} {name[-1]}: ")
    for scale in ("quick", "paper"):
        for fidelity in ("paper", "code"):
            experiment = kind(scale, half, fidelity)
            with pytest.raises(dataclasses.FrozenInstanceError):
                experiment.scale = "other"
            runs = experiment.runs([3, 4])
            assert len(set(runs)) == len(runs) == 2 * len(experiment.searches())
            for one in runs:
                assert one.search.attack in ATTACKS
                smallest = fidelity == "code" and one.search.attack != "dlg"
                assert (one.search.labels == "smallest") == smallest
                assert one.seed in (3, 4)
            # Published numbers belong to searches and defenses that are really run.
            names = {run.name for run in runs}
            for attack, defense in experiment.published():
                assert attack in names
                assert defense in experiment.defenses


def evaluations(search) -> int:
    """Of one image."""
    each = {"cma_es": 50, "cma_es:18": 18, "turbo": 10}.get(search.optimizer, 1)
    return search.pool + search.steps * search.restarts * each


def test_lengths_are_the_published_ones():
    def of(name, scale, half="celeba", fidelity="paper"):
        searches = paper.EXPERIMENTS[name](scale, half, fidelity).searches()
        return {name: evaluations(search) for name, search in searches.items()}

    assert set(of("table1", "paper").values()) == {2500}
    assert of("table2", "paper") == {"Adam": 2500, "BO": 1000, "CMA-ES": 40000}
    assert of("table2", "paper", fidelity="code")["CMA-ES"] == pytest.approx(40000, rel=1e-3)
    assert of("table2", "quick") == {"Adam": 300, "BO": 1000, "CMA-ES": 1000}
    assert of("figure7", "paper") == {
        **{"DLG": 4 * 6000, "iDLG": 4 * 6000, "IG": 4 * 8000, "GI": 4 * 8000},
        "GGL": 4 * 40000,
    }
    assert of("figure7", "paper", "imagenet")["DLG"] == 4 * 1200 * 20
    assert of("figure7", "paper", "imagenet")["IG"] == 4 * 24000
    quick = of("table3", "quick")
    assert len(quick) == 7
    assert all(250 <= number <= 450 for number in quick.values())
    # In the code's fidelity: its penalties, and its forms of the defenses.
    assert paper.Table1(fidelity="code").searches()["D1 + R2"].regularizer == "norm_score:1e-4"
    assert paper.Figure6().defenses == ("noise:0.1", "clip:4", "clip:4+noise:0.1")
    whole = "clip:4,layerwise=False"
    assert paper.Figure6(fidelity="code").defenses == ("noise:0.1", whole, f"{whole}+noise:0.1")
    # Table 1's losses: the published weights of R1.
    adam = paper.Table1().searches()
    assert (adam["D1 + R1"].distance, adam["D1 + R1"].regularizer) == ("squared_l2", "kld:0.1")
    assert (adam["D2 + R1"].distance, adam["D2 + R1"].regularizer) == ("cosine", "kld:1e-4")
    assert {name for name, s in paper.Table3().searches().items() if s.adaptive} == {
        "GGL",
        "IG, adaptive (ours)",
        "GI, adaptive (ours)",
    }


# --- the table --------------------------------------------------------------------------------


def row(psnr, image="a", **more):
    controls = {"psnr_control_mean": 9.0, "psnr_mean_image": 11.0, "psnr_ceiling": 23.0}
    own = {"mse_i": 4 * 10 ** (-psnr / 10), "psnr_paper": psnr - 6.02, "mse_r": 0.001}
    return {"image": image, "psnr": psnr, "lpips": 0.25, **own, **controls, **more}


def table_of(experiment, results, *, lpips="vgg", num_images=2, controls=None):
    text = paper.markdown(
        experiment,
        [
            {**found, "axes": {"search": one.name}, "seed": one.seed}
            for one, rows in results.items()
            for found in rows
        ],
        controls or {},
        num_images=num_images,
        lpips=lpips,
        command="the command",
        where="here",
    )
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return text, cells[0], {(c[0], c[1]): c[2:] for c in cells[2:]}


def first_runs(experiment, name, seeds=(0,)):
    return [one for one in experiment.runs(seeds) if one.name == name]


def test_table_shows_ours_beside_the_papers():
    experiment = paper.Table3()
    (ggl,) = first_runs(experiment, "GGL")
    rows = [row(p, i, defense=d) for d in paper.DEFENSES for p, i in ((16.0, "a"), (18.0, "b"))]
    scored = [{"mse_i": 0.5, "psnr_paper": 3.0, "mse_r": 0.25, "psnr": 9.02}]
    scored += [{"mse_i": 0.7, "psnr_paper": 2.0, "mse_r": 0.25, "psnr": 8.02}]
    text, heading, cells = table_of(experiment, {ggl: rows}, controls={"blind": scored})
    assert heading[2:6] == ["MSE-I (paper)", "PSNR (paper)", "LPIPS vgg (paper)", "MSE-R (paper)"]
    clip = cells["clip:4", "GGL"]
    # Student's t with one degree of freedom: 12.706 * sd / sqrt(2), sd = sqrt(2).
    assert clip[1] == "10.98 ± 12.71 (11.1902)"
    assert clip[0].endswith("(0.0760)")
    assert clip[2:4] == ["0.2500 ± 0.0000 (0.1670)", "0.0010 ± 0.0000 (0.0015)"]
    assert clip[4:] == ["17.00 ± 12.71", "6.00 ± 12.71"]
    # The controls in the same metrics and on the same scale; LPIPS was not measured for them.
    assert cells["*control*", "*blind*"][:4] == [
        *("0.6000 ± 1.2706", "2.50 ± 6.35", "–", "0.2500 ± 0.0000")
    ]
    assert "the command" in text
    assert "\n    " not in text  # Markdown would show it as code
    assert "half of the 95 % interval over images" in text
    # Half of the images are done.
    assert ("clip:4", "GGL (2 of 4)") in table_of(experiment, {ggl: rows}, num_images=4)[2]
    # An image whose reconstruction is exact has no number.
    exact = [{**one, "psnr": None, "psnr_paper": None} for one in rows]
    assert table_of(experiment, {ggl: exact})[2]["clip:4", "GGL"][1] == "– (11.1902)"


@pytest.mark.parametrize("lpips", ["alex", "squeeze"])
def test_published_lpips_stands_beside_vgg_alone(lpips):
    experiment = paper.Table3()
    (ggl,) = first_runs(experiment, "GGL")
    text, heading, cells = table_of(
        experiment, {ggl: [row(16.0, defense="clip:4")]}, lpips=lpips, num_images=1
    )
    assert heading[4] == f"LPIPS {lpips}"
    assert cells["clip:4", "GGL"][2] == "0.2500"
    assert "0.1670" not in text


def test_missing_lpips_is_explained():
    experiment = paper.Table3()
    (ggl,) = first_runs(experiment, "GGL")
    rows = [row(16.0, defense="clip:4", lpips=None, lpips_note="fetch the weights")]
    text, _, cells = table_of(experiment, {ggl: rows}, num_images=1)
    assert cells["clip:4", "GGL"][2] == "– (0.1670)"
    assert "LPIPS was not measured: fetch the weights." in text


def test_table1_has_the_deviation_over_images():
    experiment = paper.Table1()
    (loss,) = first_runs(experiment, "D1 + R1")
    rows = [row(p, defense="none", mse_i=m) for p, m in ((16.0, 0.1), (18.0, 0.2), (23.0, 0.6))]
    text, _, cells = table_of(experiment, {loss: rows}, num_images=3)
    # mean 0.3; deviations -0.2, -0.1, 0.3: sqrt(0.14 / 2)
    assert cells["none", "D1 + R1"][0] == "0.3000 ± 0.2646 (0.0320 ± 0.0173)"
    # mean 12.98; deviations -3, -1, 4: sqrt(26 / 2)
    assert cells["none", "D1 + R1"][1] == "12.98 ± 3.61 (15.6814 ± 2.6387)"
    assert "standard deviation over images" in text


def test_table2_has_the_deviation_over_seeds():
    experiment = paper.Table2()
    runs = first_runs(experiment, "Adam", (0, 1, 2))
    # Two images: the mean over them comes first.
    results = {
        one: [row(0.0, i, defense="none", psnr_paper=p) for i, p in zip("ab", two, strict=True)]
        for one, two in zip(runs, ((10.0, 12.0), (8.0, 10.0), (13.0, 14.0)), strict=True)
    }
    scored = [{"psnr_paper": 3.0}, {"psnr_paper": 4.0}]
    text, _, cells = table_of(experiment, results, controls={"blind": scored})
    # 11, 9, 13.5: mean 11.1667, deviations -0.1667, -2.1667, 2.3333: sqrt(10.1667 / 2)
    assert cells["none", "Adam"][1] == "11.17 ± 2.25 (13.6965 ± 0.2593)"
    assert cells["*control*", "*blind*"][1] == "3.50"
    assert "standard deviation over seeds" in text
    # The other half has other values.
    _, _, cells = table_of(paper.Table2(half="imagenet"), results)
    assert cells["none", "Adam"][1].endswith("(2.4433 ± 1.3565)")


def test_controls_are_scored_by_the_papers_metrics(
    tiny_model, tiny_variables, tiny_prior, tmp_path
):
    params = tiny_prior.init(jax.random.key(1))
    private = np.full((8, 8, 3), 0.25, np.float32)
    grey, ceiling = private + 0.1, private + 0.05
    known = Controls({}, private, grey, ceiling, 1)
    write_controls(tmp_path / "a.npz", known, private)
    result = Records(tmp_path, {}, {}, [{"image": "a", "controls": "a.npz"}] * 2, {})
    public = Public(tiny_model, tiny_variables, tiny_prior, params)
    found = paper.control_scores(result, public, jax.random.key(0), lpips="vgg", num=7)
    samples, mean, fit = found.values()
    assert [len(scored) for scored in found.values()] == [1, 1, 1]
    np.testing.assert_allclose(mean[0]["mse_i"], 0.04, rtol=1e-5)
    np.testing.assert_allclose(mean[0]["psnr_paper"], -10 * np.log10(0.04), rtol=1e-5)
    np.testing.assert_allclose(mean[0]["psnr"], 20.0, rtol=1e-5)
    np.testing.assert_allclose(fit[0]["mse_i"], 0.01, rtol=1e-5)
    expected = metrics.mse_r(grey, private, tiny_model, tiny_variables)
    np.testing.assert_allclose(mean[0]["mse_r"], expected, rtol=1e-5)
    # The mean over the same seven samples, one by one.
    key = jax.random.fold_in(jax.random.key(0), 0)
    images = tiny_prior.apply(params, tiny_prior.sample_latent(key, 7), None)
    each = [4 * np.mean((np.asarray(image) - private) ** 2) for image in images]
    np.testing.assert_allclose(samples[0]["mse_i"], np.mean(each), rtol=1e-5)


# --- runs -------------------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Options for a tiny prior of three classes and three small images; a small model."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    arguments = {"width": 2, "latent_dim": 4, "num_classes": 3}
    prior = dcgan(**arguments)
    card = {"name": "tiny", "kind": "dcgan", "arguments": arguments, "trained_on": [], "data": []}
    checkpoint.save(tmp_path / "prior", prior.init(jax.random.key(0)), card)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "faces.npz", images=images, labels=np.array([2, 1, 0], np.int32))
    monkeypatch.setitem(models.MODELS, "resnet18", models.MODELS["lenet"])
    given = ["--data", str(tmp_path / "faces.npz"), "--prior", str(tmp_path / "prior")]
    return [*given, "--num-controls", "8", "--ceiling-steps", "2"]


@pytest.fixture
def pretended(monkeypatch):
    """Cells' results at once, without a search; the calls are remembered."""
    calls = []

    def find(work, cells):
        given = work.inputs
        calls.extend((work, cell) for cell in cells)
        found = []
        for cell in cells:
            rows, images = [], given.images[list(cell.images)]
            for i, image in zip(cell.images, images, strict=True):
                controls = Controls({}, image, image * 0.9, image * 0.8, 1)
                write_controls(work.folder / f"controls/{i}.npz", controls, image)
                about = {"axes": cell.axes, "seed": cell.seed, "controls": f"controls/{i}.npz"}
                label = {"label_inferred": int(given.labels[i]), "lpips_backbone": given.lpips}
                rows.append(
                    row(14.0 + cell.seed, given.names[i], defense=cell.defense.name) | about | label
                )
            found.append((rows, images))
        return found

    monkeypatch.setattr(cell_runs._Work, "find", find)
    return calls


@pytest.mark.parametrize(("name", "half"), EVERY)
def test_every_experiment_and_half(name, half, inputs, pretended, tmp_path, monkeypatch):
    landscapes = []
    monkeypatch.setattr(landscape, "run", lambda *args: landscapes.append(args) or 0)
    out = tmp_path / "out"
    command = ["reproduce", name, "--half", half, *inputs, "--out", str(out)]
    command += ["--fidelity", "code", "--lpips", "alex"]
    experiment = paper.EXPERIMENTS[name](half=half, fidelity="code")
    num = min(experiment.images["quick"], 2)
    if num < experiment.images["quick"]:
        command += ["--images", str(num)]
    assert run(command) == 0
    if name == "figure9":
        ((options, argv),) = landscapes
        assert argv == command
        assert (options.setup.data, options.setup.prior) == (inputs[1], inputs[3])
        assert (options.lpips, options.out) == ("alex", out)
        assert options.search == experiment.searches()["GGL"]
        assert options.search.labels == "smallest"
        return
    runs = experiment.runs(range(experiment.seeds["quick"]))
    asked = [(cell.search, cell.seed, cell.defense.name) for _, cell in pretended]
    wanted = [(one.search, one.seed, d) for one in runs for d in one.defenses for _ in range(num)]
    assert asked == wanted
    assert len({cell.id for _, cell in pretended}) == len(pretended)
    text = (out / "table.md").read_text()
    assert f"# {experiment.title} ({paper.HALVES[half]} half, scale quick, fidelity code)" in text
    for one in runs:
        for defense in one.defenses:
            assert f"| {defense} | {one.name} |" in text
    # Every published value but LPIPS, which is AlexNet's here.
    for numbers in experiment.published().values():
        for metric, value in numbers.items():
            if metric in METRICS.values() and value:
                assert (f"({value.replace('±', ' ± ')})" in text) == (metric != "lpips"), value
    for control in ("random sample", "the prior's mean image", "the prior's ceiling"):
        assert f"| *control* | *{control}" in text
    assert Image.open(out / "figure.png").width > 200


def shorten(monkeypatch, *names, defenses=("none",)):
    """Only these searches, of two steps, under these defenses."""
    runs = paper.Experiment.runs

    def short(self, seeds=(0,)):
        return [
            one._replace(
                search=dataclasses.replace(one.search, steps=2, pool=0, restarts=1),
                defenses=defenses,
            )
            for one in runs(self, seeds)
            if one.name in names
        ]

    monkeypatch.setattr(paper.Experiment, "runs", short)


def test_reproduce_end_to_end(inputs, tmp_path, capsys, monkeypatch):
    shorten(monkeypatch, "Adam", "CMA-ES")
    out = tmp_path / "out"
    command = ["reproduce", "table2", *inputs, "--seeds", "2", "--out", str(out)]
    assert run(command) == 0
    text = (out / "table.md").read_text()
    assert "| none | Adam |" in text
    assert "(13.6965 ± 0.2593)" in text
    before = (out / "results.jsonl").read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    assert [one["optimizer"] for one in rows] == ["adam", "adam", "cma_es", "cma_es"]
    assert [one["seed"] for one in rows] == [0, 1, 0, 1]
    psnrs = [one["psnr_paper"] for one in rows[:2]]
    shown = f"{np.mean(psnrs):.2f} ± {np.std(psnrs, ddof=1):.2f} (13.6965 ± 0.2593)"
    assert shown in text
    # Again: nothing is repeated; other options are refused.
    assert run(command) == 0
    assert (out / "results.jsonl").read_text() == before
    capsys.readouterr()
    assert run([*command, "--seed", "1"]) == 2
    told = capsys.readouterr().err
    assert "seed: 0 -> 1" in told
    assert "--extend" in told
    # Fewer seeds, in the same folder: nothing is repeated, and only what was asked for is shown.
    assert run([*command, "--seeds", "1", "--extend"]) == 0
    after = (out / "results.jsonl").read_text()
    assert sorted(after.splitlines()) == sorted(before.splitlines())
    assert f"| {psnrs[0]:.2f} (13.6965 ± 0.2593)" in (out / "table.md").read_text()


def test_imagenet_half_end_to_end(inputs, tmp_path, monkeypatch):
    shorten(monkeypatch, "IG", defenses=("clip:4,layerwise=False",))
    out = tmp_path / "out"
    command = ["reproduce", "table3", "--half", "imagenet", *inputs, "--images", "1"]
    assert run([*command, "--fidelity", "code", "--out", str(out)]) == 0
    text = (out / "table.md").read_text()
    assert "(0.1432)" in text
    (found,) = (json.loads(line) for line in (out / "results.jsonl").open())
    assert (found["defense"], found["attack"]) == ("clip:4,layerwise=False", "ig")
    assert found["label_inferred"] == found["label_true"] == 2


def test_unusable_commands_say_so_in_one_line(inputs, tmp_path, capsys):
    def refused(*command):
        assert run(["reproduce", *command, "--out", str(tmp_path / "new")]) == 2
        message = capsys.readouterr().err
        assert not (tmp_path / "new").exists()
        return " ".join(message.split())

    assert "table1 needs --data" in refused("table1")
    assert "the ImageNet half needs --prior" in refused("figure5", "--data", inputs[1])
    assert "did you mean 'table3'?" in refused("tabel3", *inputs)
    assert "images: got 0" in refused("table1", *inputs, "--images", "0")
    assert "seeds: got 0" in refused("table2", *inputs, "--seeds", "0")
    assert "but" in refused("table1", *inputs, "--images", "4")
    assert "one image" in refused("figure9", *inputs, "--images", "2")
    assert "dry_run" in refused("figure9", *inputs, "--dry-run")
    # the others need labels
    assert "no labels" in refused("figure6", "--data", "embedded:nonfaces")


def test_figure8_runs_on_images_without_labels(pretended, tmp_path, monkeypatch):
    from ggl_jax.audit import data

    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(models.MODELS, "resnet18", models.MODELS["lenet"])
    command = ["reproduce", "figure8", "--half", "celeba", "--out", str(tmp_path / "out")]
    assert run(command) == 0
    expected = data.load("embedded:nonfaces", image_size=32, indices="0:2").images
    given = pretended[0][0].inputs
    np.testing.assert_array_equal(given.images, expected)
    np.testing.assert_array_equal(given.labels, [0, 0])
    assert {cell.defense.name for _, cell in pretended} == {"soteria:0.8"}


#: The command line with two steps of few candidates, since BigGAN and 224x224 are slow on a CPU.
SCRIPT = """
import dataclasses, sys
from ggl_jax.audit import paper
from ggl_jax.cli import run
runs = paper.Experiment.runs
def short(self, seeds=(0,)):
    few = {"steps": 2, "pool": 0, "restarts": 1}
    return [one._replace(search=dataclasses.replace(one.search, **few), defenses=("clip:4",))
            for one in runs(self, seeds) if one.name in ("GGL", "IG")]
paper.Experiment.runs = short
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the development data are not here")
def test_imagenet_half_on_photographs(tmp_path):
    # the published layout at 256x256, of a sixteenth of its width, with random weights
    config = dataclasses.replace(BIGGAN_DEEP[256], channel_width=8)
    arguments = {"config": dataclasses.asdict(config), "image_size": 224}
    card = {"name": "random-biggan", "kind": "biggan_deep", "arguments": arguments}
    params = biggan_deep(**arguments).init(jax.random.key(0))
    checkpoint.save(tmp_path / "prior", params, {**card, "trained_on": [], "data": []})
    command = ["reproduce", "table3", "--half", "imagenet", "--images", "1"]
    command += ["--data", str(SHARED / "data/imagenet_ccby"), "--prior", str(tmp_path / "prior")]
    command += ["--num-controls", "4", "--ceiling-steps", "2", "--out", str(tmp_path / "out")]
    # the tests' own flags would make XLA's programs slow
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *command], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out/table.md").read_text()
    assert "(6.5163)" in text
    assert "(8.4386)" in text
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").open()]
    assert {one["axes"]["search"] for one in rows} == {"IG", "GGL"}
    for found in rows:
        assert found["label_inferred"] == found["label_true"] > 100
