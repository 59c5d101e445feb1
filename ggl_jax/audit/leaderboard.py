"""Settings of defenses by what they leak where they leave the model as accurate: one table."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ggl_jax.audit import tables, utility
from ggl_jax.audit.folder import Records
from ggl_jax.audit.tables import WORDS, Column, Leakage, escape, score_text

#: Accuracies that differ by no more than this share count as equal: two points, about two standard
#: errors of one of 90 % on 1,000 test images.
EQUAL_UTILITY = 0.02


class Point(NamedTuple):
    """A defense's place between leakage and utility.

    Attributes:
        label: its specification.
        row: of :func:`ggl_jax.audit.utility.measure`; None where it was not trained under.
        leakage: None where it was not audited.
        kept: whether its accuracy is the undefended model's, but for :data:`EQUAL_UTILITY`; None
            where one of the two is not known.
    """

    label: str
    row: dict[str, Any] | None
    leakage: Leakage | None
    kept: bool | None = None


def points(found: utility.Utility | None, groups: Sequence[Leakage]) -> list[Point]:
    """Every defense, ranked: those that keep the accuracy first, and of these the least gain.

    Then, by gain as well, those that do not keep it and those of which that is not known; last
    those that were not audited.

    Args:
        found: accuracies; None where they were not measured.
        groups: one for each defense, such as :func:`ggl_jax.audit.tables.by_fit`'s.
    """
    rows = [] if found is None else found.rows
    control = None if found is None else found.row_of("none")
    undefended = None if control is None else control["accuracy"]
    audited = {group.defense: group for group in groups}
    trained = {row["defense"]: row for row in rows}

    def kept(row: dict[str, Any] | None) -> bool | None:
        if row is None or undefended is None:
            return None
        # Rounding of accuracies, which are whole numbers of images, is no difference.
        return (row["accuracy"] or 0.0) >= undefended - EQUAL_UTILITY - 1e-9

    def rank(point: Point) -> tuple[bool, bool, float]:
        gain = math.nan if point.leakage is None else point.leakage.means["gain"].mean
        order = math.inf if math.isnan(gain) else gain
        return point.leakage is None, not point.kept, order

    every = [
        Point(name, trained.get(name), audited.get(name), kept(trained.get(name)))
        for name in dict.fromkeys([*audited, *trained])
    ]
    return sorted(every, key=rank)


def _of_row(text: Callable[[dict[str, Any]], str]) -> Callable[[Point], str]:
    return lambda point: "–" if point.row is None else text(point.row)


def _score(name: str, interval: bool = True) -> Callable[[Point], str]:
    return lambda p: "–" if p.leakage is None else score_text(p.leakage, name, interval)


_KEPT = {True: "yes", False: "no", None: "–"}

_DEFENSE = Column("Defense", lambda p: escape(p.label), True)
_LEAK = (
    Column("Gain", _score("gain")),
    Column("Identified", _score("identified_pixels", False)),
)
_ATTACK = Column("Attack", lambda p: "–" if p.leakage is None else escape(p.leakage.variant), True)
_RATE = Column("Learning rate", _of_row(lambda row: f"{row['learning_rate']:g}"))
_UTILITY = (
    Column("Accuracy kept", lambda p: _KEPT[p.kept], True),
    Column("Test accuracy", _of_row(utility.accuracy_text)),
    _RATE,
    Column("ε (add or remove)", _of_row(utility.epsilon_text)),
    Column("ε (replace)", _of_row(lambda row: utility.epsilon_text(row, "epsilon_replace"))),
    Column("Note on ε", _of_row(lambda row: escape(row["epsilon_note"])), True),
)


def rule(ranked: Sequence[Point]) -> str:
    """How the table is sorted, in words."""
    if not any(point.kept is not None for point in ranked):
        return WORDS["sorted_by_gain"]
    return WORDS["sorted_by_utility"].format(points=100 * EQUAL_UTILITY)


def text(ranked: Sequence[Point], found: utility.Utility | None) -> str:
    """The table of :func:`points`, and what it means; Markdown.

    Columns of what was not measured are left out.
    """
    audited = [point.leakage for point in ranked if point.leakage is not None]
    told = any("identified_pixels" in group.means for group in audited)
    several = len({group.variant for group in audited}) > 1
    columns = [_DEFENSE]
    columns += [one for one in _LEAK if audited and (told or one.heading != "Identified")]
    columns += [_ATTACK] if several else []
    if found is not None:
        own = _UTILITY if audited else _UTILITY[1:]
        columns += [one for one in own if one is not _RATE or utility.chooses(found.config)]
    words = []
    if audited:
        legend = "Gain is PSNR in dB above the stronger blind guess"
        if len(audited[0].images) > 1:
            legend += f", mean of {len(audited[0].images):,} images with a 95 % interval"
        legend += "; an image is identified if it is the nearest of all suspects, by pixels."
        words += [rule(ranked), legend, *([WORDS["chosen_attack"]] if several else [])]
    if found is not None:
        undefended = found.row_of("none")
        words += utility.warnings(found)
        if undefended is not None:
            words.append(f"Undefended: {utility.accuracy_text(undefended)}.")
        words.append(f"Naming the commonest class gives {100 * found.config['majority']:.1f} %.")
        words.append(utility.legend(found))
        notes = dict.fromkeys(r["epsilon_note"] for r in found.rows if "pip" in r["epsilon_note"])
        words += [f"Epsilon: {note}." for note in notes]
    return tables.table(columns, ranked) + "\n\n" + escape(" ".join(words))


def of_folder(records: Records) -> str:
    """The leaderboard of a sweep or audit, with accuracies where there are any; Markdown."""
    found = utility.read(records.folder)
    return text(points(found, tables.by_fit(records.rows)), found)
