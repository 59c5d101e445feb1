"""ATS: take the gradient of transformed images, by policies searched for privacy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ggl_jax.client.defenses._images import of_images
from ggl_jax.errors import GGLError
from ggl_jax.spec import ranged
from ggl_jax.types import Defense

#: The released table of 50 transformations: a name and a magnitude from 0 to 9. Policies name them
#: by their place, from 0.
TRANSFORMATIONS: tuple[tuple[str, int], ...] = (
    *(("invert", 7), ("contrast", 6), ("rotate", 2), ("translate_x", 9), ("sharpness", 1)),
    *(("sharpness", 3), ("shear_y", 2), ("translate_y", 2), ("autocontrast", 5), ("equalize", 2)),
    *(("shear_y", 5), ("posterize", 5), ("color", 3), ("brightness", 5), ("sharpness", 9)),
    *(("brightness", 9), ("equalize", 5), ("equalize", 1), ("contrast", 7), ("sharpness", 5)),
    *(("color", 5), ("translate_x", 5), ("equalize", 7), ("autocontrast", 8), ("translate_y", 3)),
    *(("sharpness", 6), ("brightness", 6), ("color", 8), ("solarize", 0), ("invert", 0)),
    *(("equalize", 0), ("autocontrast", 0), ("equalize", 8), ("equalize", 4), ("color", 5)),
    *(("equalize", 5), ("autocontrast", 4), ("solarize", 4), ("brightness", 3), ("color", 0)),
    *(("solarize", 1), ("autocontrast", 0), ("translate_y", 3), ("translate_y", 3)),
    *(("autocontrast", 1), ("solarize", 1), ("equalize", 5), ("invert", 0), ("translate_y", 3)),
    ("autocontrast", 1),
)


@ranged
def ats(*, policy: str | int = "3-1-7/43-18-18") -> Defense:
    """Transform every private image by a policy, a list of image transformations, one by one.

    Of several policies, joined by ``/``, each image draws one. A transformation with a direction
    (brighter or darker, left or right) draws it, too. The label stays.

    What the adversary learns: the update tells the transformed image, which is what it searches
    for; it does not undo the transformations. See :func:`ggl_jax.client.defenses._images.
    of_images`.

    Args:
        policy: places in :data:`TRANSFORMATIONS`, 0 to 49, joined by ``-``; policies by ``/``. The
            default is the released choice for CIFAR-100 and ResNet20. (It was searched for there;
            the search for another model or data set is not part of this.)

    Returns:
        A Defense with an empty record.

    Raises:
        GGLError: a policy that is no such list.

    Edge cases: images are rounded to 8 bits, on which the transformations are defined. For one
    channel ``color`` does nothing.

    Reference: Gao et al. 2021, "Privacy-preserving Collaborative Learning with Automatic
    Transformation Search"; the table, ranges and choice of policies from its released code, in
    which every transformation of a policy is always applied (its table has probabilities, unused)
    and a random crop and flip come first in training; these are not here. ``shear_y`` is
    interpolated linearly, there cubically.
    """
    policies = _read(str(policy))

    def change(key, context):
        images = jnp.round(255 * jnp.clip(context.images, 0, 1))

        def one(key, image):
            of_choice, of_policy = jax.random.split(key)
            ways = [transformed(of_policy, image, places) for places in policies]
            return jnp.stack(ways)[jax.random.randint(of_choice, (), 0, len(ways))]

        changed = jax.vmap(one)(jax.random.split(key, len(images)), images)
        return changed / 255, context.labels, {}

    return of_images(f"ats:{'/'.join('-'.join(map(str, one)) for one in policies)}", change)


def _read(policy: str) -> list[list[int]]:
    try:
        found = [[int(place) for place in one.split("-")] for one in policy.split("/")]
        if all(0 <= place < len(TRANSFORMATIONS) for one in found for place in one):
            return found
    except ValueError:
        pass
    raise GGLError(
        f"ats: policy: got {policy!r}, allowed: numbers from 0 to {len(TRANSFORMATIONS) - 1} "
        "joined by -, and policies joined by /, such as 3-1-7/43-18-18"
    )


def transformed(key: jax.Array, image: jax.Array, places: list[int]) -> jax.Array:
    """An image [h w c] of whole numbers in [0, 255] after these transformations, one by one."""
    for number, place in enumerate(places):
        name, level = TRANSFORMATIONS[place]
        sign = jax.random.rademacher(jax.random.fold_in(key, number), (), jnp.float32)
        image = apply_one(name, level, sign, image)
    return image


def apply_one(name: str, level: int, sign: jax.Array | float, image: jax.Array) -> jax.Array:
    """One transformation of an image [h w c] of whole numbers in [0, 255], as Pillow defines it.

    Args:
        name: as in :data:`TRANSFORMATIONS`.
        level: 0 to 9, a share of the largest magnitude.
        sign: 1 or -1, of a transformation that has a direction.
        image: the image.
    """
    share = level / 9
    height, width = image.shape[:2]
    if name in _FACTORS:
        factor = 1 + 0.5 * share * sign
        base = _FACTORS[name](image)
        return jnp.clip(jnp.trunc(base + factor * (image - base)), 0, 255)
    if name == "invert":
        return 255 - image
    if name == "posterize":
        step = 2 ** (8 - round(8 - 4 * share))
        return step * jnp.floor(image / step)
    if name == "solarize":
        return jnp.where(image < 256 * (1 - share), image, 255 - image)
    if name == "autocontrast":
        low, high = (f(image, axis=(0, 1)) for f in (jnp.min, jnp.max))
        wide = high > low
        stretched = jnp.trunc(255 / jnp.where(wide, high - low, 1) * (image - low))
        return jnp.where(wide, jnp.clip(stretched, 0, 255), image)
    if name == "equalize":
        return jnp.stack([_equalized(image[..., c]) for c in range(image.shape[-1])], axis=-1)
    # Where each pixel comes from.
    y, x = (a.astype(jnp.float32) for a in jnp.mgrid[:height, :width])
    if name == "rotate":
        angle = jnp.deg2rad(30 * share)
        middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
        y, x = y - middle_y, x - middle_x
        turned_y = jnp.sin(angle) * x + jnp.cos(angle) * y + middle_y
        turned_x = jnp.cos(angle) * x - jnp.sin(angle) * y + middle_x
        return _sampled(image, turned_y, turned_x, order=0, fill=128)
    if name == "shear_y":
        moved = y + 0.5 + 0.3 * share * sign * (x + 0.5) - 0.5
        return _sampled(image, moved, x, order=1, fill=0)
    reach = 150 / 331 * share * sign
    if name == "translate_x":
        return _sampled(image, y, x + reach * width, order=0, fill=0)
    assert name == "translate_y", name
    return _sampled(image, y + reach * height, x, order=0, fill=0)


def _grey(image: jax.Array) -> jax.Array:
    if image.shape[-1] == 1:
        return image
    return jnp.round(image @ jnp.array([0.299, 0.587, 0.114]))[..., None]


def _smoothed(image: jax.Array) -> jax.Array:
    around = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = image.shape[:2]
    total = 4 * image
    for dy in range(3):
        for dx in range(3):
            total += around[dy : dy + height, dx : dx + width]
    inside = jnp.pad(jnp.ones((height - 2, width - 2, 1), bool), ((1, 1), (1, 1), (0, 0)))
    return jnp.where(inside, jnp.round(total / 13), image)


#: What is blended with the image, by a factor around 1: 0 gives this alone.
_FACTORS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "brightness": lambda image: 0 * image,
    "contrast": lambda image: jnp.floor(jnp.mean(_grey(image)) + 0.5),
    "color": _grey,
    "sharpness": _smoothed,
}


def _equalized(channel: jax.Array) -> jax.Array:
    """Pillow's: a table from each value to the share of smaller ones."""
    values = channel.astype(jnp.int32)
    counts = jnp.zeros(256, jnp.int32).at[values].add(1)
    step = (channel.size - counts[jnp.max(values)]) // 255
    below = jnp.cumsum(counts) - counts
    table = (step // 2 + below) // jnp.maximum(step, 1)
    several = (step > 0) & (jnp.min(values) < jnp.max(values))
    return jnp.where(several, jnp.clip(table, 0, 255)[values].astype(channel.dtype), channel)


def _sampled(image, y, x, *, order, fill):
    def one(channel):
        return jax.scipy.ndimage.map_coordinates(
            channel, [y, x], order=order, mode="constant", cval=fill
        )

    return jnp.round(jax.vmap(one, in_axes=-1, out_axes=-1)(image))
