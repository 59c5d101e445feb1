"""The figures of a report: narrow enough to be read at 400 pixels, in light and dark."""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from ggl_jax.audit.maps import Map, silent
from ggl_jax.audit.tables import Leakage, Mean, family_of, score_text, spoken, strongest

#: Inches; a page of 400 pixels shows it at nearly its own size.
WIDTH = 3.9
#: Lines in one figure, and attacks told apart by colour.
MAX_LINES, MAX_SERIES = 12, 8

#: Legible on white and on black (contrast of at least 3); series differ in their markers, too.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#c0609a", "#8a7400", "#7b6ad0", "#7f7f7f", "#b04040")
_MARKERS = "osD^vPX*"
_GREY = "#808080"
_POINT: dict[str, Any] = {"fmt": "o", "color": _COLORS[0], "markersize": 5, "capsize": 3}

_STYLE = (
    "<style>svg{color:#1a1a1a}svg text{fill:currentColor}"
    "@media (prefers-color-scheme:dark){svg{color:#e6e6e6}}</style>"
)


def svg(figure: Figure, name: str) -> bytes:
    """A figure as an SVG file whose text and axes are dark on light pages and light on dark ones.

    Args:
        figure: the figure; its background is left out.
        name: makes the file the same each time.
    """
    stream = BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue().decode().replace("#000000", "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r"(<svg [^>]*>)", rf"\g<1>{_STYLE}", text, count=1).encode()


def plain(text: str) -> str:
    """A user's text, in which a dollar begins no formula."""
    return text.replace("$", r"\$")


def grid(
    cells: Sequence[tuple[np.ndarray, str]],
    *,
    columns: int = 4,
    width: float = WIDTH,
    title: str = "",
) -> Figure:
    """Pictures side by side, each with a caption below, in as many rows as they need.

    Args:
        cells: images [h w c] in [0, 1] and captions; captions of a few lines.
        columns: pictures in a row.
        width: of the row in inches.
        title: one line above.
    """
    rows = -(-len(cells) // columns)
    lines = max(caption.count("\n") + 1 for _, caption in cells)
    height = width / columns + 0.14 * lines + 0.12
    figure = Figure(figsize=(width, rows * height + 0.3), layout="constrained")
    figure.suptitle(plain(title), fontsize=9)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in panels:
        axis.set_axis_off()
    for axis, (image, caption) in zip(panels, cells, strict=False):
        image = np.clip(np.asarray(image), 0, 1)
        image = image.squeeze(-1) if image.shape[-1] == 1 else image
        axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="none")
        axis.text(0.5, -0.05, plain(caption), fontsize=7, ha="center", va="top",
                  transform=axis.transAxes)  # fmt: skip
    return figure


def _finite(value: float | None) -> float:
    return math.nan if value is None or math.isinf(value) else value


def _bars(means: Sequence[Mean]) -> tuple[np.ndarray, np.ndarray]:
    """Means [n], and how far their intervals reach below and above them [2 n]."""
    ends = [(one.mean, one.end(low=True), one.end(low=False)) for one in means]
    center, low, high = np.vectorize(_finite)(ends).T
    return center, np.stack([center - low, high - center])


def _by_name(names: Sequence[str], panels: int, title: str) -> tuple[Figure, Any]:
    """A figure with a line for each name and so many panels side by side."""
    figure = Figure(figsize=(WIDTH, 0.26 * len(names) + 1.25), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    figure.suptitle(title, fontsize=9)
    for axis in axes:
        axis.set_yticks(range(len(names)), [plain(name) for name in names], fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.grid(axis="y", color=_GREY, alpha=0.25, linewidth=0.5)
    return figure, axes


def by_defense(groups: Sequence[Leakage]) -> Figure:
    """PSNR of each defense under its strongest attack, with the blind guess and the ceiling."""
    chosen = strongest(groups)
    title = "Likeness to the private image, by defense"
    figure, (axis,) = _by_name([group.defense for group in chosen], 1, title)
    rows = range(len(chosen))
    guess, ceiling = ([_finite(g.means[n].mean) for g in chosen] for n in ("control", "ceiling"))
    axis.plot(guess, rows, "|", color=_GREY, markersize=11, markeredgewidth=2, label="blind guess")
    axis.plot(ceiling, rows, ">", color=_COLORS[2], markersize=6, label="ceiling")
    center, reach = _bars([group.means["psnr"] for group in chosen])
    axis.errorbar(center, rows, xerr=reach, label="reconstruction", **_POINT)
    axis.set_xlabel("PSNR, dB", fontsize=8)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def by_parameter(groups: Sequence[Leakage]) -> dict[str, Figure]:
    """PSNR over the parameter, by kind of defense, where there are several values of it."""
    families: dict[str, list[tuple[float, Leakage]]] = {}
    for group in groups:
        family, value = family_of(group.defense)
        if value is not None:
            families.setdefault(family, []).append((value, group))
    figures = {}
    for family, members in families.items():
        values = sorted({value for value, _ in members})
        if len(values) < 2:
            continue
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        axis = figure.subplots()
        variants = list(dict.fromkeys(group.variant for _, group in members))
        for series, variant in enumerate(variants[:MAX_SERIES]):
            own = sorted(((v, g) for v, g in members if g.variant == variant), key=lambda p: p[0])
            style: dict[str, Any] = {"color": _COLORS[series], "marker": _MARKERS[series]}
            center, reach = _bars([group.means["psnr"] for _, group in own])
            at = [value for value, _ in own]
            axis.plot(at, center, label=plain(variant), markersize=5, **style)
            axis.errorbar(at, center, yerr=reach, capsize=3, linestyle="none", **style)
        by_value = dict(members)
        for name, score, line in (("blind guess", "control", "--"), ("ceiling", "ceiling", ":")):
            heights = [_finite(by_value[value].means[score].mean) for value in values]
            axis.plot(values, heights, line, color=_GREY, label=name)
        if min(values) > 0 and max(values) / min(values) > 20:
            axis.set_xscale("log")
        axis.set_title(f"Likeness by the parameter of {plain(family)}", fontsize=9)
        axis.set_xlabel(f"parameter of {plain(family)}", fontsize=8)
        axis.set_ylabel("PSNR, dB", fontsize=8)
        axis.tick_params(labelsize=8)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        figures[family] = figure
    return figures


def leak_maps(maps: Sequence[Map]) -> Figure:
    """The maps of several defenses below each other, on one scale of colours.

    Colour and upper number of a square are its gain, the lower number its images; hatched where no
    leak is shown, empty where nothing was run.
    """
    num_rows, num_columns = len(maps[0].rows), len(maps[0].columns)
    rows = [plain(row).replace(", ", " ") for row in maps[0].rows]
    names = ["\n".join(textwrap.wrap(row, 16)) or "all" for row in rows]
    lines = max(2, *(name.count("\n") + 1 for name in names))
    height = len(maps) * (0.17 * lines * num_rows + 0.45) + 0.75
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    every = [_finite(s.means["gain"].mean) for one in maps for s in one.squares.values()]
    top = max([1.0, *(gain for gain in every if not math.isnan(gain))])
    colors = matplotlib.colormaps["viridis"]
    for axis, one in zip(panels, maps, strict=True):
        axis.set_title(plain(spoken(one.defense)), fontsize=8)
        axis.set_xlim(0, num_columns)
        axis.set_ylim(num_rows, 0)
        axis.set_yticks(np.arange(num_rows) + 0.5, names, fontsize=7)
        labels = [plain(column).replace(", ", "\n") or "all" for column in one.columns]
        axis.set_xticks(np.arange(num_columns) + 0.5, labels, fontsize=7)
        axis.tick_params(length=0)
        for (row, column), square in one.squares.items():
            gain = square.means["gain"].mean
            # An exact copy is at the end of the scale.
            share = 1.0 if math.isinf(gain) else min(max(gain / top, 0.0), 1.0)
            light = share > 0.6
            hatch = {"hatch": "//", "edgecolor": "#666666" if light else "#8a8a8a"}
            style: dict[str, Any] = hatch if silent(square) else {}
            axis.add_patch(
                Rectangle((column, row), 1, 1, facecolor=colors(share), linewidth=0, **style)
            )
            text = f"{score_text(square, 'gain', interval=False)}\n{len(square.images)}"
            axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7,
                      color="#111111" if light else "#f5f5f5")  # fmt: skip
    scale = ScalarMappable(Normalize(0, top), colors)
    bar = figure.colorbar(scale, ax=list(panels), location="bottom", aspect=40, fraction=0.05)
    bar.set_label("gain over the best blind guess, dB (below: images);\n"
                  "hatched: its interval reaches 0", fontsize=7)  # fmt: skip
    bar.ax.tick_params(labelsize=7)
    return figure


def losses(groups: Sequence[Leakage]) -> Figure | None:
    """Lowest loss by step of the searches against one defense; None where no curve was kept.

    Refinement in pixels minimises another loss: it has a panel and an axis of its own.
    """
    panels: dict[str, list[tuple[int, Any, list[float]]]] = {}
    for series, group in enumerate(groups[:MAX_SERIES]):
        # Where there are few attacks, every image gets its line.
        for row in group.rows[: max(1, MAX_LINES // len(groups))]:
            for stage, (steps, curve) in stages(row).items():
                panels.setdefault(stage, []).append((series, steps, curve))
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH if len(panels) > 1 else 2.6, 2.3), layout="constrained")
    figure.suptitle(plain(groups[0].defense), fontsize=9)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (stage, lines) in zip(axes, panels.items(), strict=True):
        for series, steps, curve in lines:
            axis.plot(steps, curve, color=_COLORS[series], linewidth=1)
        low, high = axis.dataLim.intervaly
        if low > 0 and high / low > 20:
            axis.set_yscale("log")
        else:
            axis.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 5))
            axis.locator_params(axis="y", nbins=5)
        axis.locator_params(axis="x", nbins=4)
        axis.set_xlabel(f"step of the {stage}", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("lowest loss so far", fontsize=8)
    if len(groups) > 1:
        colors: list[Any] = [Line2D([], [], color=color) for color in _COLORS[: len(groups)]]
        names = [plain(group.variant) for group in groups[:MAX_SERIES]]
        figure.legend(colors, names, loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    return figure


def stages(row: Mapping[str, Any]) -> dict[str, tuple[list[int], list[float]]]:
    """A row's loss curve (steps, losses) by what was minimised: "search", then "refinement"."""
    steps, curve = row.get("loss_curve") or ([], [])
    first = sum(step <= steps[-1] - row.get("refinement_steps", 0) for step in steps)
    parts: dict[str, tuple[list[int], list[float]]] = {
        "search": (steps[:first], [_finite(loss) for loss in curve[:first]]),
        "refinement": (steps[first:], [_finite(loss) for loss in curve[first:]]),
    }
    return {name: part for name, part in parts.items() if part[0]}


def privacy_utility(
    points: Sequence[tuple[str, Mean, Mean | None]], lines: Mapping[str, float]
) -> Figure:
    """Leakage beside test accuracy, a line for each defense, so that no label hides another.

    Args:
        points: name, gain in dB, and accuracy in percent (None where training diverged).
        lines: accuracies to compare with, by name.
    """
    title = "What leaks, and what the defense leaves of the model"
    figure, (left, right) = _by_name([name for name, _, _ in points], 2, title)
    center, reach = _bars([gain for _, gain, _ in points])
    left.errorbar(center, range(len(points)), xerr=reach, **_POINT)
    for row, (_, _, accuracy) in enumerate(points):
        if accuracy is None:
            right.text(0.03, row, "diverged", va="center", fontsize=8,
                       transform=right.get_yaxis_transform())  # fmt: skip
        else:
            center, reach = _bars([accuracy])
            right.errorbar(center, [row], xerr=reach, **_POINT | {"fmt": "s", "color": _COLORS[1]})
    left.axvline(0, color=_GREY, linewidth=1)
    for (name, height), style in zip(lines.items(), ("--", ":"), strict=False):
        right.axvline(height, linestyle=style, color=_GREY, label=f"{name} {height:.1f} %")
    left.set_xlabel("PSNR above the\nblind guess, dB", fontsize=8)
    right.set_xlabel("test accuracy, %", fontsize=8)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure
