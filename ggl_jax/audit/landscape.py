"""The landscape around a result: matching loss beside perceptual distance on a plane of latents.

The paper's Figure 9. Where the two agree, a search that lowers the loss comes nearer to the private
image; where they do not, no budget helps.
"""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from ggl_jax import files
from ggl_jax.adversary.attacks import members
from ggl_jax.adversary.reconstruct import Reconstruction
from ggl_jax.audit import metrics
from ggl_jax.audit.cells import Cells, Inputs
from ggl_jax.audit.figures import plain
from ggl_jax.audit.judge import jsonable
from ggl_jax.audit.run import exchange
from ggl_jax.errors import GGLError
from ggl_jax.priors.decoding import decode_each
from ggl_jax.spec import AtLeast, Client, Positive, Search, check, replace
from ggl_jax.types import Defense, Prior

#: Points in each direction.
Resolution = Annotated[int, AtLeast(2)]


class Landscape(NamedTuple):
    """Values on a square grid; row i, column j belong to offsets ``v[i]``, ``u[j]``.

    Attributes:
        offsets: [r], coordinates of the grid in both directions, in units of the centre's norm.
        losses: [r r], distance of updates as the search measured it, without regularisers.
        distances: [r r], perceptual distance to the private image.
        measure: what ``distances`` are: "LPIPS (vgg)", or "1 - SSIM" without LPIPS weights.
        note: why LPIPS was not measured, and the remedy; empty where it was.
        correlation: Spearman's rank correlation of the two, in [-1, 1]; NaN where one of them is
            constant or not finite.
    """

    offsets: np.ndarray
    losses: np.ndarray
    distances: np.ndarray
    measure: str
    note: str
    correlation: float

    def summary(self) -> dict[str, Any]:
        """All of it as JSON's types; NaN and infinities as None."""
        return jsonable(self._asdict())


def find_center(
    inputs: Inputs,
    *,
    defense: Defense | str = "none",
    search: Search | None = None,
    seed: int = 0,
    progress=None,
) -> Reconstruction:
    """Share and reconstruct as :func:`ggl_jax.audit` does, for one image: a landscape's middle.

    With the same seed, search and instance id the result is that audit's.

    Args:
        inputs: as of an audit; the first image is taken.
        defense: what the client does.
        search: how to search; over latents, and pixels are not refined, since they have none.
        seed: of everything random.
        progress: as for :func:`ggl_jax.reconstruct`.

    Raises:
        GGLError: an attack on pixels, or unusable input.
    """
    search = replace(search or Search(), refine="none")
    if search.space != "latents" or members(search):
        raise GGLError(
            f"attack: got {search.attack!r}, allowed: those on latents, such as ggl; attacks on "
            "pixels have no latents"
        )
    maker = Cells(inputs, told_apart=False)
    cell = maker.make({}, search, Client(), maker.defense(defense), seed, (0,))
    ((_, found),) = exchange(inputs.public(seed), [cell], progress=progress)
    return found


def plane(point: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two random orthogonal directions [z], each as long as the point is from the origin.

    Random directions of N(0, I), orthogonalised by Gram and Schmidt. The scale makes planes around
    different results comparable. (Filter-wise normalisation is for the weights of networks; a
    latent has no filters.)

    Args:
        point: [z], z >= 2. At the origin the directions get the norm sqrt(z), that of a usual
            sample of N(0, I).
        key: typed key.
    """
    if point.shape[0] < 2:
        raise GGLError(f"landscape: a plane needs at least 2 latent entries, got {len(point)}")
    drawn = jax.random.normal(key, (2, len(point)))
    first = drawn[0] / jnp.linalg.norm(drawn[0])
    second = drawn[1] - jnp.vdot(drawn[1], first) * first
    second = second / jnp.linalg.norm(second)
    length = jnp.linalg.norm(point)
    length = jnp.where(length > 0, length, jnp.sqrt(len(point) * 1.0))
    return length * first, length * second


def landscape(
    center: Reconstruction,
    original: np.ndarray,
    key: jax.Array,
    *,
    prior: Prior,
    resolution: int = 21,
    span: float = 1.0,
    lpips: str = "vgg",
) -> Landscape:
    """Matching loss and perceptual distance on a plane of latents through a result.

    Audit side: it takes the private image, for the perceptual distance alone.

    Args:
        center: from :func:`find_center`; the grid's middle, if ``resolution`` is odd.
        original: the private image [h w c] in [0, 1].
        key: typed key of the plane, see :func:`plane`.
        prior: the generator.
        resolution: points in each direction, at least 2.
        span: the grid reaches from -span to span centre norms, above 0.
        lpips: backbone; without its weights SSIM serves.

    Raises:
        GGLError: a setting out of its range.

    Reference:
        Paper, Figure 9.
    """
    check("resolution", resolution, Resolution)
    check("span", span, Positive)
    measured = metrics.perceptual(lpips, prior.image_shape)
    measure = "1 - SSIM" if measured.distance is None else f"LPIPS ({lpips})"
    private = jnp.asarray(original, jnp.float32)

    losses_of = jax.jit(center.attack.distances)

    def values(images):
        losses = losses_of(center.problem, images[:, None], center.problem.labels)
        images = jnp.clip(images, 0.0, 1.0)
        if measured.distance is None:
            return losses, 1.0 - metrics.ssim(images, private)
        return losses, measured.distance(images, private)

    first, second = plane(center.point, key)
    offsets = np.linspace(-span, span, resolution, dtype=np.float32)
    v, u = (x.reshape(-1, 1) for x in np.meshgrid(offsets, offsets, indexing="ij"))
    points = center.point + u * first + v * second
    latents = jnp.tanh(points) if center.search.get("bound") == "tanh" else points
    problem = center.problem
    found = decode_each(prior, problem.prior_params, latents, problem.labels[0], values)
    losses, distances = (
        np.concatenate(x).reshape(resolution, resolution) for x in zip(*found, strict=True)
    )
    usable = all(np.isfinite(x).all() and np.ptp(x) > 0 for x in (losses, distances))
    correlation = (
        float(stats.spearmanr(losses.ravel(), distances.ravel()).statistic) if usable else np.nan
    )
    return Landscape(offsets, losses, distances, measure, measured.note, correlation)


def draw(found: Landscape, path: Path, *, title: str = "") -> None:
    """Write both contour plots side by side as a PNG; a cross marks the result, a dot the minimum.

    Args:
        found: from :func:`landscape`.
        path: where to.
        title: one line above them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.0), layout="constrained")
    if title:
        figure.suptitle(plain(title), fontsize=9)
    panels = (("matching loss", found.losses), (found.measure, found.distances))
    for axis, (name, values) in zip(figure.subplots(1, 2), panels, strict=True):
        shown = np.ma.masked_invalid(values)
        if shown.count() and np.ptp(shown.compressed()) > 0:
            drawn = axis.contourf(found.offsets, found.offsets, shown, levels=20, cmap="viridis")
            figure.colorbar(drawn, ax=axis, shrink=0.85)
            row, column = np.unravel_index(np.ma.argmin(shown), shown.shape)
            axis.plot(found.offsets[column], found.offsets[row], "o", color="white", ms=4)
        axis.plot(0, 0, "x", color="red", ms=7)
        axis.set_title(name, fontsize=9)
        axis.set_aspect("equal")
        axis.set_xlabel("first direction (norms of the result)", fontsize=8)
        axis.set_ylabel("second direction", fontsize=8)
    files.write_figure(path, figure)
