"""Turns result rows into a table, plain words and ``summary.md``."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.table import Table

from ggl_jax.audit.metrics import confidence_interval

#: A reconstruction counts as leaking beyond the prior when it is nearer to the private image than
#: the stronger blind guess by more than this, dB. Below it the two cannot be told apart by eye.
MARGIN = 1.0


class DefenseSummary(NamedTuple):
    """Means over images of one defense.

    ``lpips`` is None where it was not measured for every image, and ``lpips_note`` says why.
    ``gain`` is PSNR minus the stronger blind control of the same image, dB; ``interval`` its 95 %
    confidence interval over images (None for a single image).
    """

    defense: str
    num_images: int
    label_accuracy: float
    psnr: float
    ssim: float
    mse_r: float
    lpips: float | None
    lpips_backbone: str
    lpips_note: str
    control: float
    best_of_n: float
    mean_image: float
    ceiling: float
    gain: float
    interval: tuple[float, float] | None
    estimated: str
    identified: str
    evaluations: int
    failed: int


def _psnr(value: float | None) -> float:
    # JSON has no infinity: None stands for identical images.
    return math.inf if value is None else value


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _parameters(true: dict[str, float], estimated: dict[str, float]) -> str:
    """What the defense used, and what the adversary found, for the parameters that both know."""
    both = [k for k in true if k in estimated]
    return "; ".join(f"{k} {true[k]:.4g} → {estimated[k]:.4g}" for k in both) or "–"


def _identified(rows: Sequence[dict[str, Any]]) -> str:
    """How often the private image is the nearest of all suspects, by pixels / by features."""
    known = [row for row in rows if "suspects" in row]
    if not known:
        return "–"
    shares = [
        statistics.fmean(row[name] == 1 for row in known)
        for name in ("rank_pixels", "rank_features")
    ]
    return " / ".join(f"{100 * share:.0f} %" for share in shares)


def summarize(rows: Sequence[dict[str, Any]]) -> list[DefenseSummary]:
    """One summary for each defense, in the order of the rows."""
    summaries = []
    for defense in dict.fromkeys(row["defense"] for row in rows):
        part = [row for row in rows if row["defense"] == defense]

        def mean(name, part=part):
            return statistics.fmean(_psnr(row[name]) for row in part)

        gains = [
            _psnr(row["psnr"]) - max(row["psnr_mean_image"], row["psnr_control_mean"])
            for row in part
        ]
        summaries.append(
            DefenseSummary(
                defense=defense,
                num_images=len(part),
                label_accuracy=statistics.fmean(row["label_accuracy"] for row in part),
                psnr=mean("psnr"),
                ssim=mean("ssim"),
                mse_r=mean("mse_r"),
                lpips=_mean_or_none([row.get("lpips") for row in part]),
                lpips_backbone=part[0].get("lpips_backbone", ""),
                lpips_note=next((row["lpips_note"] for row in part if row.get("lpips_note")), ""),
                control=mean("psnr_control_mean"),
                best_of_n=mean("psnr_control_best"),
                mean_image=mean("psnr_mean_image"),
                ceiling=mean("psnr_ceiling"),
                gain=statistics.fmean(gains),
                interval=confidence_interval(gains) if len(gains) > 1 else None,
                estimated=_parameters(part[0]["defense_true"], part[0]["defense_estimated"]),
                identified=_identified(part),
                evaluations=part[0]["evaluations"],
                failed=sum(not row["ok"] for row in part),
            )
        )
    return summaries


def _interval(summary: DefenseSummary) -> str:
    if summary.interval is None:
        return f"{summary.gain:+.1f}"
    low, high = summary.interval
    return f"{summary.gain:+.1f} [{low:+.1f}, {high:+.1f}]"


#: Narrow enough for an 80-column terminal.
COLUMNS = (
    ("Defense", lambda s: s.defense),
    ("PSNR", lambda s: f"{s.psnr:.1f}"),
    ("Random", lambda s: f"{s.control:.1f}"),
    ("Best", lambda s: f"{s.best_of_n:.1f}"),
    ("Mean", lambda s: f"{s.mean_image:.1f}"),
    ("Ceiling", lambda s: f"{s.ceiling:.1f}"),
    ("Gain", _interval),
    ("SSIM", lambda s: f"{s.ssim:.2f}"),
    ("LPIPS", lambda s: "–" if s.lpips is None else f"{s.lpips:.3f}"),
)

#: What a file has room for besides.
MORE_COLUMNS = (
    ("MSE-R", lambda s: f"{s.mse_r:.4f}"),
    ("Label", lambda s: f"{100 * s.label_accuracy:.0f} %"),
    ("Parameters: true → estimated", lambda s: s.estimated),
    ("Identified: pixels / features", lambda s: s.identified),
    ("Evaluations", lambda s: f"{s.evaluations:,}"),
)

LEGEND = (
    "PSNR: dB on the [0, 1] scale, higher is nearer to the private image. Random: a random sample "
    "of the prior, on average. Best: the best of many, chosen with the private image in hand. "
    "Mean: the prior's mean image, the best blind guess. Ceiling: the nearest image that the prior "
    "can make. Gain: PSNR above the stronger of Random and Mean, with a 95 % interval over images. "
    "Identified: how often the private image is nearer to its reconstruction than every other "
    "suspect is, by pixels / by the model's features. "
    "LPIPS: perceptual distance, lower is nearer."
)


def terminal_tables(summaries: Sequence[DefenseSummary]) -> list[Table]:
    """The summary as rich tables: scores, and what the adversary found out about the defenses."""
    scores = Table(
        title="What the shared update leaked (PSNR in dB)", title_justify="left", pad_edge=False
    )
    for heading, _ in COLUMNS:
        # A name that is too long is folded: cut short, it could be another defense's.
        left = heading == "Defense"
        scores.add_column(heading, justify="left" if left else "right", overflow="fold")
    for summary in summaries:
        scores.add_row(*(cell(summary) for _, cell in COLUMNS))
    known = Table(title="What the server read off the update", title_justify="left")
    for heading in ("Defense", "Label right", "Identified", "Parameters: true → estimated"):
        known.add_column(heading)
    for summary in summaries:
        known.add_row(
            summary.defense,
            f"{100 * summary.label_accuracy:.0f} %",
            summary.identified,
            summary.estimated,
        )
    return [scores, known]


def markdown_table(summaries: Sequence[DefenseSummary]) -> str:
    """The summary as a Markdown table."""
    columns = COLUMNS + MORE_COLUMNS
    lines = ["| " + " | ".join(heading for heading, _ in columns) + " |"]
    lines.append("|" + "---|" * len(columns))
    for summary in summaries:
        lines.append("| " + " | ".join(cell(summary) for _, cell in columns) + " |")
    return "\n".join(lines)


def in_words(summaries: Sequence[DefenseSummary]) -> list[str]:
    """Two to four sentences that say what leaked, for readers who never saw the paper."""
    num = summaries[0].num_images
    leaking: list[DefenseSummary] = []
    silent: list[DefenseSummary] = []
    for s in summaries:
        certain = s.gain > MARGIN and (s.interval is None or not s.interval[0] <= 0)
        (leaking if certain else silent).append(s)
    scope = "this image" if num == 1 else f"these {num} images"
    control = max(summaries[0].mean_image, summaries[0].control)
    sentences = [
        f"Without any update, the best blind guess (no attack) is {control:.1f} dB from {scope}; "
        f"the prior could reach {summaries[0].ceiling:.1f} dB at most."
    ]
    if leaking:
        listed = ", ".join(f"{s.defense} ({s.psnr:.1f} dB, {s.gain:+.1f} dB)" for s in leaking)
        sentences.append(
            f"The attack got beyond the blind guess, so the image leaked, under {listed}."
        )
    if silent:
        listed = ", ".join(f"{s.defense} ({s.psnr:.1f} dB, {s.gain:+.1f} dB)" for s in silent)
        sentences.append(
            f"No leak of the image beyond the prior was shown under: {listed}. That is no proof of "
            "safety: a longer search or a better prior may find more."
        )
    labels = [s for s in summaries if s.label_accuracy == 1.0]
    if labels:
        which = (
            "every defense"
            if len(labels) == len(summaries)
            else ", ".join(s.defense for s in labels)
        )
        sentences.append(f"The class label was read off the update exactly under {which}.")
    if num == 1:
        sentences.append("One image gives no confidence interval; use --indices for more.")
    for note in dict.fromkeys(s.lpips_note for s in summaries if s.lpips_note):
        sentences.append(f"LPIPS ({summaries[0].lpips_backbone}) was not measured: {note}.")
    failed = [s.defense for s in summaries if s.failed]
    if failed:
        sentences.append(f"Searches that failed or stalled occurred under: {', '.join(failed)}.")
    return sentences


def markdown(summaries: Sequence[DefenseSummary], *, command: str, environment: str) -> str:
    """``summary.md``: the sentences, the table, and how to run it again."""
    return "\n".join(
        [
            "# What the shared update leaked",
            "",
            *in_words(summaries),
            "",
            markdown_table(summaries),
            "",
            LEGEND,
            "",
            f"`{command}`",
            "",
            environment,
            "",
        ]
    )
