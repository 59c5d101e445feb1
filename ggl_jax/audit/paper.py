"""The paper's experiments at 32x32, each as one frozen dataclass.

An experiment is a set of searches, run on the same images against the same defenses. Its docstring
states what the paper claims, the command, what it costs and which number to expect. Published
numbers and those in the docstrings count images in [-1, 1], so PSNR is 6.02 dB below the usual one
and MSE four times as large. (``--scale paper`` is another matter: the searches' lengths.)
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ggl_jax import files
from ggl_jax.adversary.strategy import AttackSettings
from ggl_jax.audit.metrics import confidence_interval
from ggl_jax.audit.run import AuditResult

SCALES = ("quick", "paper")
#: The paper's columns, and how many decimals it gives.
COLUMNS = (
    ("mse_i", "MSE-I", 4),
    ("psnr_paper", "PSNR", 2),
    ("lpips", "LPIPS", 4),
    ("mse_r", "MSE-R", 4),
)
DEFENSES = ("noise:0.1", "clip:4", "sparsify:0.9", "soteria:0.8")

_NUMBERS = ("mse_i", "psnr_paper", "lpips", "mse_r")


def _published(*values: float | None) -> dict[str, float]:
    return {k: v for k, v in zip(_NUMBERS, values, strict=False) if v is not None}


def _psnr(value: float) -> dict[str, float]:
    return {"psnr_paper": value}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What all experiments share.

    Attributes:
        title: heads the table.
        defenses: columns of the experiment.
        published: the paper's numbers by search and defense.
        data: private images, where the command names none; None where it must.
        label: class of images without labels; None where they need labels.
        images: how many images, where the command does not say.
    """

    title: ClassVar[str]
    data: ClassVar[str | None] = None
    label: ClassVar[int | None] = None
    images: ClassVar[int] = 4
    defenses: tuple[str, ...] = ("none",)
    published: ClassVar[Mapping[tuple[str, str], dict[str, float]]] = {}

    def searches(self, scale: str) -> dict[str, AttackSettings]:
        """The searches by their name in the table."""
        raise NotImplementedError


def _ggl(scale: str, **options) -> AttackSettings:
    """GGL: by CMA-ES as published, or at quick scale by the default search."""
    if scale == "paper":
        settings = {"optimizer": "cma_es", "population": 50, "steps": 800}
    else:
        settings = {
            **{"optimizer": "adam", "signed": False, "schedule": "ramp"},
            **{"pool": 200, "restarts": 4, "steps": 60},
        }
    return AttackSettings(**{**settings, **options})


def _baseline(name: str, scale: str, **options) -> AttackSettings:
    # On pixels, one long trial leaks more than several short ones.
    steps, restarts = {"dlg": (100, 2), "idlg": (100, 2), "ig": (250, 1), "gi": (250, 1)}[name]
    settings: dict[str, Any] = {} if scale == "paper" else {"steps": steps, "restarts": restarts}
    if name == "ig" and scale == "quick":
        # The published schedule cuts the rate at 3/8 of the steps, too early for so few of them.
        settings["schedule"] = "ramp"
    return AttackSettings(**{"attack": name, **settings, **options})


@dataclasses.dataclass(frozen=True)
class Table1(Experiment):
    """Which optimiser, without a defense.

    Claim: on CelebA, Adam does best and CMA-ES better than TuRBO; on ImageNet, Adam fails.
    Command: ``ggl-jax reproduce table1 --data celeba32_private.npz --images 4``
    Cost: quick, about 30 minutes on two CPU cores for 4 images (1,000 evaluations a search);
    paper scale, 2,500 steps of Adam, 1,000 evaluations of TuRBO and 40,000 of CMA-ES an image.
    Expected: the paper has Adam 13.70 dB, TuRBO 10.95 dB, CMA-ES 11.50 dB. This command, at quick
    scale: 11.4, 8.4 and 7.2 dB, with a tenth of Adam's budget and a fortieth of that of CMA-ES.
    """

    title = "Table 1: optimisers, no defense"
    published: ClassVar = {
        ("Adam", "none"): _psnr(13.70),
        ("TuRBO", "none"): _psnr(10.95),
        ("CMA-ES", "none"): _psnr(11.50),
    }

    def searches(self, scale):
        quick = scale == "quick"
        return {
            "Adam": AttackSettings(optimizer="adam", steps=250 if quick else 2500, restarts=4),
            "TuRBO": AttackSettings(optimizer="turbo", steps=100),
            "CMA-ES": _ggl("paper", steps=20 if quick else 800),
            "Adam, pool and restarts": _ggl("quick", restarts=4, steps=200),
        }


@dataclasses.dataclass(frozen=True)
class Table2(Experiment):
    """Which loss: distances D1 and D2 with regularisers R1 and R2, without a defense.

    Claim: squared l2 with the KLD is the best or near it; the choice matters less than the search.
    Command: ``ggl-jax reproduce table2 --data celeba32_private.npz --images 4``
    Cost: quick, about 10 minutes on two CPU cores for 4 images; paper scale, 40,000 evaluations of
    CMA-ES an image and loss.
    Expected: no published numbers are at hand; at --scale paper, "D1, kld" is Table 1's CMA-ES,
    11.50 dB.
    """

    title = "Table 2: distances and regularisers, no defense"

    def searches(self, scale):
        return {
            f"{name}, {regularizer}": _ggl(
                scale, distance=distance, regularizer=f"{regularizer}:{weight}"
            )
            for name, distance, weights in (
                ("D1", "squared_l2", {"kld": "0.1", "norm": "1e-4"}),
                # The cosine distance lies in [0, 2]: the same balance at a hundredth.
                ("D2", "cosine", {"kld": "1e-3", "norm": "1e-6"}),
            )
            for regularizer, weight in weights.items()
        }


@dataclasses.dataclass(frozen=True)
class Table3(Experiment):
    """GGL beside the baselines under each defense (the CelebA half).

    Claim: under every defense GGL leaks far more than attacks on pixels do; only IG under clipping
    is better. The adaptive rows are ours: the paper's baselines ignore the defense.
    Command: ``ggl-jax reproduce table3 --data celeba32_private.npz --images 4``
    Cost: quick, about an hour on two CPU cores for 4 images; paper scale is meant for a GPU (GGL
    40,000 evaluations, IG and GI 4 trials of 8,000 steps).
    Expected: the paper has GGL 11.08, 11.19, 11.15 and 10.14 dB under noise, clipping,
    sparsification and Soteria; IG 12.65 dB under clipping; every other baseline below 7.5 dB. This
    command, at quick scale: GGL 7.0, 10.4, 8.1 and 9.2 dB; IG 8.1 dB under clipping.
    """

    title = "Table 3: attacks under defenses, CelebA"
    defenses: tuple[str, ...] = DEFENSES
    published: ClassVar = {
        ("GGL", "noise:0.1"): _published(0.0780, 11.08, 0.1906, 0.0010),
        ("GGL", "clip:4"): _published(0.0760, 11.19, 0.1670, 0.0015),
        ("GGL", "sparsify:0.9"): _published(0.0768, 11.15, 0.1620, 0.0007),
        ("GGL", "soteria:0.8"): _published(0.0968, 10.14, 0.2561, 0.0007),
        ("IG", "clip:4"): _published(0.0543, 12.65, 0.2998, 0.0003),
    }

    def searches(self, scale):
        return {
            "DLG": _baseline("dlg", scale),
            "iDLG": _baseline("idlg", scale),
            "IG": _baseline("ig", scale),
            "GI": _baseline("gi", scale),
            "GGL": _ggl(scale),
            "IG, adaptive": _baseline("ig", scale, adaptive=True),
            "GI, adaptive": _baseline("gi", scale, adaptive=True),
        }


@dataclasses.dataclass(frozen=True)
class Figure4(Table1):
    """The pictures behind Table 1: what each optimiser finds without a defense.

    Claim: Adam's and CMA-ES's faces resemble the private ones.
    Command: ``ggl-jax reproduce figure4 --data celeba32_private.npz --images 4``
    Cost: as Table 1.
    Expected: as Table 1.
    """

    title = "Figure 4: reconstructions by optimiser, no defense"


@dataclasses.dataclass(frozen=True)
class Figure5(Experiment):
    """Soteria on more samples.

    Claim: Soteria does not keep GGL from finding faces that resemble the private ones, over many
    of them and not only over those of Table 3.
    Command: ``ggl-jax reproduce figure5 --data celeba32_private.npz``
    Cost: quick, about 10 minutes on two CPU cores for 16 images; paper scale, 40,000 evaluations an
    image.
    Expected: Table 3's mean, in the paper 10.14 dB; at quick scale its 9.2 dB.
    """

    title = "Figure 5: more samples under Soteria"
    images: ClassVar = 16
    defenses: tuple[str, ...] = ("soteria:0.8",)
    published: ClassVar = {
        key: numbers for key, numbers in Table3.published.items() if key[1] == "soteria:0.8"
    }

    def searches(self, scale):
        return {"GGL": _ggl(scale)}


@dataclasses.dataclass(frozen=True)
class Figure6(Table3):
    """The pictures behind Table 3's CelebA half.

    Claim: GGL's faces resemble the private ones under each defense, the baselines' are noise.
    Command: ``ggl-jax reproduce figure6 --data celeba32_private.npz --images 4``
    Cost: as Table 3.
    Expected: as Table 3.
    """

    title = "Figure 6: reconstructions under defenses, CelebA"


@dataclasses.dataclass(frozen=True)
class Figure7(Experiment):
    """How leakage falls with a defense's strength.

    Claim: stronger defenses leak less, but a plausible face is found at any strength, so it needs
    its controls beside it.
    Command: ``ggl-jax reproduce figure7 --data celeba32_private.npz --images 4``
    Cost: quick, about 40 minutes on two CPU cores for 4 images; paper scale, 40,000 evaluations an
    image and strength, is meant for a GPU.
    Expected: no published numbers are at hand; the strengths of Table 3 are among these.
    """

    title = "Figure 7: leakage by strength of the defense"
    defenses: tuple[str, ...] = (
        *("noise:0.01", "noise:0.1", "noise:1"),
        *("clip:16", "clip:4", "clip:1"),
        *("sparsify:0.5", "sparsify:0.9", "sparsify:0.99"),
        *("soteria:0.4", "soteria:0.8", "soteria:0.95"),
    )

    def searches(self, scale):
        return {"GGL": _ggl(scale)}


@dataclasses.dataclass(frozen=True)
class Figure8(Experiment):
    """Out-of-distribution images: private images of another kind than the prior's.

    Here they are grey pieces of background without faces, which ship with scikit-image; they have
    no labels, so all count as class 0.
    Claim: GGL finds the nearest that its generator can show, which tells less of such images; an
    attack on pixels (ours beside it) does not depend on the generator.
    Command: ``ggl-jax reproduce figure8 --images 4``, whose default data is embedded:nonfaces
    Cost: quick, about 20 minutes on two CPU cores for 4 images; paper scale is meant for a GPU.
    Expected: no published numbers are at hand; the prior's ceiling, the table's last line, bounds
    GGL.
    """

    title = "Figure 8: out-of-distribution images"
    data: ClassVar = "embedded:nonfaces"
    label: ClassVar = 0
    defenses: tuple[str, ...] = ("none", *DEFENSES)

    def searches(self, scale):
        return {"GGL": _ggl(scale), "IG, adaptive": _baseline("ig", scale, adaptive=True)}


EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    "table1": Table1,
    "table2": Table2,
    "table3": Table3,
    "figure4": Figure4,
    "figure5": Figure5,
    "figure6": Figure6,
    "figure7": Figure7,
    "figure8": Figure8,
}


def _cell(values: Sequence[float | None], decimals: int) -> str:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "–"
    mean = statistics.fmean(known)
    low, high = confidence_interval(known) if len(known) > 1 else (mean, mean)
    if len(known) == 1:
        return f"{mean:.{decimals}f}"
    return f"{mean:.{decimals}f} ± {(high - low) / 2:.{decimals}f}"


def markdown(
    experiment: Experiment, results: Mapping[str, AuditResult], *, command: str, where: str
) -> str:
    """The table in the paper's layout and scale, ours beside the paper's.

    Args:
        experiment: one of :data:`EXPERIMENTS`.
        results: what :func:`ggl_jax.audit` returned for each search.
        command: shown below.
        where: date and hardware, shown below.
    """
    headings = [f"{heading} (paper)" for _, heading, _ in COLUMNS]
    lines = [f"# {experiment.title}", "", str(type(experiment).__doc__).strip(), ""]
    lines += [
        "Mean over images ± half of the 95 % interval, on the paper's scale; the paper's number in "
        "brackets. LPIPS needs weights: `ggl-jax weights lpips-vgg`.",
        "",
        "| Defense | Attack | " + " | ".join(headings) + " | usual PSNR | gain over blind guess |",
        "|" + "---|" * (len(headings) + 4),
    ]
    for defense in experiment.defenses:
        for search, result in results.items():
            rows = [row for row in result.rows if row["defense"] == defense]
            if not rows:
                continue
            paper = experiment.published.get((search, defense), {})
            cells = []
            for name, _, decimals in COLUMNS:
                number = f" ({paper[name]:.{decimals}f})" if name in paper else ""
                cells.append(_cell([row.get(name) for row in rows], decimals) + number)
            cells.append(_cell([row["psnr"] for row in rows], 2))
            gains = [
                None
                if row["psnr"] is None
                else row["psnr"] - max(row["psnr_mean_image"], row["psnr_control_mean"])
                for row in rows
            ]
            cells.append(_cell(gains, 2))
            lines.append(f"| {defense} | {search} | " + " | ".join(cells) + " |")
    controls = next(iter(results.values())).rows
    first = [row for row in controls if row["defense"] == experiment.defenses[0]]
    for name, label in (
        ("psnr_control_mean", "random sample of the prior"),
        ("psnr_mean_image", "the prior's mean image, the best blind guess"),
        ("psnr_ceiling", "the prior's ceiling"),
    ):
        usual = _cell([row[name] for row in first], 2)
        lines.append(
            f"| *control* | *{label}* |" + " |" * len(COLUMNS) + f" {usual} | |",
        )
    return "\n".join([*lines, "", f"`{command}`", "", where, ""])


def draw(
    experiment: Experiment, results: Mapping[str, AuditResult], path: Path, *, max_images: int = 4
) -> None:
    """Reconstructions: a block of rows for each image, one row a search, one column a defense."""
    import numpy as np
    from matplotlib.figure import Figure

    first = next(iter(results.values()))
    names = list(first.originals)[:max_images]
    searches = list(results)
    height = len(names) * len(searches)
    width = 1 + len(experiment.defenses)
    figure = Figure(figsize=(1.35 * width + 1.2, 1.35 * height + 0.5), layout="constrained")
    axes = figure.subplots(height, width, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)

    def show(axis, image, caption=""):
        axis.imshow(np.clip(np.asarray(image), 0, 1).squeeze(), cmap="gray", vmin=0, vmax=1)
        axis.set_xlabel(caption, fontsize=6)

    for i, name in enumerate(names):
        for s, search in enumerate(searches):
            r = i * len(searches) + s
            if s == 0:
                show(axes[r, 0], first.originals[name], name)
            axes[r, 1].set_ylabel(search, fontsize=7)
            pairs: list[tuple[dict[str, Any], Any]] = list(
                zip(results[search].rows, results[search].reconstructions, strict=True)
            )
            for row, image in pairs:
                if row["image"] == name and row["defense"] in experiment.defenses:
                    column = 1 + experiment.defenses.index(row["defense"])
                    psnr = "exact" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
                    show(axes[r, column], image, psnr)
    for column, heading in enumerate(["private image", *experiment.defenses]):
        axes[0, column].set_title(heading, fontsize=8)
    files.write_figure(path, figure, dpi=110)
