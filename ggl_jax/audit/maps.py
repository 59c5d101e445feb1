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
    grouped,
    leakage,
    score_text,
    spoken,
    strongest,
    table,
)
from ggl_jax.spec import Client, Setup, combinations, varying

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
    varied = [(axes, _varying([_values(row, axes) for row in results])) for axes in (ROWS, COLUMNS)]
    if not any(by for _, by in varied):
        return []
    sides = [(axes, by, [(*one.values(),) for one in combinations(by)]) for axes, by in varied]

    def place(row: Mapping[str, Any]) -> Any:
        return tuple(
            places.index(tuple(_values(row, axes)[name] for name in by))
            for axes, by, places in sides
        )

    rows, columns = (_labels(by, places) for _, by, places in sides)
    found = []
    for defense, own in grouped(results, lambda row: row["defense"]).items():
        squares = {at: strongest(leakage(part))[0] for at, part in grouped(own, place).items()}
        found.append(Map(defense, rows, columns, squares))
    return found


def _values(row: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    axes = row.get("axes") or {}
    return {name: axes.get(name, usual) for name, usual in names.items()}


def _varying(values: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Names with several values, and these, numbers by size."""
    return {
        name: sorted(seen) if all(isinstance(one, int | float) for one in seen) else seen
        for name, seen in varying(values).items()
    }


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


def silent(square: Leakage) -> bool:
    """Whether no leak is shown: the interval reaches 0, or there is none and the mean is below."""
    return not square.means["gain"].end(low=True) > 0


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
