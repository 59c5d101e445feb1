"""mixup: take the gradient of a mix of two images in place of the private one."""

import jax
import jax.numpy as jnp

from ggl_jax.client.defenses._images import EMBEDDED, check_source, draw_public, of_images
from ggl_jax.errors import GGLError, about
from ggl_jax.spec import Positive, ranged
from ggl_jax.types import Context, Defense

#: The partner is another image of the client's own batch.
BATCH = "batch"


@ranged
def mixup(*, alpha: Positive = 1.0, public: str = EMBEDDED) -> Defense:
    """Mix every private image with another one: ``w x + (1 - w) x'``, and train on the mix.

    - With public images, each private image has a partner of its own, drawn from them, and a weight
      of its own, ``w = max(v, 1 - v)`` with v ~ Beta(alpha, alpha), so that the private image has
      the larger part and its label can stay. Public images need none.
    - With the batch (``public=batch``), as mixup was published: one ``w ~ Beta(alpha, alpha)`` for
      the batch, the partners a random permutation of it, and labels mixed alike.

    What the adversary learns: the update tells the mix, which is what it searches for; it does not
    know w or the partner and takes nothing off the mix. Labels mixed over a permutation have the
    batch's own class counts, so these are still read off. See :func:`ggl_jax.client.defenses.
    _images.of_images`.

    Args:
        alpha: finite and > 0. With public images, the private one's part is near 1 for a small
            alpha and near 1/2 for a large one.
        public: "faces" (100 grey faces of LFW, from scikit-image), an .npz file, or "batch".

    Returns:
        A Defense. Record: ``weight``, the private image's part, the mean over the batch.

    Raises:
        GGLError: a batch of one image has no partner in itself; a file that cannot be read.

    Reference: Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization"; with public images:
    Huang et al. 2020, "InstaHide" (across data sets, without its sign flips); the larger part:
    Berthelot et al. 2019, "MixMatch", equation 8.
    """
    with about("mixup"):
        check_source(public, BATCH)

    def change(key, context):
        images, labels, weight = mixed(key, context, alpha, public)
        return images, labels, {"weight": jnp.mean(weight)}

    name = f"mixup:{alpha:g}" + ("" if public == EMBEDDED else f",public={public}")
    return of_images(name, change)


def mixed(
    key: jax.Array, context: Context, alpha: float, public: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The mixed images [b h w c], their labels ([b], or soft [b k]), and the weights [b 1 1 1]."""
    images, labels = context.images, jnp.asarray(context.labels)
    of_weight, of_partner = jax.random.split(key)
    if public == BATCH:
        if len(images) < 2:
            raise GGLError(
                "mixup: public=batch: a batch of one image has no partner in itself; give "
                "public=faces, a file, or a larger --batch-size"
            )
        order = jax.random.permutation(of_partner, len(images))
        weight = jnp.full((len(images), 1, 1, 1), jax.random.beta(of_weight, alpha, alpha))
        soft = jax.nn.one_hot(labels, context.model.num_classes)
        part = weight.reshape(-1, 1)
        return (
            weight * images + (1 - weight) * images[order],
            part * soft + (1 - part) * soft[order],
            weight,
        )
    weight = jax.random.beta(of_weight, alpha, alpha, (len(images), 1, 1, 1))
    weight = jnp.maximum(weight, 1 - weight)
    partners = draw_public(of_partner, public, context.model.image_shape, len(images))
    return weight * images + (1 - weight) * partners, labels, weight
