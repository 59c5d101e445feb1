"""A sweep's or audit's report: one HTML page that needs nothing else, and Markdown."""

import base64
import html
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ggl_jax import files
from ggl_jax.audit import utility
from ggl_jax.audit.aggregate import (
    Leakage,
    Mean,
    family_of,
    gain_of,
    leakage,
    mean_over_images,
    variant_names,
    variant_of,
)
from ggl_jax.audit.controls import read_controls
from ggl_jax.audit.folder import Records
from ggl_jax.audit.report import MARGIN
from ggl_jax.errors import GGLError

#: So much a page shows before it says that there is more in the folder.
MAX_SHEET_IMAGES, MAX_SHEET_ATTACKS, MAX_SHEETS, MAX_PANELS, MAX_LINES = 8, 6, 24, 12, 12
MAX_FAILURES, MAX_SERIES = 50, 8

#: The privacy-utility plot as a file, for report.md.
UTILITY_FIGURE = "privacy-utility.svg"

#: Legible on white and on black (contrast of at least 3); series differ in their markers, too.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#c0609a", "#8a7400", "#7b6ad0", "#7f7f7f", "#b04040")
_MARKERS = "osD^vPX*"
_GREY = "#808080"

_STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1a;--paper:#fff;--line:#d5d5d5;--soft:#f4f4f4}
@media (prefers-color-scheme:dark){:root{--ink:#e6e6e6;--paper:#161616;--line:#444;--soft:#232323}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:70rem;margin:0 auto;padding:1rem}
h1{font-size:1.6rem}h2{font-size:1.25rem;margin-top:2rem}
.scroll{overflow-x:auto;max-height:70vh}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child,th.text,td.text{text-align:left}
thead th{position:sticky;top:0;background:var(--soft)}
td.text{white-space:normal;min-width:6rem}
details{border:1px solid var(--line);border-radius:6px;padding:.4rem .8rem;margin:.5rem 0}
summary{cursor:pointer}
.sheet td,.sheet th{padding:.2rem;text-align:center;border:0;font-size:.8rem}
.sheet img{width:96px;height:96px;image-rendering:pixelated;display:block;margin:auto}
svg{max-width:100%;height:auto;color:var(--ink)}
svg text{fill:currentColor}
.pairs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1rem}
pre{background:var(--soft);padding:.8rem;overflow-x:auto;white-space:pre-wrap}
.note{opacity:.8;font-size:.9rem}
"""

LEGEND = (
    "PSNR is in dB on the [0, 1] scale. Means are over images, with a 95 % interval (Student's t); "
    "the seeds of one image are averaged first. Control: the stronger of two guesses made without "
    "the update, the prior's mean image and its random samples on average. Gain: PSNR above it. "
    "Best random: the best of many samples, picked with the private image in hand. Ceiling: the "
    "nearest image that the prior can make. A gain whose interval stays above zero shows a leak; "
    "no gain is no proof of safety."
)


def _escape(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _number(value: float | None, decimals: int = 1, sign: bool = False) -> str:
    if value is None:
        return "–"
    if math.isinf(value):
        return "exact"
    return f"{value:{'+' if sign else ''}.{decimals}f}"


def _mean(mean: Mean | None, decimals: int = 1, sign: bool = False) -> str:
    if mean is None:
        return "–"
    text = _number(mean.mean, decimals, sign)
    if mean.low is None or mean.high is None:
        return text
    return f"{text} [{_number(mean.low, decimals, sign)}, {_number(mean.high, decimals, sign)}]"


Column = tuple[str, Callable[[Any], str], bool]

_COLUMNS: tuple[Column, ...] = (
    ("Defense", lambda g: g.defense, True),
    ("Attack", lambda g: g.variant, True),
    ("Images", lambda g: str(g.num_images), False),
    ("PSNR", lambda g: _mean(g.psnr), False),
    ("Control", lambda g: _number(g.control), False),
    ("Gain", lambda g: _mean(g.gain, sign=True), False),
    ("Best random", lambda g: _number(g.best), False),
    ("Ceiling", lambda g: _number(g.ceiling), False),
    ("SSIM", lambda g: _mean(g.ssim, 2), False),
    ("LPIPS", lambda g: _mean(g.lpips, 3), False),
    ("MSE-R", lambda g: _number(g.mse_r.mean, 4), False),
    ("Label right", lambda g: f"{100 * g.label:.0f} %", False),
    ("Evaluations", lambda g: f"{g.evaluations:,}", False),
    ("Stalled / broken", lambda g: f"{g.stalled} / {g.nonfinite}", False),
)


def _html_table(columns: Sequence[Column], items: Iterable[Any], label: str) -> str:
    def cell(tag, text, is_text, scope=""):
        return f"<{tag}{scope}{' class=text' if is_text else ''}>{_escape(text)}</{tag}>"

    head = "".join(cell("th", name, text, ' scope="col"') for name, _, text in columns)
    body = "".join(
        "<tr>" + "".join(cell("td", show(item), text) for _, show, text in columns) + "</tr>\n"
        for item in items
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_escape(label)}"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )


def _markdown_table(columns: Sequence[Column], items: Iterable[Any]) -> str:
    def row(cells):
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"

    lines = [row(name for name, _, _ in columns), "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(row(show(item) for _, show, _ in columns) for item in items)])


# --- figures ------------------------------------------------------------------------------------


def _svg(figure: Figure, name: str, description: str) -> str:
    """A figure as inline SVG: text stays text, black follows the page's colour."""
    stream = BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue().decode()
    text = text[text.index("<svg") :].replace("#000000", "currentColor")
    # Two inline figures share the page's ids.
    text = re.sub(r'(id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg ", f'<svg role="img" aria-label="{_escape(description)}" ', 1)


def _finite(value: float | None) -> float:
    return math.nan if value is None or math.isinf(value) else value


def _plot_mean(axis, x, mean: Mean, *, horizontal: bool, **style) -> None:
    center = _finite(mean.mean)
    low, high = (_finite(end) if end is not None else center for end in (mean.low, mean.high))
    reach = [[center - low], [high - center]]
    if horizontal:
        axis.errorbar([center], [x], xerr=reach, capsize=3, **style)
    else:
        axis.errorbar([x], [center], yerr=reach, capsize=3, **style)


def strongest(groups: Sequence[Leakage]) -> list[Leakage]:
    """For each defense, the attack of the highest mean PSNR: the one an adversary would choose."""
    best: dict[str, Leakage] = {}
    for group in groups:
        known = best.get(group.defense)
        if known is None or group.psnr.mean > known.psnr.mean:
            best[group.defense] = group
    return list(best.values())


def _overview(groups: Sequence[Leakage]) -> str:
    """PSNR of each defense under its strongest attack, with control and ceiling."""
    chosen = strongest(groups)
    figure = Figure(figsize=(7.5, 0.32 * len(chosen) + 1.1), layout="constrained")
    axis = figure.subplots()
    for row, group in enumerate(chosen):
        label = row == 0
        axis.plot([_finite(group.control)], [row], "|", color=_GREY, markersize=12,
                  markeredgewidth=2, label="control" if label else None)  # fmt: skip
        axis.plot([_finite(group.ceiling)], [row], ">", color=_COLORS[2], markersize=6,
                  label="ceiling" if label else None)  # fmt: skip
        _plot_mean(axis, row, group.psnr, horizontal=True, fmt="o", color=_COLORS[0],
                   label="reconstruction" if label else None)  # fmt: skip
    axis.set_yticks(range(len(chosen)), [group.defense for group in chosen])
    axis.set_ylim(len(chosen) - 0.4, -0.6)
    axis.set_xlabel("PSNR, dB")
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    parts = "; ".join(
        f"{g.defense} {_mean(g.psnr)} against a control of {_number(g.control)}" for g in chosen[:8]
    )
    return _svg(figure, "overview", f"PSNR in dB by defense, strongest attack: {parts}")


def _families(groups: Sequence[Leakage]) -> list[str]:
    """PSNR by the parameter, a figure for each kind of defense with several; side by side."""
    families: dict[str, list[tuple[float, Leakage]]] = {}
    for group in groups:
        family, value = family_of(group.defense)
        if value is not None:
            families.setdefault(family, []).append((value, group))
    figures = []
    for number, (family, members) in enumerate(families.items()):
        values = sorted({value for value, _ in members})
        if len(values) < 2:
            continue
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axis = figure.subplots()
        variants = list(dict.fromkeys(group.variant for _, group in members))
        for series, variant in enumerate(variants[:MAX_SERIES]):
            own = sorted(((v, g) for v, g in members if g.variant == variant), key=lambda p: p[0])
            style: dict[str, Any] = {"color": _COLORS[series], "marker": _MARKERS[series]}
            axis.plot([v for v, _ in own], [_finite(g.psnr.mean) for _, g in own], label=variant,
                      **style)  # fmt: skip
            for value, group in own:
                _plot_mean(axis, value, group.psnr, horizontal=False, **style)
        by_value = dict(members)
        for name, field, line in (("control", "control", "--"), ("ceiling", "ceiling", ":")):
            heights = [_finite(getattr(by_value[value], field)) for value in values]
            axis.plot(values, heights, line, color=_GREY, label=name)
        if min(values) > 0 and max(values) / min(values) > 20:
            axis.set_xscale("log")
        axis.set_xlabel(f"parameter of {family}")
        axis.set_ylabel("PSNR, dB")
        figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize="small")
        low, high = by_value[values[0]], by_value[values[-1]]
        description = (
            f"PSNR by the parameter of {family}: {_mean(low.psnr)} dB at {values[0]:g}, "
            f"{_mean(high.psnr)} dB at {values[-1]:g}; dashed the control, dotted the ceiling"
        )
        figures.append(_svg(figure, f"family{number}", description))
    return ['<div class="pairs">', *figures, "</div>"] if figures else []


def _loss_curves(groups: Sequence[Leakage]) -> str:
    """Lowest loss by step, a panel for each defense, a line for each result."""
    by_defense: dict[str, list[Leakage]] = {}
    for group in groups:
        if any("loss_curve" in row for row in group.rows):
            by_defense.setdefault(group.defense, []).append(group)
    shown = list(by_defense.items())[:MAX_PANELS]
    if not shown:
        return ""
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.6, 2.2 * lines + 0.5), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for axis in panels.flat[len(shown) :]:
        axis.set_visible(False)
    lines_by_attack: dict[str, Any] = {}
    for axis, (defense, own) in zip(panels.flat, shown, strict=False):
        positive = True
        for series, group in enumerate(own[:MAX_SERIES]):
            # Where there are few attacks, every image gets its line.
            for row in group.rows[: max(1, MAX_LINES // len(own))]:
                steps, losses = row.get("loss_curve") or ([], [])
                losses = [_finite(loss) for loss in losses]
                positive &= all(loss > 0 for loss in losses if not math.isnan(loss))
                axis.plot(steps, losses, color=_COLORS[series], linewidth=0.9)
                lines_by_attack.setdefault(group.variant, axis.lines[-1])
        if positive:
            axis.set_yscale("log")
        axis.set_title(defense, fontsize="small")
        axis.tick_params(labelsize="x-small")
    figure.supxlabel("step", fontsize="small")
    figure.supylabel("lowest loss", fontsize="small")
    figure.legend(
        list(lines_by_attack.values()),
        list(lines_by_attack),
        loc="outside upper left",
        ncols=4,
        frameon=False,
        fontsize="small",
    )
    names = ", ".join(defense for defense, _ in shown)
    return _svg(figure, "losses", f"Lowest matching loss by step of the search, under {names}")


# --- privacy and utility ------------------------------------------------------------------------


class _Point(NamedTuple):
    """A defense's place between leakage and utility; either may be missing."""

    label: str
    row: dict[str, Any] | None
    leakage: Leakage | None


def _points(found: utility.Utility, groups: Sequence[Leakage]) -> list[_Point]:
    """Every audited defense under its strongest attack, then those with a utility alone."""
    by_fidelity: dict[str, list[Leakage]] = {}
    for group in groups:
        by_fidelity.setdefault(group.rows[0].get("fidelity", "paper"), []).append(group)
    several = len(by_fidelity) > 1
    points = []
    for fidelity, own in by_fidelity.items():
        for group in strongest(own):
            row = found.row_of(group.defense, fidelity)
            label = f"{group.defense} ({fidelity})" if several else group.defense
            points.append(_Point(label, row, group))
    shown = [point.row for point in points]
    points += [_Point(row["defense"], row, None) for row in found.rows if row not in shown]
    return points


def _gain(point: _Point) -> str:
    return _mean(point.leakage.gain if point.leakage else None, sign=True)


def _of_row(text: Callable[[dict[str, Any]], str]) -> Callable[[_Point], str]:
    return lambda point: "–" if point.row is None else text(point.row)


_UTILITY_COLUMNS: tuple[Column, ...] = (
    ("Defense", lambda p: p.label, True),
    ("Gain", _gain, False),
    ("Test accuracy", _of_row(utility.accuracy_text), False),
    ("ε (add or remove)", _of_row(utility.epsilon_text), False),
    ("ε (replace)", _of_row(lambda row: utility.epsilon_text(row, "epsilon_replace")), False),
    ("Note on ε", _of_row(lambda row: row["epsilon_note"]), True),
)


def _utility_legend(found: utility.Utility) -> str:
    undefended = found.row_of("none", "")
    text = f"Naming the commonest class gives {100 * found.config['majority']:.1f} %."
    if undefended is not None:
        text = f"Undefended: {utility.accuracy_text(undefended)}. {text}"
    return " ".join([*utility.warnings(found), text, utility.legend(found.config)])


def _utility_hint(records: Records) -> str:
    return (
        f"Utility was not measured: `ggl-jax utility {records.folder}` trains the model under each "
        "defense and adds accuracy, epsilon and a privacy-utility plot (`--data` names its images)."
    )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights at least ``gap`` apart, in the same order, as near to the given ones as may be.

    Neighbours that would touch share a block around their mean; blocks that touch are merged.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    blocks: list[list[int]] = []
    middles: list[float] = []
    for index in order:
        blocks.append([index])
        middles.append(heights[index])
        while len(blocks) > 1:
            reach = gap * (len(blocks[-1]) + len(blocks[-2])) / 2
            if middles[-1] - middles[-2] >= reach:
                break
            merged = blocks[-2] + blocks[-1]
            blocks[-2:], middles[-2:] = [merged], [sum(heights[i] for i in merged) / len(merged)]
    placed = list(heights)
    for block, middle in zip(blocks, middles, strict=True):
        for rank, index in enumerate(block):
            placed[index] = middle + gap * (rank - (len(block) - 1) / 2)
    return placed


def _drawn(points: Sequence[_Point]) -> list[tuple[str, dict[str, Any], Mean]]:
    """Label, row and gain of the points that have a place in the figure."""
    return [
        (p.label, p.row, p.leakage.gain)
        for p in points
        if p.row is not None and p.leakage is not None and math.isfinite(p.leakage.gain.mean)
    ]


def _privacy_utility(found: utility.Utility, points: Sequence[_Point]) -> str:
    """Test accuracy over leakage: a point for each defense, labelled with its epsilon."""
    drawn = _drawn(points)
    if not drawn:
        return ""
    undefended = found.row_of("none", "")
    lines = [("majority class", "--", 100 * found.config["majority"])]
    if undefended is not None and undefended["accuracy"] is not None:
        lines.append(("undefended", ":", 100 * undefended["accuracy"]))
    known = [100 * row["accuracy"] for _, row, _ in drawn if row["accuracy"] is not None]
    known += [height for _, _, height in lines]
    margin = max(2.0, 0.12 * (max(known) - min(known)))
    low, high = min(known) - margin, max(known) + margin
    inches = max(3.2, 0.24 * len(drawn) + 1.0)
    figure = Figure(figsize=(7.5, inches), layout="constrained")
    axis = figure.subplots()
    for name, line, height in lines:
        axis.axhline(height, linestyle=line, color=_GREY, label=name)
    # A broken model has no accuracy: it stands on the axis, and its label says why.
    heights = [low if row["accuracy"] is None else 100 * row["accuracy"] for _, row, _ in drawn]
    places = _spread([(h - low) / (high - low) for h in heights], 0.2 / (inches - 0.9))
    for number, ((label, row, gain), height) in enumerate(zip(drawn, heights, strict=True)):
        color, broken = _COLORS[number % len(_COLORS)], row["accuracy"] is None
        _plot_mean(
            axis,
            height,
            gain,
            horizontal=True,
            fmt="x" if broken else _MARKERS[number % len(_MARKERS)],
            color=color,
            clip_on=False,
        )
        axis.annotate(
            f"{label}, {'diverged, ' if broken else ''}ε {_epsilon(row)}",
            xy=(gain.mean, height),
            xytext=(1.03, places[number]),
            textcoords="axes fraction",
            fontsize="small",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.9, "alpha": 0.8},
        )
    axis.set_ylim(low, high)
    axis.set_xlabel("leakage: PSNR above the best blind guess, dB")
    axis.set_ylabel("test accuracy, %")
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    told = "; ".join(
        f"{label}: {_mean(gain, sign=True)} dB, {utility.accuracy_text(row)}, epsilon "
        f"{_epsilon(row)}"
        for label, row, gain in drawn[:12]
    )
    description = f"Test accuracy by leakage (gain): {told}; {lines[0][0]}: {lines[0][2]:.1f} %"
    return _svg(figure, "utility", description)


def _epsilon(row: dict[str, Any]) -> str:
    return utility.epsilon_text(row).removesuffix(" (unbounded)")


def _standalone(figure: str) -> str:
    """An inline figure as a file of its own, in light and dark."""
    style = (
        "<style>svg{color:#1a1a1a}svg text{fill:currentColor}"
        "@media (prefers-color-scheme:dark){svg{color:#e6e6e6}}</style>"
    )
    return figure.replace(">", f">{style}", 1)


# --- pictures -----------------------------------------------------------------------------------


def _image(content: bytes, description: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{_escape(description)}" src="data:image/png;base64,{data}">'


def _reconstruction(records: Records, row: dict[str, Any]) -> str:
    path = records.folder / row.get("reconstruction", "")
    if not path.is_file():
        return "missing"
    shown = f"{_number(row['psnr'])} dB"
    what = f"reconstruction of {row['image']} under {row['defense']}, {shown}"
    return _image(path.read_bytes(), what) + _escape(shown)


def _sheets(records: Records, groups: Sequence[Leakage]) -> str:
    """For each defense, folded: private images, controls, and each attack's reconstructions."""
    by_defense: dict[str, list[Leakage]] = {}
    for group in groups:
        by_defense.setdefault(group.defense, []).append(group)
    parts = []
    for number, (defense, own) in enumerate(list(by_defense.items())[:MAX_SHEETS]):
        rows = {row["image"]: row for row in reversed(own[0].rows)}
        names = list(dict.fromkeys(row["image"] for row in own[0].rows))[:MAX_SHEET_IMAGES]
        lines: list[list[str]] = [["", *[_escape(name) for name in names]]]
        pictures = {
            name: read_controls(records.folder / rows[name]["controls"])
            for name in names
            if "controls" in rows[name] and (records.folder / rows[name]["controls"]).is_file()
        }
        if pictures:
            # The same for every defense: shown once.
            kinds = [("private image", None)] if number else [
                ("private image", None),
                ("best random", "best_sample"),
                ("mean image", "mean_image"),
                ("ceiling", "ceiling"),
            ]  # fmt: skip
            for title, field in kinds:
                line = [title]
                for name in names:
                    if name not in pictures:
                        line.append("")
                        continue
                    controls, original = pictures[name]
                    image = original if field is None else getattr(controls, field)
                    line.append(_image(files.png_bytes(image), f"{title} of {name}"))
                lines.append(line)
        for group in sorted(own, key=lambda g: -g.psnr.mean)[:MAX_SHEET_ATTACKS]:
            first = {row["image"]: row for row in reversed(group.rows)}
            lines.append(
                [_escape(group.variant)]
                + [_reconstruction(records, first[n]) if n in first else "" for n in names]
            )
        table = "".join(
            "<tr>" + f"<th>{line[0]}</th>" + "".join(f"<td>{c}</td>" for c in line[1:]) + "</tr>\n"
            for line in lines
        )
        left = own[0].num_images - len(names)
        more = f" (first {len(names)} of {own[0].num_images} images)" if left > 0 else ""
        parts.append(
            f"<details{'' if number else ' open'}><summary>{_escape(defense)}{more}</summary>"
            f'<div class="scroll"><table class="sheet">{table}</table></div></details>'
        )
    hidden = len(by_defense) - MAX_SHEETS
    if hidden > 0:
        parts.append(f"<p>{hidden} more defenses: see the folder's reconstructions.</p>")
    return "\n".join(parts)


def _figure_of_audit(records: Records) -> str:
    path = records.folder / "figure.png"
    if not path.is_file():
        return ""
    with Image.open(path) as picture:
        width = picture.width
    shown = _image(path.read_bytes(), "Private images, reconstructions by defense, and controls")
    return f'<div class="scroll">{shown}</div>'.replace("<img ", f"<img width={width} ", 1)


# --- parameters ---------------------------------------------------------------------------------


def _parameters(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, float, float, float]]:
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


_PARAMETER_COLUMNS: tuple[Column, ...] = (
    ("Defense", lambda p: p[0], True),
    ("Parameter", lambda p: p[1], True),
    ("True", lambda p: f"{p[2]:.4g}", False),
    ("Estimated", lambda p: f"{p[3]:.4g}", False),
    ("Largest relative error", lambda p: f"{100 * p[4]:.2g} %", False),
)


# --- pages --------------------------------------------------------------------------------------


def sentences(records: Records, groups: Sequence[Leakage]) -> list[str]:
    """What was found, in words."""
    done, failed, left = len(records.finished), len(records.failures), len(records.left)
    images = len({row["image"] for row in records.rows})
    text = [f"{done:,} cells on {images:,} images."]
    if failed or left:
        text.append(f"{failed:,} cells failed, {left:,} are not run yet.")
    chosen = strongest(groups)
    leaking = [g for g in chosen if g.gain.mean > MARGIN and (g.gain.low is None or g.gain.low > 0)]
    if leaking:
        listed = ", ".join(f"{g.defense} ({_mean(g.gain, sign=True)} dB)" for g in leaking)
        text.append(
            f"By the strongest attack, the image leaked beyond a blind guess under {listed}."
        )
    silent = [g.defense for g in chosen if g not in leaking]
    if silent:
        text.append(
            f"No leak beyond a blind guess was shown under {', '.join(silent)}; that is no proof "
            "of safety."
        )
    if images == 1:
        text.append("One image gives no interval; audit more.")
    return text


def _page(title: str, body: Sequence[str]) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>",
            f"<h1>{_escape(title)}</h1>",
            *body,
            "</main>\n</body>\n</html>\n",
        ]
    )


def _section(title: str, *parts: str) -> list[str]:
    shown = [part for part in parts if part]
    return [f"<h2>{_escape(title)}</h2>", *shown] if shown else []


def page(records: Records) -> str:
    """The report as one HTML page, without any other file.

    Raises:
        GGLError: there are no results yet.
    """
    groups = _groups(records)
    parameters = _parameters(records.rows)
    failures = list(records.failures.items())[:MAX_FAILURES]
    body = [f"<p>{_escape(sentence)}</p>" for sentence in sentences(records, groups)]
    body += _section("Leakage by defense", _overview(groups), *_families(groups))
    found = utility.read(records.folder)
    if found is None:
        body.append(f'<p class="note">{_escape(_utility_hint(records))}</p>')
    else:
        points = _points(found, groups)
        body += _section(
            "Privacy and utility",
            _privacy_utility(found, points),
            _html_table(_UTILITY_COLUMNS, points, "Leakage, accuracy and epsilon by defense"),
            f'<p class="note">{_escape(_utility_legend(found))}</p>',
        )
    body += _section(
        "All numbers",
        f'<p class="note">{_escape(LEGEND)}</p>',
        _html_table(_COLUMNS, groups, "Leakage by defense and attack"),
    )
    body += _section("Reconstructions", _figure_of_audit(records), _sheets(records, groups))
    body += _section("Searches", _loss_curves(groups))
    if parameters:
        body += _section(
            "What the server read off the updates",
            _html_table(_PARAMETER_COLUMNS, parameters, "Defense parameters, true and estimated"),
        )
    if failures:
        columns: tuple[Column, ...] = (
            ("Cell", lambda f: _cell(records, f[0]), True),
            ("Reason", lambda f: f[1], True),
        )
        title = f"Failed cells ({len(failures)} of {len(records.failures)})"
        body += _section(title, _html_table(columns, failures, "Failed cells"))
    config = json.dumps(records.config, indent=2)
    body += _section(
        "Configuration and environment",
        f"<details><summary>{_escape(records.config.get('command', 'config.json'))}</summary>"
        f"<pre>{_escape(config)}</pre></details>",
    )
    return _page(f"Privacy audit: {records.folder.resolve().name}", body)


def _cell(records: Records, cell: str) -> str:
    values = records.cells[cell].items()
    return ", ".join(f"{name} {value}" for name, value in values if name != "evaluations")


def _groups(records: Records) -> list[Leakage]:
    if not records.rows:
        raise GGLError(f"report: {records.folder} holds no finished cell yet")
    return leakage(records.rows)


def markdown(records: Records) -> str:
    """The report's words and tables as Markdown.

    Raises:
        GGLError: there are no results yet.
    """
    groups = _groups(records)
    parts = [
        f"# Privacy audit: {records.folder.resolve().name}",
        " ".join(sentences(records, groups)),
        _markdown_table(_COLUMNS, groups),
        LEGEND,
    ]
    found = utility.read(records.folder)
    if found is None:
        parts.append(_utility_hint(records))
    else:
        points = _points(found, groups)
        parts.append("## Privacy and utility")
        if _drawn(points):
            parts.append(f"![Test accuracy by leakage]({UTILITY_FIGURE})")
        parts += [_markdown_table(_UTILITY_COLUMNS, points), _utility_legend(found)]
    parameters = _parameters(records.rows)
    if parameters:
        parts += [
            "## What the server read off the updates",
            _markdown_table(_PARAMETER_COLUMNS, parameters),
        ]
    if records.failures:
        shown = list(records.failures.items())[:MAX_FAILURES]
        parts += ["## Failed cells", "\n".join(f"- {_cell(records, c)}: {r}" for c, r in shown)]
    config = json.dumps(records.config, indent=2)
    parts += ["## Configuration and environment", f"```json\n{config}\n```"]
    return "\n\n".join(parts) + "\n"


def write(records: Records, folder: Path | None = None) -> Path:
    """Write ``report.html`` and ``report.md``; the page's path.

    Where utility was measured, its figure goes to a file beside them, which ``report.md`` shows.

    Args:
        records: of :func:`ggl_jax.audit.folder.read`.
        folder: where; None for the results' own folder.

    Raises:
        GGLError: there are no results yet.
    """
    folder = records.folder if folder is None else folder
    path = _write(folder, "report", page(records), markdown(records))
    found = utility.read(records.folder)
    points = [] if found is None else _points(found, _groups(records))
    if found is not None and _drawn(points):
        figure = _standalone(_privacy_utility(found, points))
        files.write_bytes(folder / UTILITY_FIGURE, figure.encode())
    return path


def _write(folder: Path, name: str, page: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    files.write_bytes(folder / f"{name}.md", text.encode())
    path = folder / f"{name}.html"
    files.write_bytes(path, page.encode())
    return path


# --- comparison ---------------------------------------------------------------------------------


def compare(a: Records, b: Records) -> list[tuple[str, str, int, Mean, Mean, Mean]]:
    """Defense, attack, common images, gain in A, gain in B, and B minus A, paired by image.

    Raises:
        GGLError: they share no defense, attack and image.
    """
    names = variant_names([*a.rows, *b.rows])

    def grouped(records):
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in records.rows:
            found.setdefault((row["defense"], variant_of(row, names)), []).append(row)
        return found

    first, second = grouped(a), grouped(b)
    table = []
    for key in first:
        images = {row["image"] for row in first[key]} & {r["image"] for r in second.get(key, [])}
        if not images:
            continue
        own = [[row for row in rows[key] if row["image"] in images] for rows in (first, second)]
        means = [
            {i: mean_over_images([r for r in rows if r["image"] == i], gain_of).mean
             for i in images}
            for rows in own
        ]  # fmt: skip
        paired = [{"image": i, "difference": means[1][i] - means[0][i]} for i in sorted(images)]
        table.append(
            (
                *key,
                len(images),
                mean_over_images(own[0], gain_of),
                mean_over_images(own[1], gain_of),
                mean_over_images(paired, lambda row: row["difference"]),
            )
        )
    if not table:
        raise GGLError(
            f"compare: {a.folder} and {b.folder} share no defense, attack and image; compare "
            "audits of the same data"
        )
    return table


_COMPARE_COLUMNS: tuple[Column, ...] = (
    ("Defense", lambda c: c[0], True),
    ("Attack", lambda c: c[1], True),
    ("Images", lambda c: str(c[2]), False),
    ("Gain in A", lambda c: _mean(c[3], sign=True), False),
    ("Gain in B", lambda c: _mean(c[4], sign=True), False),
    ("B - A", lambda c: _mean(c[5], sign=True), False),
)


def write_comparison(a: Records, b: Records, folder: Path) -> Path:
    """Write ``comparison.html`` and ``comparison.md``; the page's path.

    Raises:
        GGLError: as :func:`compare`.
    """
    table = compare(a, b)
    title = f"{a.folder.resolve().name} (A) and {b.folder.resolve().name} (B)"
    legend = (
        "Gain: PSNR above the stronger blind control, dB, mean over the images that both have, "
        "with a 95 % interval. B - A is paired by image: an interval without zero is a difference."
    )
    changed = files.differences(
        {k: a.config.get(k) for k in ("options", "inputs", "environment")},
        {k: b.config.get(k) for k in ("options", "inputs", "environment")},
    )
    listed = "".join(f"<li>{_escape(line)}</li>" for line in changed)
    body = [f'<p class="note">{_escape(legend)}</p>', _html_table(_COMPARE_COLUMNS, table, title)]
    body += _section("What differs in the configurations (A -> B)", f"<ul>{listed}</ul>")
    text = [f"# {title}", legend, _markdown_table(_COMPARE_COLUMNS, table)]
    text += ["## What differs in the configurations (A -> B)", "\n".join(f"- {c}" for c in changed)]
    return _write(folder, "comparison", _page(title, body), "\n\n".join(text) + "\n")
