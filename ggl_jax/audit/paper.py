"""The paper's tables and figures, in its own numbering, each as one frozen dataclass.

An experiment is a list of :class:`Run`: searches on the same images under the same defenses. Its
docstring states what the paper claims and what it costs; its published numbers stand beside ours in
the table. All of them count images in [-1, 1] with peak 1, so PSNR is 6.02 dB below the usual one
and MSE four times as large. (``scale="paper"`` is another matter: the searches' lengths.)

A new experiment is a subclass of :class:`Experiment` and its name beside :data:`EXPERIMENTS`.
"""

import dataclasses
import functools
import inspect
import itertools
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ggl_jax import files
from ggl_jax.adversary.attacks import search_of
from ggl_jax.audit import metrics, tables
from ggl_jax.audit.controls import read_controls
from ggl_jax.audit.folder import Records
from ggl_jax.audit.judge import jsonable
from ggl_jax.audit.tables import Column
from ggl_jax.client.defenses import in_code
from ggl_jax.priors.decoding import decode_each
from ggl_jax.spec import Search, replace
from ggl_jax.types import Public

#: The paper's data sets.
HALVES = {"celeba": "CelebA", "imagenet": "ImageNet"}
#: The paper's columns: name in the results, heading, our decimals.
COLUMNS = (
    ("mse_i", "MSE-I", 4),
    ("psnr_paper", "PSNR", 2),
    ("lpips", "LPIPS", 4),
    ("mse_r", "MSE-R", 4),
)
DEFENSES = ("noise:0.1", "clip:4", "sparsify:0.9", "soteria:0.8")
#: A defense's specification in each fidelity, and the names of table 1's penalties.
FORMS: dict[str, Callable[[str], str]] = {"paper": str, "code": in_code}
PENALTIES = {"paper": ("kld", "norm"), "code": ("kld_mean", "norm_score")}
#: Updates of CMA-ES in 1,000 evaluations, by populations of 50 or 18.
THOUSAND = {"paper": 20, "code": 56}
#: What stands behind a ±.
INTERVAL = "half of the 95 % interval over images"
IMAGES_STD = "standard deviation over images"
SEEDS_STD = "standard deviation over seeds of single runs"


class Run(NamedTuple):
    """One audit of an experiment.

    Attributes:
        name: of the search, its row in the table.
        search: how the adversary searches.
        defenses: the client's, each on all images.
        seed: of everything random: the model's weights, the noise and the search.
    """

    name: str
    search: Search
    defenses: tuple[str, ...]
    seed: int


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What all experiments share.

    Attributes:
        scale: "quick" (shorter searches, for CPUs) or "paper" (the published lengths).
        half: the paper's data set: "celeba" (32x32) or "imagenet" (224x224).
        fidelity: "paper", or "code" for the published code where the two differ: the preset of
            that name, its penalties, and defenses in its forms (one global norm for clipping).
        title: heads the table.
        default_half: the half that runs where none is named.
        data: private images of that half, where the command names none; None where it must.
        label: class of images without labels; None where they need labels.
        images: how many images at each scale, where the command does not say.
        seeds: how many seeds, likewise.
        spread: what stands behind a ±.
        kinds: the client's defenses, as in the paper's text.
        table: the paper's numbers, the experiment's name in ``published.csv``; "" for none.
    """

    scale: str = "quick"
    half: str = "celeba"
    fidelity: str = "paper"

    title: ClassVar[str]
    default_half: ClassVar[str] = "celeba"
    data: ClassVar[Mapping[str, str]] = {}
    label: ClassVar[int | None] = None
    images: ClassVar[Mapping[str, int]] = {"quick": 4, "paper": 4}
    seeds: ClassVar[Mapping[str, int]] = {"quick": 1, "paper": 1}
    spread: ClassVar[str] = INTERVAL
    kinds: ClassVar[tuple[str, ...]] = ("none",)
    table: ClassVar[str] = ""

    @property
    def defenses(self) -> tuple[str, ...]:
        """The client's defenses, in this fidelity's forms."""
        return tuple(FORMS[self.fidelity](kind) for kind in self.kinds)

    def searches(self) -> dict[str, Search]:
        """The searches by their name in the table: GGL, where a subclass names no others."""
        return {"GGL": self.ggl()}

    def runs(self, seeds: Sequence[int] = (0,)) -> list[Run]:
        """The experiment's audits, search by search."""
        return [
            Run(name, search, self.defenses, seed)
            for name, search in self.searches().items()
            for seed in seeds
        ]

    def published(self) -> dict[tuple[str, str], dict[str, str]]:
        """The paper's values by attack and defense, then column, as printed there."""
        form = FORMS[self.fidelity]
        return {
            (row["attack"], form(row["defense"])): row
            for row in files.read_csv(Path(__file__).parent / "published.csv")
            if (row["experiment"], row["half"]) == (self.table, self.half)
        }

    @property
    def quick(self) -> bool:
        """Whether searches are shorter than published."""
        return self.scale == "quick"

    def search(self, attack: str, optimizer: str | None = None, **options: Any) -> Search:
        """An attack as published, in this experiment's fidelity, but for the options."""
        return search_of(self.fidelity, attack, optimizer, **options)

    def optimizers(self, restarts: int = 1) -> dict[str, Search]:
        """GGL by the paper's three optimisers, each in its published form for this half.

        The forms are the published code's, as the paper gives only the numbers of updates: Adam
        starts at N(0, I) (with signs and a rate in steps at 32x32, with a ramp at 224x224); CMA-ES
        has 50 samples an update (in effect populations of 18, the code's fidelity), and at 224x224
        latents bounded by tanh and no regulariser.
        """
        large = self.half == "imagenet"
        few: dict[str, Any] = {"steps": THOUSAND[self.fidelity]} if self.quick else {}
        bounded: dict[str, Any] = (
            {"start": "uniform", "bound": "tanh", "regularizer": "none"} if large else {}
        )
        adam = "adam:schedule=ramp,signed=False" if large else "adam"
        length = 300 if self.quick else 2500
        return {
            "Adam": self.search("ggl", adam, start="prior", steps=length, restarts=restarts),
            "BO": self.search("ggl", "turbo", restarts=restarts),
            "CMA-ES": self.search("ggl", "cma_es", restarts=restarts, **few, **bounded),
        }

    def ggl(self) -> Search:
        """GGL: CMA-ES, the best of four trials by loss; at quick scale by Adam from a pool."""
        if not self.quick:
            return self.optimizers(restarts=4)["CMA-ES"]
        adam = "adam:schedule=ramp,signed=False"
        return self.search("ggl", adam, pool=200, restarts=4, steps=60)

    def baselines(self) -> dict[str, Search]:
        """The paper's attacks on pixels; at quick scale of some 300 evaluations, in one trial."""
        # GI's group term needs two restarts. L-BFGS counts evaluations, up to 20 an iteration.
        quick = {"dlg": (420, 1), "idlg": (420, 1), "ig": (300, 1), "gi": (150, 2)}

        def search(attack: str) -> Search:
            if self.quick:
                steps, restarts = quick[attack]
                return self.search(attack, steps=steps, restarts=restarts)
            # at 32x32 the attack's own
            length: dict[str, Any] = {"steps": 24000} if self.half == "imagenet" else {}
            return self.search(attack, **length)

        return {name: search(name.lower()) for name in ("DLG", "iDLG", "IG", "GI")}


class Table1(Experiment):
    """Which loss: distances D1 (squared l2), D2 (cosine) and regularisers R1 (KLD), R2 (norm).

    Claim: of the four, D1 with R1 has the best numbers.

    Command: ``ggl-jax reproduce table1 --data celeba32_private.npz``

    Cost: quick, 4 images and loss functions, 300 steps of Adam each; paper, ten images and 2,500.

    The weights of R1 are the published code's (0.1 beside D1, 1e-4 beside D2). Those of R2 are
    ours, in the same proportion: neither the paper nor the code gives any.
    """

    title = "Table 1: loss functions, no defense"
    images: ClassVar = {"quick": 4, "paper": 10}
    spread = IMAGES_STD
    table = "table1"

    def searches(self):
        adam = self.optimizers()["Adam"]
        distances = {"D1": "squared_l2", "D2": "cosine"}
        kld, norm = PENALTIES[self.fidelity]
        penalties = {
            "D1 + R1": f"{kld}:0.1",
            "D2 + R1": f"{kld}:1e-4",
            "D1 + R2": f"{norm}:1e-4",
            "D2 + R2": f"{norm}:1e-7",
        }
        return {
            name: replace(adam, distance=distances[name[:2]], regularizer=penalty)
            for name, penalty in penalties.items()
        }


class Table2(Experiment):
    """Which optimiser, without a defense: mean and deviation over seeds of single runs.

    Claim: on CelebA Adam is a little better than the gradient-free searches; on ImageNet it fails.

    Command: ``ggl-jax reproduce table2 --data celeba32_private.npz``

    Cost: quick, one image and 3 seeds: 300 steps of Adam, 1,000 evaluations of BO (TuRBO) and of
    CMA-ES; paper, 2,500 steps, 1,000 evaluations and 800 updates of 50.

    A seed changes the model's weights, too, as in the published code.
    """

    title = "Table 2: optimisers, no defense"
    images: ClassVar = {"quick": 1, "paper": 1}
    seeds: ClassVar = {"quick": 3, "paper": 5}
    spread = SEEDS_STD
    table = "table2"

    def searches(self):
        return self.optimizers()


class Table3(Experiment):
    """GGL beside the baselines under each defense.

    Claim: GGL finds the image under each defense, the baselines do not, but for IG, which clipping
    hardly touches: it changes only a gradient's magnitude. (That holds for one global norm,
    ``--fidelity code``. The paper's section 3.3 clips layer by layer, ``--fidelity paper``.)

    The adaptive rows are ours: the paper's baselines ignore the defense.

    Command: ``ggl-jax reproduce table3 --data celeba32_private.npz``

    Cost: quick, 28 cells an image of some 300 evaluations with derivatives each; paper, the best of
    four trials: 800 updates of 50 for GGL, 8,000 steps for IG and GI, 300 iterations of L-BFGS for
    DLG and iDLG (24,000 and 1,200 at 224x224).
    """

    title = "Table 3: attacks under defenses"
    kinds = DEFENSES
    table = "table3"

    def searches(self):
        baselines = self.baselines()
        adaptive = {
            f"{name}, adaptive (ours)": replace(baselines[name], adaptive=True)
            for name in ("IG", "GI")
        }
        return {**baselines, "GGL": self.ggl(), **adaptive}


class Figure3(Table2):
    """The pictures behind Table 2: reconstructions by the three optimisers, from several seeds.

    Claim: as Table 2.

    Command: ``ggl-jax reproduce figure3 --data celeba32_private.npz``

    Cost: as Table 2.
    """

    title = "Figure 3: reconstructions by optimiser and seed, no defense"


class Figure4(Table3):
    """The pictures behind Table 3, (a) CelebA and (b) ImageNet.

    Claim: as Table 3.

    Command: ``ggl-jax reproduce figure4 --data celeba32_private.npz``

    Cost: as Table 3.
    """

    title = "Figure 4: reconstructions under defenses"


class Figure5(Experiment):
    """More ImageNet samples of GGL under Soteria.

    Command: ``ggl-jax reproduce figure5 --data tfds:imagenet2012:validation --prior biggan224``

    Cost: one search of Table 3's GGL for each image.
    """

    title = "Figure 5: more samples of GGL under Soteria"
    default_half = "imagenet"
    images: ClassVar = {"quick": 8, "paper": 8}
    kinds = ("soteria:0.8",)


class Figure6(Experiment):
    """Defenses combined: noise, clipping, and both.

    Claim: the combination comes out lowest. (The PSNR under the paper's pictures are not in its
    text, so none stand beside ours.)

    Command: ``ggl-jax reproduce figure6 --data celeba32_private.npz``

    Cost: three searches of Table 3's GGL for each image.
    """

    title = "Figure 6: GGL under combined defenses"
    kinds = ("noise:0.1", "clip:4", "clip:4+noise:0.1")


class Figure7(Experiment):
    """Soteria's pruning rate, from 0 to 80 %, against five attacks.

    Claim: a rate of 10 % already breaks the baselines, while GGL recovers the person's profile at
    any rate. Without defense DLG reaches 15.3 dB on this ResNet-18 (21.4 on the usual scale): its
    failures come from the defenses, not from ReLU.

    Command: ``ggl-jax reproduce figure7 --data celeba32_private.npz``

    Cost: 25 searches of Table 3 for each image.
    """

    title = "Figure 7: Soteria's pruning rate"
    images: ClassVar = {"quick": 1, "paper": 1}
    kinds = ("soteria:0", "soteria:0.1", "soteria:0.2", "soteria:0.4", "soteria:0.8")
    table = "figure7"

    def searches(self):
        return {**self.baselines(), "GGL": self.ggl()}


class Figure8(Experiment):
    """Two photographs outside the generator's distribution, under Soteria.

    At 32x32 they are grey pieces of background without faces, which ship with scikit-image. Images
    without labels count as class 0.

    Command: ``ggl-jax reproduce figure8 --half celeba``, or ``--data FOLDER --prior biggan224``

    Cost: one search of Table 3's GGL for each image.
    """

    title = "Figure 8: images outside the generator's distribution, under Soteria"
    default_half = "imagenet"
    data: ClassVar = {"celeba": "embedded:nonfaces"}
    label = 0
    images: ClassVar = {"quick": 2, "paper": 2}
    kinds = ("soteria:0.8",)


class Figure9(Experiment):
    """Matching loss and LPIPS on a plane of latents around GGL's result.

    Claim: the matching loss has several local minima and is not quite in line with LPIPS.

    Command: ``ggl-jax reproduce figure9 --data tfds:imagenet2012:validation --prior biggan224``,
    which runs ``ggl-jax landscape`` with this search

    Cost: one search of Table 3's GGL, and 441 evaluations without derivatives.
    """

    title = "Figure 9: the landscape around GGL's result"
    default_half = "imagenet"
    images: ClassVar = {"quick": 1, "paper": 1}


_KINDS = (Table1, Table2, Table3, Figure3, Figure4, Figure5, Figure6, Figure7, Figure8, Figure9)
EXPERIMENTS: dict[str, type[Experiment]] = {kind.__name__.lower(): kind for kind in _KINDS}


def control_scores(
    records: Records, public: Public, key: jax.Array, *, lpips: str, num: int = 64
) -> dict[str, list[dict[str, float]]]:
    """What could be had without an update, by the paper's metrics: controls, then images, as rows.

    Args:
        records: of the experiment; of each image, the controls that its first row names.
        public: the federated model, its variables, and the generator.
        key: typed key of the random samples.
        lpips: backbone.
        num: random samples of the prior, of the inferred label, that are averaged, at least 1.
    """
    prior, perceptual = public.prior, metrics.perceptual(lpips, public.prior.image_shape).distance
    found: dict[str, list[dict[str, float]]] = {}

    def score(images, original):
        images = jnp.clip(images, 0.0, 1.0)
        same = jnp.broadcast_to(original, images.shape)
        scores = {
            name: metrics.METRICS[name](images, same, public.model, public.variables)
            for name in ("mse_i", "psnr_paper", "mse_r", "psnr")
        }
        return scores if perceptual is None else scores | {"lpips": perceptual(images, same)}

    for number, path in enumerate(_kept(records).values()):
        known, original = read_controls(path)
        latents = prior.sample_latent(jax.random.fold_in(key, number), num)
        against = functools.partial(score, original=jnp.asarray(original))
        drawn = decode_each(prior, public.prior_params, latents, known.label, against)
        mean, fit = (against(image[None]) for image in (known.mean_image, known.ceiling))
        kinds = {
            "random sample of the prior": drawn,
            "the prior's mean image, the best blind guess in MSE": [mean],
            "the prior's ceiling": [fit],
        }
        for kind, scored in kinds.items():
            means = jax.tree.map(lambda *each: float(np.concatenate(each).mean()), *scored)
            found.setdefault(kind, []).append(means)
    return found


def _cell(values: Sequence[float | None], decimals: int, spread: str) -> str:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "–"
    mean = f"{statistics.fmean(known):.{decimals}f}"
    if len(known) == 1 or not spread:
        return mean
    if spread == INTERVAL:
        low, high = metrics.confidence_interval(known)
        return f"{mean} ± {(high - low) / 2:.{decimals}f}"
    return f"{mean} ± {statistics.stdev(known):.{decimals}f}"


def markdown(
    experiment: Experiment,
    results: Sequence[Mapping[str, Any]],
    controls: Mapping[str, Sequence[Mapping[str, float]]],
    *,
    num_images: int,
    lpips: str,
    command: str,
    where: str,
) -> str:
    """The table: ours beside the paper's, in its metrics and on its scale.

    Args:
        experiment: one of :data:`EXPERIMENTS`.
        results: rows of the runs' cells, on whose axis "search" their names are; seeds in order.
        controls: from :func:`control_scores`.
        num_images: how many images were asked for; rows of fewer say so.
        lpips: backbone of our LPIPS. The paper's values are VGG's and stand beside that alone.
        command: shown below.
        where: date and hardware, shown below.
    """
    published, gain = experiment.published(), tables.scores()["gain"].function
    compared = {name for name, _, _ in COLUMNS if name != "lpips" or lpips == "vgg"}
    headings = [
        heading + f" {lpips}" * (name == "lpips") + " (paper)" * (name in compared)
        for name, heading, _ in COLUMNS
    ]
    headings = ["Defense", "Attack", *headings, "usual PSNR", "gain over blind guess"]

    def cells(by_seed, spread, theirs):
        """Ours, and the paper's value in brackets where there is one to compare with."""
        for metric, decimals in (*((m, d) for m, _, d in COLUMNS), ("psnr", 2), ("gain", 2)):
            values = [[row.get(metric) for row in rows] for rows in by_seed]
            if spread == SEEDS_STD:
                values = [[None if None in own else statistics.fmean(own)] for own in values]
            text = _cell([value for own in values for value in own], decimals, spread)
            known = theirs.get(metric) if metric in compared else None
            yield f"{text} ({known.replace('±', ' ± ')})" if known else text

    rows = [{**row, "gain": jsonable(gain(row))} for row in results]
    total = num_images * len({row["seed"] for row in rows})
    groups = tables.grouped(rows, lambda row: (row["defense"], _search(row)))
    lines = []
    names = dict.fromkeys(map(_search, rows))
    for defense, name in itertools.product(experiment.defenses, names):
        if own := groups.get((defense, name)):
            by_seed = tables.grouped(own, lambda row: row["seed"]).values()
            label = name if len(own) == total else f"{name} ({len(own)} of {total})"
            theirs = published.get((name, defense), {})
            lines.append([defense, label, *cells(by_seed, experiment.spread, theirs)])
    spread = "" if experiment.spread == SEEDS_STD else experiment.spread  # controls have no seeds
    for label, scored in controls.items():
        lines.append(["*control*", f"*{label}*", *cells([scored], spread, {})])
    notes = sorted({row.get("lpips_note") or "" for row in rows} - {""})
    words = [
        f"# {experiment.title} ({HALVES[experiment.half]} half, scale {experiment.scale}, "
        f"fidelity {experiment.fidelity})",
        inspect.cleandoc(str(type(experiment).__doc__)),
        f"Mean ± {experiment.spread}, on the paper's scale; the paper's value in brackets, where "
        "it gives one.",
        *(f"LPIPS was not measured: {note}." for note in notes),
    ]
    columns = [Column(h, operator.itemgetter(i), i < 2) for i, h in enumerate(headings)]
    return "\n\n".join([*words, tables.table(columns, lines), f"`{command}`", where]) + "\n"


def _kept(records: Records) -> dict[str, Path]:
    """The controls' file of each image's first row, where it is still there."""
    found: dict[str, Path] = {}
    for row in records.rows:
        found.setdefault(row["image"], records.folder / row["controls"])
    return {image: path for image, path in found.items() if path.exists()}


def _search(row: Mapping[str, Any]) -> str:
    return row["axes"]["search"]


def draw(experiment: Experiment, records: Records, path: Path, *, max_images: int = 8) -> None:
    """Reconstructions: for each image one row a search, which begins with the private image.

    Columns are defenses or, where there are several, seeds. Below each picture stands its PSNR on
    the paper's scale.
    """
    from ggl_jax.audit import figures  # here and not above: it loads matplotlib

    names = dict.fromkeys(map(_search, records.rows))
    seeds = sorted({row["seed"] for row in records.rows})
    columns = [(defense, seed) for defense in experiment.defenses for seed in seeds]
    found = {(row["image"], _search(row), row["defense"], row["seed"]): row for row in records.rows}
    cells = []
    shown = list(_kept(records).items())[:max_images]
    for (original, path_of), name in itertools.product(shown, names):
        _, private = read_controls(path_of)
        cells.append((private, f"{original}\nprivate"))
        for defense, seed in columns:
            row = found.get((original, name, defense, seed))
            image = np.ones_like(private) if row is None else records.image(row)
            psnr = row and row["psnr_paper"]
            column = f"{defense}, seed {seed}" if len(seeds) > 1 else defense
            score = "" if psnr is None else f"{psnr:.2f} dB"
            cells.append((image, f"{name}\n{column}\n{score}"))
    width = 1 + len(columns)
    title = f"{experiment.title} (PSNR on the paper's scale)"
    figure = figures.grid(cells, columns=width, width=1.3 * width, title=title)
    files.write_figure(path, figure, dpi=110)
