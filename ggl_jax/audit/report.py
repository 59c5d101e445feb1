"""A sweep's or audit's report: one Markdown text, of which page, file and terminal are views."""

import base64
import datetime
import html
import json
import math
import shlex
import string
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from rich.markdown import Markdown, TableElement
from rich.table import Table

from ggl_jax import files
from ggl_jax.audit import figures, leaderboard, maps, tables, threat, utility
from ggl_jax.audit.controls import read_controls
from ggl_jax.audit.folder import Records, in_words
from ggl_jax.audit.metrics import METRICS
from ggl_jax.audit.tables import WORDS, Column, Leakage, Mean, escape, mean_text, score_text
from ggl_jax.errors import GGLError

#: So much a report shows before it says that there is more in the folder.
MAX_IMAGES, MAX_PICTURES, MAX_PANELS, MAX_FAILURES = 8, 24, 12, 50

#: Sections that a terminal shows; the file and the page have all.
ON_SCREEN = (
    "",
    "What leaked",
    "Other scores",
    "What the server read off the update",
    "What no attack can pass",
    "Privacy and utility",
)


class Report(NamedTuple):
    """A report before it is written.

    Attributes:
        title: in plain words.
        sections: heading -> its paragraphs (Markdown), "" for those below the title.
        pictures: path below the report's folder -> SVG file.
    """

    title: str
    sections: dict[str, list[str]]
    pictures: dict[str, bytes]

    def text(self, *headings: str) -> str:
        """The Markdown text, of these sections or all."""
        parts = [f"# {escape(self.title)}"]
        for heading, paragraphs in self.sections.items():
            if headings and heading not in headings:
                continue
            parts += [f"## {heading}"] if heading else []
            parts += paragraphs
        return "\n\n".join(parts) + "\n"

    def draw(self, name: str, figure: Figure, description: str) -> str:
        """Add a figure; the Markdown that shows it."""
        path = f"figures/{name}.svg"
        self.pictures[path] = figures.svg(figure, name)
        return f"![{escape(description)}]({path})"


# --- views --------------------------------------------------------------------------------------

_PAGE = string.Template((Path(__file__).parent / "page.html").read_text("utf-8"))


def page(report: Report) -> str:
    """The report as one HTML page that needs no other file; HTML in its text is shown as text."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    rules: dict[str, Callable[..., str]] = {
        "table_open": lambda *_: '<div class="scroll" tabindex="0" role="region"><table>\n',
        "table_close": lambda *_: "</table></div>\n",
        "fence": lambda tokens, index, *_: (
            f"<details><summary>{html.escape(tokens[index].info)}</summary>"
            f"<pre>{html.escape(tokens[index].content)}</pre></details>\n"
        ),
    }
    renderer: Any = markdown.renderer
    renderer.rules |= rules
    tokens = markdown.parse(report.text())
    for token in tokens:
        for child in token.children or []:
            if child.type == "image":
                content = base64.b64encode(report.pictures[str(child.attrs["src"])]).decode()
                child.attrs["src"] = f"data:image/svg+xml;base64,{content}"
    body = renderer.render(tokens, markdown.options, {})
    return _PAGE.substitute(title=html.escape(report.title), body=body)


class _Table(TableElement):
    """rich's, but long names are folded: cut short, one could be another defense's."""

    def __rich_console__(self, console, options):
        for shown in super().__rich_console__(console, options):
            if isinstance(shown, Table):
                for column in shown.columns:
                    column.overflow = "fold"
            yield shown


class Terminal(Markdown):
    """Markdown as a terminal shows it."""

    elements: ClassVar = Markdown.elements | {"table_open": _Table}


def terminal(report: Report) -> Terminal:
    """What a terminal shows of the report: its words and tables, without its pictures."""
    lines = report.text(*ON_SCREEN).splitlines()
    return Terminal("\n".join(line for line in lines if not line.startswith("![")))


def write(report: Report, folder: Path, name: str = "report") -> Path:
    """Write the page, the Markdown text and its figures to a folder; the page's path.

    Raises:
        StorageError: the disk is full or not writable.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for path, content in report.pictures.items():
        files.write_bytes(folder / path, content)
    files.write_text(folder / f"{name}.md", report.text())
    files.write_text(folder / f"{name}.html", page(report))
    return folder / f"{name}.html"


# --- one run ------------------------------------------------------------------------------------


def make(records: Records) -> Report:
    """The report of a sweep or an audit, of what is finished.

    Args:
        records: of :func:`ggl_jax.audit.folder.read`.

    Raises:
        GGLError: there are no results yet.
    """
    if not records.rows:
        raise GGLError(f"report: {records.folder} holds no finished cell yet")
    groups = tables.leakage(records.rows)
    report = Report(f"Privacy audit: {records.folder.resolve().name}", {}, {})
    add = report.sections
    told = [_progress(records), *tables.sentences(groups), *map(escape, tables.won(groups))]
    played = records.config.get("threat_model", ())
    told += [escape(threat.declared(played))] if played else []
    add[""] = ["\n".join(f"- {line}" for line in told)]
    add["What leaked"] = _leaks(report, groups)
    drawn = maps.maps(records.rows)
    if drawn:
        add["The map"] = _map(report, drawn)
    # No intervals of errors, so that 80 columns suffice.
    others = {"ssim": True, "lpips": True}
    others |= {
        name: name not in ("mse_i", "mse_r")
        for name, score in tables.scores().items()
        if name in METRICS and name != "psnr" and score.shown
    }
    if any(name in group.means for name in others for group in groups):
        add["Other scores"] = [tables.score_table(groups, others)]
    read_off = dict.fromkeys(("label", "identified_pixels", "identified_features"), False)
    add["What the server read off the update"] = [tables.score_table(groups, read_off)]
    if not any("identified_pixels" in group.means for group in groups):
        add["What the server read off the update"].append(WORDS["no_suspects"])
    estimates = tables.parameters(records.rows)
    if estimates:
        add["What the server read off the update"].append(tables.table(_PARAMETERS, estimates))
    bounded = [group for group in groups if _BOUNDS.keys() & group.means.keys()]
    if bounded:
        add["What no attack can pass"] = _bounds(bounded)
    add |= _utility(report, records)
    add["Reconstructions"] = _pictures(report, records, groups)
    add["Searches"] = [tables.table(_SEARCHES, groups), *_loss_curves(report, groups)]
    if records.failures:
        shown = list(records.failures.items())[:MAX_FAILURES]
        add[f"Failed cells ({len(shown)} of {len(records.failures)})"] = [
            "\n".join(
                f"- {escape(in_words(records.cells[cell]))}: {escape(why)}" for cell, why in shown
            )
        ]
    command = " ".join(str(records.config.get("command", "from Python")).splitlines())
    add["Configuration and environment"] = [
        f"Written on {datetime.date.today().isoformat()}.",
        f"```command\n{command}\n```",
        f"```config.json\n{json.dumps(records.config, indent=2)}\n```",
    ]
    return report


def _progress(records: Records) -> str:
    images = len({row["image"] for row in records.rows})
    text = f"{tables.counted(len(records.finished), 'cell')} on {tables.counted(images, 'image')}."
    for cells, what in ((records.failures, "failed"), (records.left, "not run yet")):
        if cells:
            text += f" {tables.counted(len(cells), 'cell')} {what}."
    return text


def _leaks(report: Report, groups: Sequence[Leakage]) -> list[str]:
    shown = {"psnr": False, "control": False, "gain": True, "best": False, "ceiling": False}
    verdict = Column("Leak", lambda group: "**yes**" if group.leaked else "not shown", True)
    several = any(len(group.images) > 1 for group in groups)
    chosen = tables.strongest(groups)
    told = "; ".join(
        f"{group.defense} {score_text(group, 'psnr')}, blind guess {score_text(group, 'control')}"
        for group in chosen[:8]
    )
    images = [
        report.draw("overview", figures.by_defense(groups), f"PSNR in dB by defense: {told}"),
        *(
            report.draw(f"parameter-{number}", figure, f"PSNR by the parameter of {family}")
            for number, (family, figure) in enumerate(figures.by_parameter(groups).items())
        ),
    ]
    return [
        tables.score_table(groups, shown, verdict) + several * f" {WORDS['interval']}",
        "\n".join(images),
    ]


#: Columns of bounds, none with an interval.
_BOUNDS = dict.fromkeys((*tables.BOUNDED.values(), "bound_identified_any"), False)


def _bounds(groups: Sequence[Leakage]) -> list[str]:
    """What attacks did beside what none can do, and where they seem to have done it."""
    shown: dict[str, bool] = {}
    for name, bound in tables.BOUNDED.items():
        if any(bound in group.means for group in groups):
            shown |= {name: True, bound: False}
    text = [tables.score_table(groups, shown | _BOUNDS)]
    text += [
        WORDS["beyond_bound"].format(
            score=escape(tables.scores()[name].heading),
            defense=escape(tables.spoken(group.defense)),
        )
        for group in groups
        for name in tables.BOUNDED
        if tables.passed(group, name)
    ]
    return text


def _map(report: Report, drawn: Sequence[maps.Map]) -> list[str]:
    """Tables of all maps, and the figure of as many defenses as a report shows."""
    shown = drawn[:MAX_PANELS]
    names = ", ".join(tables.spoken(one.defense) for one in shown)
    what = f"Gain by model and client, a panel for each of: {names}; the tables have its numbers"
    figure = report.draw("map", figures.leak_maps(shown), what)
    return [figure, *map(maps.map_table, drawn), WORDS["map"]]


_PARAMETERS = (
    Column("Defense", lambda p: escape(p[0]), True),
    Column("Parameter", lambda p: escape(p[1]), True),
    Column("True", lambda p: f"{p[2]:.4g}"),
    Column("Estimated", lambda p: f"{p[3]:.4g}"),
    Column("Largest error", lambda p: f"{100 * p[4]:.2g} %"),
)

_SEARCHES = (
    Column("Defense", lambda group: escape(group.defense), True),
    Column("Attack", lambda group: escape(group.variant), True),
    Column("Images", lambda group: f"{len(group.images):,}"),
    Column("Gradient evaluations each", lambda group: f"{group.rows[0]['evaluations']:,}"),
    Column("Stalled", lambda group: f"{len(group.stalled):,}"),
    Column("Broke down", lambda group: f"{len(group.broken):,}"),
)


def _loss_curves(report: Report, groups: Sequence[Leakage]) -> list[str]:
    images = []
    for number, group in enumerate(tables.strongest(groups)[:MAX_PANELS]):
        figure = figures.losses([own for own in groups if own.defense == group.defense])
        if figure is not None:
            what = f"Lowest matching loss by step of the search: {group.defense}"
            images.append(report.draw(f"loss-{number}", figure, what))
    return ["\n".join(images)] if images else []


#: Names of :meth:`ggl_jax.audit.controls.Controls.pictures`, in words.
_GUESSES = {"mean_image": "mean image", "ceiling": "ceiling", "control_best": "best random"}


def _pictures(report: Report, records: Records, groups: Sequence[Leakage]) -> list[str]:
    """For each image: the private one, the controls, and the reconstructions."""
    shown = groups if len(groups) <= MAX_PICTURES else tables.strongest(groups)[:MAX_PICTURES]
    variants = len({group.variant for group in shown}) > 1
    names = list(dict.fromkeys(row["image"] for row in records.rows))
    images = []
    for number, name in enumerate(names[:MAX_IMAGES]):
        cells: list[tuple[np.ndarray, str]] = []
        # The first seed of each.
        rows = [(g, row) for g in shown for row in [r for r in g.rows if r["image"] == name][:1]]
        guessed = [row for _, row in rows if (records.folder / row.get("controls", "")).is_file()]
        for row in guessed[:1]:
            controls, original = read_controls(records.folder / row["controls"])
            cells = [(original, "private image")]
            for field, words in _GUESSES.items():
                cells.append((controls.pictures()[field], f"{words}\n{_db(row[f'psnr_{field}'])}"))
        told = []
        for group, row in rows:
            if not (records.folder / row["reconstruction"]).is_file():
                continue
            lines = [group.defense, group.variant] if variants else [group.defense]
            lines = [part for line in lines for part in textwrap.wrap(line, 18)]
            score = _db(tables.scores()["psnr"].function(row))
            told.append(f"{group.defense} {score}")
            cells.append((records.image(row), "\n".join([*lines, score])))
        if cells:
            figure = figures.grid(cells, title=f"{name}: private, controls, reconstructions")
            what = f"{name}: private image, controls, reconstructions: {'; '.join(told)}"
            images.append(report.draw(f"image-{number}", figure, what))
    more = []
    if len(names) > MAX_IMAGES or len(shown) < len(groups):
        more.append(
            f"The first {min(len(names), MAX_IMAGES)} of {tables.counted(len(names), 'image')}, "
            f"{len(shown)} of {len(groups)} defenses and attacks; the folder has all."
        )
    return [*more, "\n".join(images)] if images else ["No pictures were kept."]


def _db(value: float | None) -> str:
    return "exact" if value is None or math.isinf(value) else f"{tables.number_text(value)} dB"


# --- privacy and utility ------------------------------------------------------------------------


def _utility(report: Report, records: Records) -> dict[str, list[str]]:
    found = utility.read(records.folder)
    if found is None:
        folder = escape(shlex.quote(str(records.folder)))
        return {"Utility": [WORDS["no_utility"].format(folder=folder)]}
    points = leaderboard.points(found, tables.by_fit(records.rows))
    parts = [leaderboard.text(points, found)]
    majority, undefended = 100 * found.config["majority"], found.row_of("none")
    lines = {"majority class": majority}
    if undefended is not None and undefended["accuracy"] is not None:
        lines["undefended"] = 100 * undefended["accuracy"]
    drawn = [
        (
            p.label if p.row["epsilon"] is None else f"{p.label}\nε {utility.epsilon_text(p.row)}",
            p.leakage.means["gain"],
            utility.accuracy_of(p.row),
        )
        for p in points
        if p.row is not None and p.leakage is not None
    ]
    if drawn:
        told = "; ".join(
            f"{' '.join(name.split())}: {mean_text(gain, sign=True)} dB, "
            f"{'diverged' if accuracy is None else mean_text(accuracy) + ' %'}"
            for name, gain, accuracy in drawn[:12]
        )
        figure = figures.privacy_utility(drawn, lines)
        what = f"Test accuracy by leakage (gain): {told}; majority class: {majority:.1f} %"
        parts.append(report.draw("privacy-utility", figure, what))
    return {"Privacy and utility": parts}


# --- comparison ---------------------------------------------------------------------------------


def compare(a: Records, b: Records) -> list[tuple[str, str, int, Mean, Mean, Mean]]:
    """Defense, attack, common images, gain in A, gain in B, and B minus A, paired by image.

    Raises:
        GGLError: they are the same folder, or share no defense, attack and image.
    """
    if a.folder.resolve() == b.folder.resolve():
        raise GGLError(f"compare: {a.folder} was given twice; name two folders")
    names = tables.variant_names([*a.rows, *b.rows])
    gain = tables.scores()["gain"].function
    in_a, in_b = (
        {key: tables.by_image(own, gain) for key, own in tables.by_attack(one.rows, names).items()}
        for one in (a, b)
    )
    compared = []
    for key, first in in_a.items():
        second = in_b.get(key, {})
        pairs = [(first[image], other) for image, other in second.items() if image in first]
        if pairs:
            values = (*zip(*pairs, strict=True), [other - own for own, other in pairs])
            one, two, more = map(tables.mean_of, values)
            compared.append((*key, len(pairs), one, two, more))
    if not compared:
        raise GGLError(
            f"compare: {a.folder} and {b.folder} share no defense, attack and image; compare "
            "audits of the same data"
        )
    return compared


_COMPARED = (
    Column("Defense", lambda c: escape(c[0]), True),
    Column("Attack", lambda c: escape(c[1]), True),
    Column("Images", lambda c: str(c[2])),
    Column("Gain in A", lambda c: mean_text(c[3], sign=True)),
    Column("Gain in B", lambda c: mean_text(c[4], sign=True)),
    Column("B - A", lambda c: mean_text(c[5], sign=True)),
)


def comparison(a: Records, b: Records) -> Report:
    """The report of two runs, paired by image.

    Raises:
        GGLError: as :func:`compare`.
    """
    compared = compare(a, b)
    changed = files.differences(
        {k: a.config.get(k) for k in ("options", "inputs", "environment")},
        {k: b.config.get(k) for k in ("options", "inputs", "environment")},
    )
    listed = "\n".join(f"- {escape(line)}" for line in changed) or "Nothing."
    return Report(
        f"{a.folder.resolve().name} (A) and {b.folder.resolve().name} (B)",
        {
            "": [tables.table(_COMPARED, compared), WORDS["compared"]],
            "What differs in the configurations (A, then B)": [listed],
        },
        {},
    )
