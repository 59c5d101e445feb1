"""The audit's own part of a cell: what the adversary found beside the truth and the controls."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ggl_jax.adversary import estimation
from ggl_jax.adversary.reconstruct import Reconstruction
from ggl_jax.audit import metrics
from ggl_jax.audit.controls import Controls
from ggl_jax.client import defenses as client_defenses
from ggl_jax.images import assign
from ggl_jax.types import OK, STATUS_MESSAGES, Public

#: What a row tells of the search as it was carried out.
_SEARCHED = ("adaptive", "optimizer", "combined", "refined", "refinement_steps", "fitted")


def jsonable(value: Any) -> Any:
    """Values for JSON; infinities and NaN become None, since JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {k: jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, (np.ndarray, jax.Array)):
        return jsonable(np.asarray(value).tolist())
    if isinstance(value, (np.floating, np.integer, np.bool_)):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def in_order(found: Reconstruction, images: ArrayLike) -> Reconstruction:
    """The result with its images, and their labels, in the order of the private ones [b h w c].

    Only the audit may do this: an update does not tell the order of a batch's images.
    """
    order = assign(jnp.asarray(found.images), jnp.asarray(images))
    return found._replace(images=found.images[order], labels=found.labels[order])


def searched(found: Reconstruction) -> dict[str, Any]:
    """What the server itself knows of its search, see :func:`jsonable`."""
    known = {
        "defense_estimated": client_defenses.summary(found.estimated),
        **{name: found.search[name] for name in _SEARCHED},
        # of the regression before the search, from the bank alone; None where there was none
        "predicted_rmse": found.search.get("predicted_rmse"),
        "evaluations": found.evaluations,
        "search_seconds": found.seconds,
        "status": STATUS_MESSAGES[found.status],
        "ok": found.status == OK,
        # of the best restart, where the result is the mean image of all
        "loss": found.loss,
        "distance": found.distance,
        "loss_curve": _curve(found.history),
    }
    # of attack strongest: which attack's result it is, and how far each one's update was off
    several = [name for name in ("won", "mismatches") if name in found.search]
    return known | {name: found.search[name] for name in several}


def judge(
    found: Reconstruction,
    images: ArrayLike,
    labels: ArrayLike,
    *,
    public: Public,
    controls: Sequence[Controls] = (),
    record: Mapping[str, Any] | tuple | None = None,
    others: np.ndarray | None = None,
    perceptual: metrics.Perceptual | None = None,
) -> list[dict[str, Any]]:
    """What an attack found, beside the truth: a row of values of JSON for each private image.

    Args:
        found: of :func:`ggl_jax.reconstruct`.
        images: [b h w c] the private images, float32 in [0, 1].
        labels: [b] their classes.
        public: the model and its weights, for the distance of representations.
        controls: of each image, in the images' order; none leaves them out.
        record: of :func:`ggl_jax.share`, to tell how far the defense was found out; None leaves it
            out.
        others: [m h w c] images of other people, among whom the private one is to be told by its
            reconstruction (:func:`ggl_jax.audit.metrics.identification_ranks`); None for no test.
        perceptual: of :func:`ggl_jax.audit.metrics.perceptual`; None leaves LPIPS out.

    Returns:
        Rows in the order of ``images``, whatever the order of the reconstructions.
    """
    found = in_order(found, images)
    images, labels = jnp.asarray(images, jnp.float32), jnp.asarray(labels)
    whole: dict[str, Any] = {
        # Of the whole batch, as multisets: an update does not tell the images' order.
        "label_accuracy": metrics.label_accuracy(jnp.asarray(found.labels), labels),
        **searched(found),
    }
    if record is not None:
        whole["defense_true"] = client_defenses.summary(record)
        whole["estimation_error"] = estimation.compare(record, found.estimated)
    rows = []
    for position, private in enumerate(images):
        image = jnp.asarray(found.images[position])
        row = whole | {
            "label_true": labels[position],
            "label_inferred": found.labels[position],
            **{
                name: function(image, private, public.model, public.variables)
                for name, function in metrics.METRICS.items()
            },
        }
        if others is not None:
            row |= metrics.identification_ranks(
                image, private, jnp.asarray(others), public.model, public.variables
            )
            row["suspects"] = len(others) + 1
        pictures = {}
        if controls:
            row |= controls[position].scores
            pictures = controls[position].pictures()
        if perceptual is not None:
            row |= perceptual.row(np.asarray(image), private, pictures)
        rows.append(jsonable(row))
    return rows


def _curve(history: np.ndarray, points: int = 48) -> list[list[float]]:
    """Steps, and the lowest loss so far after them, thinned out for the results."""
    chosen = np.unique(np.linspace(0, len(history) - 1, points).round().astype(int))
    return [(chosen + 1).tolist(), [float(f"{loss:.5g}") for loss in history[chosen]]]
