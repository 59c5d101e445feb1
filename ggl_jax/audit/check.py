"""Whether defenses leak more than they may: for continuous integration."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ggl_jax.audit.aggregate import Leakage, Mean, leakage
from ggl_jax.audit.folder import Records
from ggl_jax.errors import GGLError


class Finding(NamedTuple):
    """A defense against one bound, under the attack that got furthest.

    Attributes:
        defense: its specification.
        measure: what is bounded, in words.
        bound: the largest value allowed.
        worst: the highest upper end of the 95 % interval among the attacks.
        attack: that attack.
        num_images: images behind it.
    """

    defense: str
    measure: str
    bound: float
    worst: float
    attack: str
    num_images: int

    @property
    def violated(self) -> bool:
        """Whether "leaks no more than the bound" cannot be claimed. NaN cannot."""
        return not self.worst <= self.bound

    def sentence(self) -> str:
        """The finding in one line."""
        verb = "may leak more than" if self.violated else "leaks no more than"
        return (
            f"{self.defense} {verb} {self.bound:g} ({self.measure}): upper end of the 95 % "
            f"interval {self.worst:.3g}, by {self.attack}, {self.num_images} images"
        )


def check(
    records: Records,
    *,
    max_psnr_over_control: float | None = None,
    max_ssim: float | None = None,
    defenses: Sequence[str] = (),
) -> list[Finding]:
    """Compare each defense with bounds on its leakage.

    What is compared is the upper end of the 95 % confidence interval (Student's t, two-sided) of
    the mean over images, under the attack that got furthest: few images or a wide spread count
    against the defense. It bounds what these attacks found, not what a better one would.

    Args:
        records: of a finished sweep or audit.
        max_psnr_over_control: dB above the stronger blind control (the prior's mean image, or its
            random samples on average).
        max_ssim: structural similarity, up to 1.
        defenses: those to check; all if empty.

    Returns:
        One finding for each defense and bound.

    Raises:
        GGLError: no bound; an unknown defense; a defense with cells that failed or are left, with
            searches that broke down, or with fewer than two images (no interval).
    """
    bounds = {
        "max_psnr_over_control": ("PSNR over control, dB", max_psnr_over_control, "gain"),
        "max_ssim": ("SSIM", max_ssim, "ssim"),
    }
    given = {name: bound for name, bound in bounds.items() if bound[1] is not None}
    if not given:
        raise GGLError("check: no bound; give --max-psnr-over-control or --max-ssim")
    for name, (_, bound, _) in given.items():
        if bound is None or math.isnan(bound):
            raise GGLError(f"{name}: got {bound}, allowed: a number")
    found: dict[str, list[Leakage]] = {}
    for one in leakage(records.rows):
        found.setdefault(one.defense, []).append(one)
    planned = list(dict.fromkeys(str(cell["defense"]) for cell in records.cells.values()))
    chosen = list(defenses) or planned
    if not chosen:
        raise GGLError(f"check: {records.folder} holds no results yet")
    for defense in chosen:
        if defense not in planned:
            raise GGLError(f"defense: got {defense!r}, allowed: {', '.join(planned)}")
        _check_whole(records, defense, found.get(defense, []))
    return [
        _finding(defense, measure, float(bound or 0.0), field, found[defense])
        for defense in chosen
        for measure, bound, field in given.values()
    ]


def _check_whole(records: Records, defense: str, found: Sequence[Leakage]) -> None:
    open_cells = [*records.failures, *records.left]
    missing = sum(records.cells[cell]["defense"] == defense for cell in open_cells)
    if missing or not found:
        raise GGLError(
            f"check: {max(missing, 1)} cells of {defense} failed or are not run yet, so nothing "
            "can be claimed; finish them first"
        )
    broken = sum(one.nonfinite for one in found)
    if broken:
        raise GGLError(
            f"check: {broken} searches under {defense} broke down (NaN), which says nothing about "
            "the defense; see the status column of the results"
        )
    fewest = min(one.num_images for one in found)
    if fewest < 2:
        raise GGLError(
            f"check: {defense} was audited on one image, which has no interval; use at least 2 "
            "(8 or more for a narrow one)"
        )


def _upper(mean: Mean) -> float:
    # Without a finite interval (an exact copy has an infinite PSNR) the mean itself is compared.
    return mean.mean if mean.high is None else mean.high


def _finding(defense, measure, bound, field, found: Sequence[Leakage]) -> Finding:
    uppers = [_upper(getattr(one, field)) for one in found]
    worst = max(range(len(found)), key=lambda i: math.inf if math.isnan(uppers[i]) else uppers[i])
    return Finding(
        defense, measure, bound, uppers[worst], found[worst].variant, found[worst].num_images
    )
