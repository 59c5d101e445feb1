"""Whether defenses leak more than they may: for continuous integration."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ggl_jax.audit.folder import Records
from ggl_jax.audit.tables import Leakage, counted, grouped, leakage, scores
from ggl_jax.client import defenses as client_defenses
from ggl_jax.errors import GGLError, check_known, did_you_mean


class Finding(NamedTuple):
    """A defense against one bound.

    Attributes:
        group: the defense under the attack that got furthest.
        name: of the score that is bounded.
        bound: the furthest value allowed.
    """

    group: Leakage
    name: str
    bound: float

    @property
    def lower(self) -> bool:
        """Whether lower values are those of an image nearer to the private one."""
        return scores()[self.name].nearer == "lower"

    @property
    def worst(self) -> float:
        """The end of the 95 % interval nearest to the private image."""
        return self.group.means[self.name].end(low=self.lower)

    @property
    def violated(self) -> bool:
        """Whether "leaks no more than the bound" cannot be claimed. NaN cannot."""
        return not (self.worst >= self.bound if self.lower else self.worst <= self.bound)

    def sentence(self) -> str:
        """The finding in one line."""
        group, score = self.group, scores()[self.name]
        verb = "may leak more than" if self.violated else "leaks no more than"
        measure = "PSNR over control" if self.name == "gain" else score.heading
        measure += f", {score.unit}" if score.unit else ""
        return (
            f"{group.defense} {verb} {self.bound:g} ({measure}): "
            f"{'lower' if self.lower else 'upper'} end of the 95 % interval {self.worst:.3g}, by "
            f"{group.variant}, {counted(len(group.images), 'image')}"
        )


def check(
    records: Records, bounds: Mapping[str, float], *, defenses: Sequence[str] = ()
) -> list[Finding]:
    """Compare each defense with bounds on its leakage.

    What is compared is the end of the 95 % confidence interval (Student's t, two-sided) of the mean
    over images that is nearer to the private image, under the attack that got furthest: few images
    or a wide spread count against the defense. It bounds what these attacks found, not what a
    better one would.

    Args:
        records: of a finished sweep or audit.
        bounds: of scores, by their names in the results, such as ``{"lpips": 0.3}``: the nearest
            allowed to the private image (a smallest LPIPS, a largest PSNR). "gain" is the PSNR
            above the stronger blind control (the prior's mean image, or its random samples on
            average), dB.
        defenses: those to check, in any spelling; all if empty.

    Returns:
        One finding for each defense and bound.

    Raises:
        GGLError: no bound, or one out of its range; an unknown defense or score; a defense with
            cells that failed or are left, with searches that broke down, or with fewer than two
            images (no interval).
    """
    if not bounds:
        raise GGLError("check: no bound; give --max-psnr-over-control, --max-ssim or --bound")
    known = scores()
    for name, bound in bounds.items():
        if name not in known:
            hint = did_you_mean(name, known, after=" ")
            raise GGLError(f"bound: {name!r} is no score; {hint}allowed: {', '.join(known)}")
        low, high = known[name].limits
        if not (math.isfinite(bound) and low <= bound <= high):
            raise GGLError(
                f"bound: got {name}={bound}, allowed: finite numbers from {low:g} to {high:g}"
            )
    found = grouped(leakage(records.rows), lambda one: one.defense)
    planned = list(dict.fromkeys(canonical(str(c["defense"])) for c in records.cells.values()))
    if not planned:
        raise GGLError(f"check: {records.folder} holds no results yet")
    chosen = [canonical(defense) for defense in defenses] or planned
    for defense in chosen:
        check_known("defense", defense, planned)
        _check_whole(records, defense, found.get(defense, []))
        for name in bounds:
            if any(name not in one.means for one in found[defense]):
                raise GGLError(f"check: {name} was not measured for every image of {defense}")
    return [
        _furthest(name, bound, found[defense])
        for defense in chosen
        for name, bound in bounds.items()
    ]


def canonical(defense: str) -> str:
    """A defense's name as the rows have it, however it is spelled: ``"clip:4.0"`` is "clip:4".

    A name that is no specification, such as that of a :class:`Defense` object, stays as it is.
    """
    try:
        return client_defenses.parse(defense).name
    except GGLError:
        return defense


def _check_whole(records: Records, defense: str, found: Sequence[Leakage]) -> None:
    open_cells = [*records.failures, *records.left]
    missing = [c for c in open_cells if canonical(records.cells[c]["defense"]) == defense]
    if missing or not found:
        raise GGLError(
            f"check: {counted(len(missing), 'cell')} of {defense} failed or not run yet, so "
            "nothing can be claimed; finish the run first"
        )
    broken = sum(len(one.broken) for one in found)
    if broken:
        raise GGLError(
            f"check: {counted(broken, 'search')} under {defense} broke down (NaN), which says "
            "nothing about the defense; see the status column of the results"
        )
    if min(len(one.images) for one in found) < 2:
        raise GGLError(
            f"check: {defense} was audited on one image, which has no interval; use at least 2 "
            "(8 or more for a narrow one)"
        )


def _furthest(name: str, bound: float, found: Sequence[Leakage]) -> Finding:
    def furthest(one: Finding) -> float:
        return math.inf if math.isnan(one.worst) else -one.worst if one.lower else one.worst

    return max((Finding(group, name, bound) for group in found), key=furthest)
