"""The map of a sweep: what leaks by the training stage and kind of model, and by the client.

Rows are the models (axes ``weights`` and ``model``, whose options say the mode of BatchNorm),
columns the clients (axes that are options of :class:`ggl_jax.spec.Client`: ``batch_size``,
``local_steps``, ...), whichever of them have several values; there is a map for each defense.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ggl_jax.audit.tables import (
    Column,
    Leakage,
    escape,
    leakage,
    score_text,
    spoken,
    strongest,
    table,
)
from ggl_jax.spec import Client, Setup, combinations

#: Axes of rows and columns, and their values where a row has none.
ROWS: dict[str, Any] = {"weights": Setup().weights, "model": Setup().model}
COLUMNS: dict[str, Any] = dataclasses.asdict(Client())


class Map(NamedTuple):
    """What leaks under one defense.

    Attributes:
        defense: its specification.
        rows, columns: their labels.
        squares: (row, column) -> its results, under the attack that got furthest there; those that
            were not run are missing.
    """

    defense: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    squares: dict[tuple[int, int], Leakage]


def maps(results: Sequence[dict[str, Any]]) -> list[Map]:
    """A map for each defense, in the order of the results; none where no such axis varies.

    Args:
        results: rows of a folder. Where more than one attack (or any other axis) was run on a
            square, the one of the highest mean PSNR counts; seeds of one image are averaged.
    """
    placed = [(_values(row, ROWS), _values(row, COLUMNS), row) for row in results]
    by_rows, by_columns = (_varying([p[side] for p in placed]) for side in (0, 1))
    if not (by_rows or by_columns):
        return []
    rows, columns = (
        [tuple(place.values()) for place in combinations(by)] for by in (by_rows, by_columns)
    )
    found: dict[str, dict[tuple[int, int], list[dict[str, Any]]]] = {}
    for of_row, of_column, row in placed:
        place = (
            rows.index(tuple(of_row[name] for name in by_rows)),
            columns.index(tuple(of_column[name] for name in by_columns)),
        )
        found.setdefault(row["defense"], {}).setdefault(place, []).append(row)
    labels = _labels(by_rows, rows), _labels(by_columns, columns)
    return [
        Map(
            defense,
            *labels,
            {place: strongest(leakage(own))[0] for place, own in squares.items()},
        )
        for defense, squares in found.items()
    ]


def _values(row: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    axes = row.get("axes") or {}
    return {name: axes.get(name, usual) for name, usual in names.items()}


def _varying(values: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Names with several values, and these, numbers by size."""
    found: dict[str, list[Any]] = {}
    for name in values[0] if values else ():
        seen = list(dict.fromkeys(one[name] for one in values))
        if len(seen) > 1:
            number = all(isinstance(value, int | float) for value in seen)
            found[name] = sorted(seen) if number else seen
    return found


def _labels(varying: Mapping[str, list[Any]], places: Iterable[tuple]) -> tuple[str, ...]:
    texts = {name: _texts(name, values) for name, values in varying.items()}
    return tuple(
        ", ".join(texts[name][value] for name, value in zip(varying, place, strict=True))
        for place in places
    )


def _texts(name: str, values: Sequence[Any]) -> dict[Any, str]:
    """What labels call an axis' values: no longer than tells them apart."""
    if name == "weights":
        short = [Path(str(value)).stem for value in values]
        texts = short if len(set(short)) == len(short) else [str(value) for value in values]
    elif name == "model":
        parts = [str(value).partition(":") for value in values]
        same = len({kind for kind, _, _ in parts}) == 1
        texts = [options if same and options else f"{a}{b}{options}" for a, b, options in parts]
    elif name == "batch_size":
        texts = [f"batch {value}" for value in values]
    elif name == "local_steps":
        texts = [f"{value} step{'' if value == 1 else 's'}" for value in values]
    else:
        texts = [f"{name.replace('_', ' ')} {value}" for value in values]
    return dict(zip(values, texts, strict=True))


#: What the tables and figures of maps show.
LEGEND = (
    "PSNR above the best blind guess, dB, with its 95 % interval over images (Student's t), and "
    "the number of images, under the attack that got furthest in each square. In brackets: the "
    "interval reaches 0 or less, so that no leak is shown. Images of one update are not "
    "independent, so for large batches intervals are too narrow."
)


def silent(square: Leakage) -> bool:
    """Whether no leak is shown: the interval reaches 0, or there is none and the mean is below."""
    gain = square.means["gain"]
    return not (gain.mean if gain.low is None else gain.low) > 0


def square_text(square: Leakage | None) -> str:
    """A square in a table: ``"+9.2 [+6.9, +11.4], 4"``, in brackets where it is silent."""
    if square is None:
        return "–"
    text = f"{score_text(square, 'gain')}, {len(square.images):,}"
    return f"({text})" if silent(square) else text


def map_table(one: Map) -> str:
    """A map as Markdown."""

    def column(number: int, label: str) -> Column:
        return Column(
            escape(label) or "all", lambda row: square_text(one.squares.get((row, number)))
        )

    head = Column("", lambda row: escape(one.rows[row]) or "all", True)
    shown = [column(number, label) for number, label in enumerate(one.columns)]
    return f"**{escape(spoken(one.defense))}**\n\n{table([head, *shown], range(len(one.rows)))}"
