"""How close a reconstruction is to the private image.

Every function is pure and can be jitted. Images are float32 [... h w c] in [0, 1]; the leading
dimensions are kept, so one image gives a scalar and a batch gives one score per image. NaN in an
image gives NaN. The paper computes its errors on [-1, 1] images with peak 1: `mse_i` and
`psnr_paper` are on that scale, everything else is on [0, 1].
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy import linalg, special

from ggl_jax import files
from ggl_jax.audit import weights
from ggl_jax.audit.lpips import get_backbone, lpips
from ggl_jax.types import Model, PyTree

_IMAGE_AXES = (-3, -2, -1)


def mse(reconstruction: jax.Array, original: jax.Array) -> jax.Array:
    """Mean squared error over pixels and channels, [0, 1] scale.

    Args:
        reconstruction: [... h w c] in [0, 1].
        original: [... h w c] in [0, 1].

    Returns:
        [...], in [0, 1]; 0 for identical images.
    """
    return jnp.mean((reconstruction - original) ** 2, axis=_IMAGE_AXES)


def psnr(reconstruction: jax.Array, original: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB, peak 1 on the [0, 1] scale: -10 log10(mse).

    Args:
        reconstruction: [... h w c] in [0, 1].
        original: [... h w c] in [0, 1].

    Returns:
        [...], at least 0 for images within [0, 1]; +inf for identical images, which results
        files show as null, since JSON has no infinity.

    >>> round(float(psnr(jnp.zeros((4, 4, 3)), jnp.full((4, 4, 3), 0.1))), 3)
    20.0
    """
    return -10.0 * jnp.log10(mse(reconstruction, original))


def mse_i(reconstruction: jax.Array, original: jax.Array) -> jax.Array:
    """The paper's MSE-I: mean squared error of the images on [-1, 1], four times `mse`.

    Args and returns as for `mse`, in [0, 4]. Reference: the paper, section 4.1.
    """
    return 4.0 * mse(reconstruction, original)


def psnr_paper(reconstruction: jax.Array, original: jax.Array) -> jax.Array:
    """The paper's PSNR: peak 1 on [-1, 1] images, so 6.02 dB below `psnr`.

    Args and returns as for `psnr`; negative for images further apart than a half of the range.
    """
    return -10.0 * jnp.log10(mse_i(reconstruction, original))


@jax.jit
def ssim(reconstruction: jax.Array, original: jax.Array) -> jax.Array:
    """Structural similarity with a Gaussian window of 11 pixels and sigma 1.5.

    Per channel, averaged over the channels and over the places where the whole window fits. The
    same as scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1, channel_axis=-1)`.

    Args:
        reconstruction: [... h w c] in [0, 1].
        original: [... h w c] in [0, 1].

    Returns:
        [...], in [-1, 1]; 1 for identical images. NaN where h or w is below 11: the window does
        not fit.

    Reference: Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment", 2004.
    """
    radius, sigma = 5, 1.5
    shape = jnp.broadcast_shapes(jnp.shape(reconstruction), jnp.shape(original))
    if min(shape[-3], shape[-2]) <= 2 * radius:
        return jnp.full(shape[:-3], jnp.nan)
    window = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    window /= window.sum()

    # The window at each place where it fits: [length - 2 * radius, length].
    bands = [linalg.convolution_matrix(window, n, "valid").astype(np.float32) for n in shape[-3:-1]]
    # The variances do not feel a shift; centring keeps their float32 subtraction accurate.
    x = jnp.broadcast_to(reconstruction, shape) - 0.5
    y = jnp.broadcast_to(original, shape) - 0.5
    # Matrix products at the highest precision: a convolution may run in TF32.
    mean_x, mean_y, square_x, square_y, product = jnp.einsum(
        "ph,qw,...hwc->...pqc",
        *bands,
        jnp.stack([x, y, x * x, y * y, x * y]),
        precision=jax.lax.Precision.HIGHEST,
    )
    var_x, var_y = square_x - mean_x**2, square_y - mean_y**2
    covariance = product - mean_x * mean_y
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return jnp.mean(luminance * structure, axis=_IMAGE_AXES)


@partial(jax.jit, static_argnums=0)
def _features(model: Model, variables: PyTree, images: jax.Array) -> jax.Array:
    return model.apply(variables, images)[1]


def mse_r(
    reconstruction: jax.Array, original: jax.Array, model: Model, variables: PyTree
) -> jax.Array:
    """The paper's MSE-R: mean squared error of the representations, the last layer's input.

    Args:
        reconstruction: [h w c] or [b h w c] in [0, 1].
        original: as `reconstruction`.
        model: the federated model.
        variables: its variables, those that the gradient was computed at.

    Returns:
        Scalar or [b], at least 0. With train-mode batch normalisation each batch is normalised by
        its own statistics, as the model does.

    Reference: the paper, section 4.1.
    """
    shape = jnp.shape(original)
    batched = (-1, *shape[-3:])
    ours = _features(model, variables, jnp.reshape(reconstruction, batched))
    theirs = _features(model, variables, jnp.reshape(original, batched))
    return jnp.mean((ours - theirs) ** 2, axis=-1).reshape(shape[:-3])


def label_accuracy(inferred: jax.Array, true: jax.Array) -> jax.Array:
    """Share of the true labels that were inferred, both taken as multisets.

    A batch's gradient does not tell the order of its images, so order does not count; repeated
    labels count as often as they occur.

    Args:
        inferred: int [b] (or a scalar).
        true: int [b] (or a scalar).

    Returns:
        Scalar in [0, 1]. NaN for no true labels.
    """
    inferred, true = jnp.atleast_1d(inferred), jnp.atleast_1d(true)
    # the k-th occurrence of a label is found if the label was inferred at least k times
    earlier = jnp.sum(jnp.tril(true[:, None] == true, k=-1), axis=1)
    times = jnp.sum(true[:, None] == inferred, axis=1)
    return jnp.mean((earlier < times).astype(jnp.float32))


def identification_ranks(
    reconstruction: jax.Array,
    original: jax.Array,
    others: jax.Array,
    model: Model,
    variables: PyTree,
) -> dict[str, int]:
    """Where the private image ranks among others by its distance to the reconstruction.

    1: of all of them, the private image is the nearest, so a server that has a list of suspects
    knows which one it was. Without any leak the rank is as likely to be any.

    Args:
        reconstruction: [h w c] in [0, 1].
        original: [h w c] in [0, 1].
        others: [m h w c], images of other people, m >= 1.
        model: the federated model.
        variables: its variables.

    Returns:
        ``rank_pixels`` (by mean squared error) and ``rank_features`` (by MSE-R), each from 1 to
        m + 1. Equal distances count against the attack, as does NaN. Each image is seen alone,
        whatever a model in training mode would make of a batch.
    """
    suspects = jnp.concatenate([original[None], others])
    same = jnp.broadcast_to(reconstruction, suspects.shape)
    distances = {
        "rank_pixels": mse(same, suspects),
        "rank_features": jax.vmap(lambda x, y: mse_r(x, y, model, variables))(same, suspects),
    }
    return {name: 1 + int(jnp.sum(~(d[1:] > d[0]))) for name, d in distances.items()}


# --- registry ---------------------------------------------------------------------------------


class Metric(NamedTuple):
    """A score, and how reports show it; a plain function in METRICS is shown by its name.

    Attributes:
        function: ``(reconstruction[... h w c], original[... h w c], model, variables) ->
            scores[...]``.
        legend: what it is, for readers of a report.
        heading: of its column; "" for its name in METRICS.
        unit: "dB", "%" or "".
        form: how a value is written, as in an f-string.
        nearer: "higher" or "lower", the values of an image that is nearer to the private one.
        limits: of its values; intervals are cut there.
        shown: whether reports show it; False for one that another implies.
    """

    function: Callable[..., Any]
    legend: str = ""
    heading: str = ""
    unit: str = ""
    form: str = ".3f"
    nearer: Literal["higher", "lower"] = "higher"
    limits: tuple[float, float] = (-math.inf, math.inf)
    shown: bool = True

    def __call__(self, reconstruction, original, model: Model, variables: PyTree):
        return self.function(reconstruction, original, model, variables)


_TOLD = {row.pop("name"): row for row in files.read_csv(Path(__file__).parent / "scores.csv")}
#: Scores that are read off a column of the results, that column, and their unit.
COLUMNS = [(name, at, row["unit"]) for name, row in _TOLD.items() if (at := row.pop("column"))]


def described(functions: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """A :class:`Metric` of each function, with what ``scores.csv`` says under its name."""
    found = {}
    for name, function in functions.items():
        row: dict[str, Any] = dict(_TOLD[name])
        low, high = map(float, row["limits"].split())
        row |= {"limits": (low, high), "shown": row["shown"] == "yes"}
        found[name] = Metric(function, **row)
    return found


def _of_pixels(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda x, y, model, variables: function(x, y)


#: A new metric is one function and one line here (without one in ``scores.csv``, a
#: :class:`Metric`); its name is its column in the results.
METRICS: dict[str, Metric | Callable[..., Any]] = described(
    {
        "psnr": _of_pixels(psnr),
        "ssim": _of_pixels(ssim),
        "mse_i": _of_pixels(mse_i),
        "mse_r": mse_r,
        "mse": _of_pixels(mse),
        "psnr_paper": _of_pixels(psnr_paper),
    }
)
_SHIPPED = dict(METRICS)


def own_metrics() -> dict[str, Metric | Callable[..., Any]]:
    """Those that the user put into `METRICS`."""
    return {name: one for name, one in METRICS.items() if _SHIPPED.get(name) is not one}


class Perceptual(NamedTuple):
    """LPIPS as this machine can measure it; see `perceptual`.

    Attributes:
        backbone: "vgg", "alex" or "squeeze".
        distance: (reconstruction[... h w 3], original[... h w 3]) -> LPIPS [...]; None where it
            cannot be measured.
        note: why it cannot be measured, and the remedy; empty where it can.
    """

    backbone: str
    distance: Callable[[jax.Array, jax.Array], jax.Array] | None
    note: str

    def row(
        self, reconstruction: ArrayLike, original: ArrayLike, controls: Mapping[str, ArrayLike]
    ) -> dict[str, float | str | None]:
        """The entries of a result row; `lpips` and those of the controls None if not measured.

        Args:
            reconstruction: [h w c] in [0, 1].
            original: as `reconstruction`.
            controls: images of what could be had without an update; `lpips_<name>` is their score.
        """
        images = {"lpips": reconstruction}
        images |= {f"lpips_{name}": image for name, image in controls.items()}
        scores: dict[str, float | None] = dict.fromkeys(images)
        if self.distance is not None:
            stacked = jnp.stack([jnp.asarray(image) for image in images.values()])
            found = np.asarray(self.distance(stacked, jnp.asarray(original))).tolist()
            scores = dict(zip(images, found, strict=True))
        return {**scores, "lpips_backbone": self.backbone, "lpips_note": self.note}


def perceptual(backbone: str, image_shape: Sequence[int]) -> Perceptual:
    """LPIPS with the weights installed on this machine. Audit side only, and only a score.

    Not in `METRICS`, since its weights do not ship with the project: an audit without them goes on,
    and says what is missing.

    Args:
        backbone: "vgg" (the paper's), "alex" or "squeeze".
        image_shape: (h, w, c) of the images to compare.

    Raises:
        GGLError: an unknown backbone, or installed weights that are damaged.
    """
    smallest = get_backbone(backbone).smallest
    if min(image_shape[:2]) < smallest:
        note = f"lpips-{backbone} takes images of at least {smallest} x {smallest} pixels"
        return Perceptual(backbone, None, note)
    params = weights.load_lpips(backbone)
    if params is None:
        note = f"its weights are not installed: ggl-jax weights lpips-{backbone}"
        return Perceptual(backbone, None, note)
    return Perceptual(backbone, partial(lpips, params, backbone=backbone), "")


# --- summaries --------------------------------------------------------------------------------


def confidence_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's t interval of 95 % for the mean of independent values.

    Args:
        values: one per image, e.g. the PSNR above a control.

    Returns:
        `(low, high)`. Both NaN where there is no interval: fewer than two values, or NaN or an
        infinity among them. Equal values give an interval of no width.
    """
    numbers = np.asarray(values, np.float64).ravel()
    if len(numbers) < 2 or not np.all(np.isfinite(numbers)):
        return math.nan, math.nan
    mean = float(np.mean(numbers))
    error = float(np.std(numbers, ddof=1)) / math.sqrt(len(numbers))
    reach = float(special.stdtrit(len(numbers) - 1, 0.975)) * error
    return mean - reach, mean + reach
