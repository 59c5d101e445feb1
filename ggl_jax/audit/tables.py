"""Means, intervals and the verdict over images, by defense and attack: what reports and checks say.

A table here is Markdown; :mod:`ggl_jax.audit.report` puts them together.
"""

import collections
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ggl_jax.audit.metrics import COLUMNS, METRICS, Metric, confidence_interval, described
from ggl_jax.spec import varying
from ggl_jax.types import NONFINITE, STATUS_MESSAGES

#: Long sentences of reports, in which numbers and names are filled in.
WORDS: dict[str, Any] = tomllib.loads((Path(__file__).parent / "words.toml").read_text("utf-8"))

#: A reconstruction counts as leaking beyond the prior when it is nearer to the private image than
#: the stronger blind guess by more than this, dB. Below it the two cannot be told apart by eye.
MARGIN = 1.0

#: Axes that are averaged over or shown in columns of their own.
_OWN = ("defense", "seed", "image", "evaluations")

Row = Mapping[str, Any]
Item = TypeVar("Item")
Key = TypeVar("Key")


class Mean(NamedTuple):
    """A mean over images with its 95 % interval (Student's t); None where there is none.

    Intervals end where the score's own range does.
    """

    mean: float
    low: float | None
    high: float | None

    def end(self, low: bool) -> float:
        """The interval's lower or upper end; the mean, where there is no interval."""
        found = self.low if low else self.high
        return self.mean if found is None else found


class Leakage(NamedTuple):
    """One defense under one attack.

    Attributes:
        defense: its specification.
        variant: the attack's values on the axes that vary, in words.
        rows: its results, one for each image and seed.
        means: by the names in :func:`scores`; those that every row has. Seeds of one image are
            averaged first, so that images are the independent units.
    """

    defense: str
    variant: str
    rows: list[dict[str, Any]]
    means: dict[str, Mean]

    @property
    def images(self) -> list[str]:
        """Names of its images."""
        return list(dict.fromkeys(row["image"] for row in self.rows))

    @property
    def broken(self) -> list[dict[str, Any]]:
        """Results of searches whose loss became NaN or infinite."""
        return [row for row in self.rows if row["status"] == STATUS_MESSAGES[NONFINITE]]

    @property
    def stalled(self) -> list[dict[str, Any]]:
        """Results of searches that stopped making progress."""
        broken = STATUS_MESSAGES[NONFINITE]
        return [row for row in self.rows if not row["ok"] and row["status"] != broken]

    @property
    def leaked(self) -> bool:
        """The verdict: nearer than the blind guess by more than :data:`MARGIN`, and with certainty.

        An exact copy (infinite PSNR, which has no interval) leaked; NaN shows nothing.
        """
        gain = self.means["gain"]
        return gain.mean > MARGIN and gain.end(low=True) > 0

    @property
    def lpips(self) -> str:
        """The network behind LPIPS, "" where results of several are mixed."""
        known = {row.get("lpips_backbone", "") for row in self.rows}
        return known.pop() if len(known) == 1 else ""


# --- scores -------------------------------------------------------------------------------------


def _entry(name: str) -> Callable[[Row], float | None]:
    """A column of the results; an infinite PSNR is null there, since JSON has no infinity."""

    def read(row: Row) -> float | None:
        value = row.get(name)
        if value is None and name.startswith("psnr") and name in row:
            # NaN is null, too, but then the squared error is.
            own = name in ("psnr", "psnr_paper")
            return math.nan if own and row.get("mse", 0.0) is None else math.inf
        return None if value is None else float(value)

    return read


def _control(row: Row) -> float:
    return max(_entry(n)(row) or 0.0 for n in ("psnr_mean_image", "psnr_control_mean"))


def _gain(row: Row) -> float:
    return (_entry("psnr")(row) or 0.0) - _control(row)


def _share(name: str) -> Callable[[Row], float | None]:
    """A share in percent; of a rank, whether it is the first."""

    def read(row: Row) -> float | None:
        value = row.get(name)
        return None if value is None else 100.0 * (value == 1 if "rank" in name else value)

    return read


_READ = {name: (_share if unit == "%" else _entry)(column) for name, column, unit in COLUMNS}
#: Scores besides METRICS, read off a row of the results.
DERIVED: dict[str, Metric] = described({"control": _control, "gain": _gain, **_READ})

#: What was measured and what bounds it.
BOUNDED = {"mse": "bound_mse", "identified_pixels": "bound_identified"}


def scores() -> dict[str, Metric]:
    """Every score by name, its ``function`` reading it off a row; None where it is not measured."""
    measured = {
        name: (metric if isinstance(metric, Metric) else Metric(metric))
        for name, metric in METRICS.items()
    }
    return {
        name: metric._replace(function=_entry(name), heading=metric.heading or name)
        for name, metric in measured.items()
    } | DERIVED


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Items by a key, in their order."""
    found: dict[Key, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def by_image(rows: Iterable[Row], value: Callable[[Row], float]) -> dict[str, float]:
    """Each image's mean over its rows."""
    # sum, not fsum: that refuses infinities of both signs
    return {
        image: sum(map(value, own)) / len(own)
        for image, own in grouped(rows, lambda row: row["image"]).items()
    }


def mean_of(values: Sequence[float], limits: tuple[float, float] = (-math.inf, math.inf)) -> Mean:
    """The mean of independent values, such as those of images; its interval within ``limits``."""
    mean, (low, high) = sum(values) / len(values), confidence_interval(values)
    if math.isnan(low):
        return Mean(mean, None, None)
    return Mean(mean, max(low, limits[0]), min(high, limits[1]))


def passed(group: Leakage, name: str) -> bool:
    """Whether a mean of :data:`BOUNDED` lies beyond its bound, with its interval where it has one.

    Then the bound's assumptions do not hold of these images, or the audit has a bug.
    """
    if BOUNDED[name] not in group.means or name not in group.means:
        return False
    bound, lower = group.means[BOUNDED[name]].mean, scores()[name].nearer == "lower"
    end = group.means[name].end(low=not lower)
    return end < bound if lower else end > bound


def variant_names(rows: Sequence[Row]) -> list[str]:
    """Names of the axes, besides defense, image and seed, on which the rows differ."""
    return [name for name in varying(map(_axes, rows)) if name not in _OWN]


def _axes(row: Row) -> Row:
    return row.get("axes") or {"attack": row["attack"], "optimizer": row["optimizer"]}


def variant_of(row: Row, names: Sequence[str]) -> str:
    """A row's attack in words."""
    if not names:
        return row["attack"] if "won" in row else f"{row['attack']} by {row['optimizer']}"
    plain = ("attack", "optimizer")
    return ", ".join(
        str(_axes(row).get(name, "-")) if name in plain else f"{name} {_axes(row).get(name, '-')}"
        for name in names
    )


def by_attack(
    rows: Sequence[dict[str, Any]], names: Sequence[str]
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows by their defense, and their attack in words."""
    return grouped(rows, lambda row: (row["defense"], variant_of(row, names)))


def leakage(rows: Sequence[dict[str, Any]]) -> list[Leakage]:
    """One :class:`Leakage` for each defense and attack, in the order of the rows."""
    return [_leakage(*which, own) for which, own in by_attack(rows, variant_names(rows)).items()]


def _leakage(defense: str, variant: str, rows: list[dict[str, Any]]) -> Leakage:
    means = {
        name: mean_of(list(by_image(rows, score.function).values()), score.limits)
        for name, score in scores().items()
        if all(score.function(row) is not None for row in rows)
    }
    return Leakage(defense, variant, rows, means)


def strongest(groups: Sequence[Leakage]) -> list[Leakage]:
    """For each defense, the attack of the highest mean PSNR: the one an adversary would choose."""
    best: dict[str, Leakage] = {}
    for group in groups:
        known = best.get(group.defense)
        if known is None or not group.means["psnr"].mean <= known.means["psnr"].mean:
            best[group.defense] = group
    return list(best.values())


def by_fit(rows: Sequence[dict[str, Any]]) -> list[Leakage]:
    """For each defense, of each image and seed the result of lowest mismatch: no truth chooses.

    Where a row has none (:func:`ggl_jax.adversary.reconstruct.mismatch`), :func:`strongest`.
    """
    groups = leakage(rows)
    several = len({group.variant for group in groups}) > 1
    if not several or any("mismatch" not in row for row in rows):
        return strongest(groups)

    def misfit(row: Row) -> float:
        return math.inf if row["mismatch"] is None else row["mismatch"]

    names = variant_names(rows)
    searches = grouped(rows, lambda row: (row["defense"], row["image"], row["seed"]))
    best = [min(own, key=misfit) for own in searches.values()]
    return [
        _leakage(defense, _tally(variant_of(row, names) for row in part), part)
        for defense, part in grouped(best, lambda row: row["defense"]).items()
    ]


def _tally(names: Iterable[str]) -> str:
    """Names by how often they are there: ``"map (3 of 4), ggl (1 of 4)"``."""
    number = collections.Counter(names)
    return ", ".join(f"{name} ({n} of {number.total()})" for name, n in number.most_common())


def won(groups: Sequence[Leakage]) -> list[str]:
    """A sentence on which attacks' results attack strongest kept; none where it did not run."""
    told = [
        f"{spoken(group.defense)}: {names}"
        for group in groups
        if (names := _tally(row["won"] for row in group.rows if "won" in row))
    ]
    return [f"Kept by attack strongest, as nearest to the update: {'; '.join(told)}."] * bool(told)


def family_of(defense: str) -> tuple[str, float | None]:
    """A defense's kind and its first parameter: ``"clip:4+noise:0.1"`` -> ("clip+noise:0.1", 4.0).

    Only the first stage's first value is taken out, so that the defenses of one family differ in
    it alone. None where it is not a number.
    """
    found = re.match(r"([a-z_]+):([0-9.eE+-]+?)(?=$|,|\+(?![0-9]))", defense)
    if found is None:
        return defense, None
    try:
        value = float(found.group(2))
    except ValueError:
        return defense, None
    return found.group(1) + defense[found.end() :], value


def parameters(rows: Sequence[Row]) -> list[tuple[str, str, float, float, float]]:
    """Defense, parameter, its mean true value, its mean estimate, largest relative error."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        for name, true in row["defense_true"].items():
            estimated = row["defense_estimated"].get(name)
            if true is not None and estimated is not None:
                found.setdefault((row["defense"], name), []).append((true, estimated))
    table = []
    for (defense, name), pairs in found.items():
        true, estimated = (np.asarray(values) for values in zip(*pairs, strict=True))
        error = np.abs(estimated - true) / np.maximum(np.abs(true), 1e-30)
        table.append((defense, name, true.mean(), estimated.mean(), float(error.max())))
    return table


# --- words --------------------------------------------------------------------------------------


def escape(text: object) -> str:
    """Text of a user as Markdown that shows it as it is, on one line."""
    line = " ".join(str(text).split())
    return re.sub(r"[\\`*\[\]<>|&~]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)


def counted(number: int, noun: str) -> str:
    """E.g. ``"1 image"``, ``"1,000 images"``, ``"2 searches"``."""
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def spoken(defense: str) -> str:
    """A defense's name in a sentence: "leaked under none" would say the opposite."""
    return "no defense" if defense == "none" else defense


def number_text(value: float | None, form: str = ".1f", sign: bool = False) -> str:
    """E.g. ``"+1.5"``; "–" for none and NaN, "exact" for the PSNR of identical images."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "exact"
    return f"{value:{'+' if sign else ''}{form}}"


def mean_text(mean: Mean, form: str = ".1f", sign: bool = False) -> str:
    """E.g. ``"14.0 [12.1, 15.9]"``, with a no-break space inside the interval."""
    text = number_text(mean.mean, form, sign)
    if mean.low is None or mean.high is None:
        return text
    low, high = (number_text(end, form, sign) for end in (mean.low, mean.high))
    return f"{text} [{low},\N{NO-BREAK SPACE}{high}]"


def score_text(group: Leakage, name: str, interval: bool = True) -> str:
    """A score of :func:`scores` as a table shows it."""
    mean = group.means.get(name)
    if mean is None:
        return "–"
    if name == "gain" and math.isfinite(mean.mean):
        # The difference of PSNR and guess as they are printed.
        psnr, guess = (round(group.means[other].mean, 1) for other in ("psnr", "control"))
        mean = mean._replace(mean=psnr - guess + 0.0)
    if not interval:
        mean = Mean(mean.mean, None, None)
    unit = " %" if scores()[name].unit == "%" else ""
    return mean_text(mean, scores()[name].form, sign=name == "gain") + unit


class Column(NamedTuple):
    """A table's column: its heading, an item's text (Markdown), whether that is words."""

    heading: str
    text: Callable[[Any], str]
    words: bool = False


def table(columns: Sequence[Column], items: Iterable[Any]) -> str:
    """A Markdown table, numbers to the right."""

    def line(cells):
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join(":---" if column.words else "---:" for column in columns) + "|"
    rows = [line([column.text(item) for column in columns]) for item in items]
    return "\n".join([line([column.heading for column in columns]), rule, *rows])


def score_table(groups: Sequence[Leakage], shown: Mapping[str, bool], *more: Column) -> str:
    """A table of scores by defense and attack, and what its columns mean.

    Args:
        groups: its rows.
        shown: names of :func:`scores`, those that were measured; whether with an interval.
        *more: columns at the end.
    """
    known = scores()
    names = [name for name in shown if any(name in group.means for group in groups)]
    networks = ", ".join(dict.fromkeys(group.lpips for group in groups if group.lpips))
    heading = {name: known[name].heading for name in names}
    if "lpips" in heading and networks:
        heading["lpips"] = f"LPIPS ({networks})"
    columns = [Column("Defense", lambda g: escape(g.defense), True)]
    if len({group.variant for group in groups}) > 1:
        columns.append(Column("Attack", lambda g: escape(g.variant), True))

    def column(name: str) -> Column:
        return Column(escape(heading[name]), lambda g: score_text(g, name, shown[name]))

    columns += map(column, names)
    told = [_legend(known[name], heading[name]) for name in names]
    text = table([*columns, *more], groups)
    return f"{text}\n\n{' '.join(told)}" if told else text


def _legend(score: Metric, heading: str) -> str:
    unit = f" ({score.unit})" if score.unit else ""
    lower = ", lower is nearer" if score.nearer == "lower" else ""
    return f"**{escape(heading)}**{unit}: {score.legend or 'no description'}{lower}."


def sentences(groups: Sequence[Leakage]) -> list[str]:
    """What was found, in words, for readers who never saw the paper; Markdown."""
    rows = [row for group in groups for row in group.rows]
    images = list(dict.fromkeys(row["image"] for row in rows))
    chosen = strongest(groups)
    scope = "this image" if len(images) == 1 else f"these {len(images):,} images"
    guess, ceiling = (number_text(chosen[0].means[name].mean) for name in ("control", "ceiling"))
    text = [
        f"Without any update, the best blind guess is {guess} dB from {scope}; the prior could "
        f"reach {ceiling} dB."
    ]
    by = "" if len(chosen) == len(groups) else "Where most leaked, "

    def listed(some: Sequence[Leakage]) -> str:
        def one(group: Leakage) -> str:
            psnr, gain = (score_text(group, name, False) for name in ("psnr", "gain"))
            return f"{escape(spoken(group.defense))} ({psnr} dB, gain {gain})"

        return "; ".join(map(one, some))

    leaking = [group for group in chosen if group.leaked]
    silent = [group for group in chosen if not group.leaked]
    if leaking:
        who = f"{by}{'t' if by else 'T'}he {'image' if len(images) == 1 else 'images'}"
        text.append(f"**{who} leaked beyond the blind guess** under {listed(leaking)}.")
    if silent:
        text.append(
            f"**{by}{'no' if by else 'No'} leak beyond the blind guess was shown** under "
            f"{listed(silent)}. {WORDS['no_proof']}"
        )
    missed = {group.defense for group in groups if group.means["label"].mean < 100.0}
    told = [group.defense for group in chosen if group.defense not in missed]
    if told:
        which = ", ".join(escape(spoken(defense)) for defense in told)
        every = "every defense" if len(told) == len(chosen) and len(told) > 1 else which
        text.append(f"The class labels were read off the update exactly under {every}.")
    if len(images) == 1:
        text.append("One image gives no interval; audit more.")
    notes = dict.fromkeys(
        f"LPIPS ({row['lpips_backbone']}) was not measured: {row['lpips_note']}."
        for row in rows if row.get("lpips_note")
    )  # fmt: skip
    return text + [escape(line) for line in (*notes, *troubles(groups))]


def troubles(groups: Sequence[Leakage]) -> list[str]:
    """A plain sentence for each defense and attack with searches that broke down or stalled."""
    text = []
    for group in groups:
        for rows, what in (
            (group.broken, "broke down (NaN), which says nothing about the defense"),
            (group.stalled, "stopped making progress, so a longer or other search may find more"),
        ):
            if rows:
                names = list(dict.fromkeys(row["image"] for row in rows))
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                text.append(
                    f"{len(rows)} of {counted(len(group.rows), 'search')} "
                    f"by {group.variant} under {spoken(group.defense)} {what}: "
                    f"{', '.join(names[:5])}{more}."
                )
    return text
