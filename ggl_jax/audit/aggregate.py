"""Means and intervals over images, by defense and attack: what reports and checks are made of."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ggl_jax.audit.metrics import confidence_interval
from ggl_jax.types import NONFINITE, STATUS_MESSAGES

#: Axes that are averaged over or shown in columns of their own.
_OWN = ("defense", "seed", "image", "evaluations")


class Mean(NamedTuple):
    """A mean over images with its 95 % interval (Student's t); None where there is none."""

    mean: float
    low: float | None
    high: float | None


class Leakage(NamedTuple):
    """One defense under one attack.

    Seeds of one image are averaged first, so that images are the independent units.

    Attributes:
        defense: its specification.
        variant: the attack's values on the axes that vary, in words.
        num_images: how many images.
        num_rows: how many results, seeds counted one by one.
        psnr: dB on the [0, 1] scale.
        ssim: structural similarity.
        gain: PSNR above the stronger blind control (random samples' mean, mean image), dB.
        lpips: None where it was not measured for every row.
        mse_r: squared error of the representation.
        label: share of images whose label was read off right.
        control: PSNR of the stronger blind control.
        best: PSNR of the best random sample, picked by the truth.
        ceiling: PSNR of the prior's ceiling.
        nonfinite: searches that broke down.
        stalled: searches that made no progress.
        evaluations: gradient evaluations of a search.
        rows: the results.
    """

    defense: str
    variant: str
    num_images: int
    num_rows: int
    psnr: Mean
    ssim: Mean
    gain: Mean
    lpips: Mean | None
    mse_r: Mean
    label: float
    control: float
    best: float
    ceiling: float
    nonfinite: int
    stalled: int
    evaluations: int
    rows: list[dict[str, Any]]


def _number(value: float | None) -> float:
    # JSON has no infinity: None stands for the PSNR of identical images.
    return math.inf if value is None else float(value)


def gain_of(row: Mapping[str, Any]) -> float:
    """A row's PSNR above the stronger of its two blind controls, dB."""
    control = max(_number(row["psnr_mean_image"]), _number(row["psnr_control_mean"]))
    return _number(row["psnr"]) - control


def mean_over_images(
    rows: Iterable[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]
) -> Mean:
    """A mean over images, the rows of one image averaged first."""
    by_image: dict[str, list[float]] = {}
    for row in rows:
        by_image.setdefault(row["image"], []).append(value(row))
    means = [math.fsum(own) / len(own) for own in by_image.values()]
    low, high = confidence_interval(means)
    known = not math.isnan(low)
    return Mean(math.fsum(means) / len(means), low if known else None, high if known else None)


def variant_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the axes, besides defense, image and seed, on which the rows differ."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for name, value in _axes(row).items():
            values.setdefault(name, set()).add(str(value))
    return [name for name, seen in values.items() if len(seen) > 1 and name not in _OWN]


def _axes(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return row.get("axes") or {"attack": row["attack"], "optimizer": row["optimizer"]}


def variant_of(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """A row's attack in words."""
    if not names:
        return f"{row['attack']} by {row['optimizer']}"
    plain = ("attack", "optimizer")
    return ", ".join(
        str(_axes(row).get(name, "-")) if name in plain else f"{name} {_axes(row).get(name, '-')}"
        for name in names
    )


def leakage(rows: Sequence[dict[str, Any]]) -> list[Leakage]:
    """One :class:`Leakage` for each defense and attack, in the order of the rows."""
    names = variant_names(rows)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["defense"], variant_of(row, names)), []).append(row)
    found = []
    for (defense, variant), part in groups.items():

        def mean(name, part=part):
            return mean_over_images(part, lambda one: _number(one[name]))

        measured = all(row.get("lpips") is not None for row in part)
        status = [row["status"] for row in part]
        nonfinite = status.count(STATUS_MESSAGES[NONFINITE])
        found.append(
            Leakage(
                defense=defense,
                variant=variant,
                num_images=len({row["image"] for row in part}),
                num_rows=len(part),
                psnr=mean("psnr"),
                ssim=mean("ssim"),
                gain=mean_over_images(part, gain_of),
                lpips=mean("lpips") if measured else None,
                mse_r=mean("mse_r"),
                label=float(np.mean([r["label_accuracy"] for r in part])),
                control=mean_over_images(
                    part,
                    lambda r: max(_number(r["psnr_mean_image"]), _number(r["psnr_control_mean"])),
                ).mean,
                best=mean("psnr_control_best").mean,
                ceiling=mean("psnr_ceiling").mean,
                nonfinite=nonfinite,
                stalled=sum(not row["ok"] for row in part) - nonfinite,
                evaluations=part[0]["evaluations"],
                rows=part,
            )
        )
    return found


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
