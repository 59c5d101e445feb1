"""Defenses that change the client's images: what is changed, and what the update then tells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_SHAPE
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

import ggl_jax as gx
from ggl_jax.adversary.matching import matching_loss
from ggl_jax.audit.identity import names_own
from ggl_jax.client.defenses._images import public_set
from ggl_jax.client.defenses.ats import TRANSFORMATIONS, apply_one, transformed
from ggl_jax.client.defenses.mixup import mixed
from ggl_jax.errors import GGLError
from ggl_jax.types import Context


@pytest.fixture(scope="module")
def batch(tiny_model, tiny_variables, tiny_images):
    rng = np.random.default_rng(0)
    images = jnp.concatenate([tiny_images, jnp.asarray(rng.uniform(size=(2, *TINY_SHAPE)))])
    return Context(tiny_model, tiny_variables, images.astype(jnp.float32), jnp.array([0, 1, 2, 1]))


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


# --- mixup --------------------------------------------------------------------------------------


def test_weights_have_the_law_of_the_larger_part(batch):
    draw = jax.jit(jax.vmap(lambda key: mixed(key, batch, 2.0, "faces")[2].ravel()))
    weights = np.asarray(draw(jax.random.split(jax.random.key(0), 500))).ravel()
    folded = lambda w: 2 * stats.beta(2, 2).cdf(w) - 1  # noqa: E731 (of max(v, 1 - v))
    assert stats.kstest(weights, folded).pvalue > 1e-3
    assert stats.kstest(weights, stats.uniform(0.5, 0.5).cdf).pvalue < 1e-3


def test_public_partners_are_faces_and_the_label_stays(batch):
    images, labels, weight = mixed(jax.random.key(1), batch, 2.0, "faces")
    assert labels.tolist() == [0, 1, 2, 1]
    partners = (images - weight * batch.images) / (1 - weight)
    known, _ = public_set("faces", TINY_SHAPE)
    assert known.shape == (100, *TINY_SHAPE)
    nearest = np.abs(np.asarray(partners)[:, None] - known).max(axis=(2, 3, 4))
    assert nearest.min(axis=1).max() < 1e-4
    assert len(set(nearest.argmin(axis=1))) > 1
    assert public_set("faces", (8, 6, 1))[0].shape == (100, 8, 6, 1)


def test_the_batchs_mix_is_mixups_and_keeps_the_counts(batch):
    images, soft, weight = mixed(jax.random.key(3), batch, 1.0, "batch")
    assert np.ptp(weight) == 0
    w = float(weight[0, 0, 0, 0])
    np.testing.assert_allclose(soft.sum(axis=0), [1, 2, 1], rtol=1e-5)
    np.testing.assert_allclose(images.sum(axis=0), batch.images.sum(axis=0), rtol=1e-4)
    # Its loss is the mix of the two labels' losses, as published.
    defense = gx.parse("mixup:1,public=batch")
    sent, record = jax.jit(lambda key: defense.apply(key, None, batch))(jax.random.key(3))
    assert record["weight"] == pytest.approx(w)
    partners = (images - w * batch.images) / (1 - w)
    other = [int(jnp.argmin(jnp.sum((p - batch.images) ** 2, (1, 2, 3)))) for p in partners]
    gradient = jax.jit(gx.gradient, static_argnums=0)
    own = gradient(batch.model, batch.variables, images, batch.labels)
    partner = gradient(batch.model, batch.variables, images, batch.labels[jnp.array(other)])
    close(sent, jax.tree.map(lambda a, b: w * a + (1 - w) * b, own, partner))
    with pytest.raises(GGLError, match="a batch of one image has no partner"):
        defense.apply(jax.random.key(0), None, batch._replace(images=images[:1]))


def test_a_file_of_public_images_is_part_of_a_defenses_identity(tmp_path, batch):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 255, (1, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "public.npz", images=images)
    spec = f"mixup:2,public={tmp_path / 'public.npz'}"
    made, _, weight = mixed(jax.random.key(1), batch, 2.0, str(tmp_path / "public.npz"))
    np.testing.assert_allclose(
        made, weight * batch.images + (1 - weight) * images / 255, rtol=1e-5, atol=1e-6
    )
    assert gx.parse(spec).name == spec
    assert names_own(spec)
    assert not names_own("mixup:2")


# --- ATS ----------------------------------------------------------------------------------------


def pillows(picture, name, level, sign):
    share = level / 9
    enhance = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast,
               "color": ImageEnhance.Color, "sharpness": ImageEnhance.Sharpness}  # fmt: skip
    if name in enhance:
        return enhance[name](picture).enhance(1 + 0.5 * share * sign)
    if name == "posterize":
        return ImageOps.posterize(picture, int(np.round(np.linspace(8, 4, 10))[level]))
    if name == "solarize":
        return ImageOps.solarize(picture, np.linspace(256, 0, 10)[level])
    if name in ("invert", "autocontrast", "equalize"):
        return getattr(ImageOps, name)(picture)
    if name == "rotate":
        turned = picture.convert("RGBA").rotate(30 * share)
        grey = Image.new("RGBA", turned.size, (128,) * 4)
        return Image.composite(turned, grey, turned).convert("RGB")
    moves = {
        "translate_x": (1, 0, 150 / 331 * share * picture.size[0] * sign, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, 150 / 331 * share * picture.size[1] * sign),
        "shear_y": (1, 0, 0, 0.3 * share * sign, 1, 0),
    }
    how = Image.Resampling.BILINEAR if name == "shear_y" else Image.Resampling.NEAREST
    return picture.transform(picture.size, Image.Transform.AFFINE, moves[name], how, fillcolor=0)


@pytest.mark.parametrize("kind", sorted({name for name, _ in TRANSFORMATIONS}))
def test_transformations_are_pillows(kind):
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(size=(20, 24, 3)), axis=0)
    pixels = np.clip(128 + 20 * walk, 0, 255).astype(np.uint8)
    image, changed = jnp.asarray(pixels, jnp.float32), 0
    levels = sorted({level for name, level in TRANSFORMATIONS if name == kind})
    for level in {levels[0], levels[-1]}:
        for sign in (1, -1):
            found = np.asarray(apply_one(kind, level, sign, image))
            expected = np.asarray(pillows(Image.fromarray(pixels), kind, level, sign), np.float32)
            # Pillow repeats the border where it interpolates; here it fades out.
            inner = (slice(2, -2),) * 2 if kind == "shear_y" else ()
            off = np.abs(found - expected)[inner]
            assert np.mean(off > 1) < (0.05 if kind == "shear_y" else 1e-9)
            changed += np.any(found != pixels)
    assert changed


def test_the_table_is_the_released_one():
    """Its policies by place: what the README of the released code attacks."""
    assert len(TRANSFORMATIONS) == 50
    assert [TRANSFORMATIONS[i] for i in (3, 1, 7)] == [
        ("translate_x", 9), ("contrast", 6), ("translate_y", 2),
    ]  # fmt: skip
    assert [TRANSFORMATIONS[i] for i in (43, 18)] == [("translate_y", 3), ("contrast", 7)]


def test_each_image_draws_its_policy_and_directions(batch):
    defense = gx.parse("ats:0/29-29/13")
    whole = np.round(255 * np.asarray(batch.images[0]))
    ways = {
        "inverted": 255 - whole,
        "twice": whole,
        "darker": np.trunc(whole * (1 - 0.5 * 5 / 9)),
        "brighter": np.clip(np.trunc(whole * (1 + 0.5 * 5 / 9)), 0, 255),
    }
    own = [gx.gradient(batch.model, batch.variables, w[None] / 255, batch.labels[:1])
           for w in ways.values()]  # fmt: skip
    context = batch._replace(images=batch.images[:1], labels=batch.labels[:1])
    share = jax.jit(lambda key: defense.apply(key, None, context)[0])
    seen = [0] * 4
    for seed in range(40):
        sent = share(jax.random.key(seed))
        apart = [sum(float(jnp.sum((a - b) ** 2)) for a, b in
                     zip(jax.tree.leaves(sent), jax.tree.leaves(g), strict=True))
                 for g in own]  # fmt: skip
        assert min(apart) < 1e-6
        seen[int(np.argmin(apart))] += 1
    assert min(seen) >= 1
    assert all(4 <= n <= 23 for n in (seen[0], seen[1], seen[2] + seen[3]))


# --- the server ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["mixup:2", "ats:5+clip:0.5"])
def test_the_update_tells_the_changed_image(spec, batch):
    context = batch._replace(images=batch.images[:1], labels=batch.labels[:1])
    defense, key = gx.parse(spec), jax.random.key(4)
    observed, _ = jax.jit(lambda key: defense.apply(key, None, context))(key)
    first = jax.random.fold_in(key, 0) if "+" in spec else key
    if spec.startswith("mixup"):
        changed = mixed(first, context, 2.0, "faces")[0]
    else:
        places = [int(p) for p in spec.partition(":")[2].partition("+")[0].split("-")]
        of_policy = jax.random.split(jax.random.split(first, 1)[0])[1]
        whole = transformed(of_policy, jnp.round(255 * context.images[0]), places)
        changed = whole[None] / 255
    view = defense.view
    estimated = view.estimate(observed, context.model.head)
    loss = matching_loss(context.model, context.variables, observed, view=view, estimated=estimated)
    losses = loss(jnp.stack([changed, context.images]), context.labels)
    energy = sum(float(jnp.sum(y**2)) for y in jax.tree.leaves(observed))
    assert losses[0] < 1e-6 * energy
    assert losses[1] > 1e-3 * energy


def test_it_defends_one_gradient_step_and_comes_first(batch):
    with pytest.raises(GGLError, match="must come first"):
        gx.parse("clip:1+mixup:1")
    with pytest.raises(GGLError, match="local_steps"):
        gx.share(
            jax.random.key(0),
            gx.Public(batch.model, batch.variables, None, None),
            batch.images,
            batch.labels,
            defense=gx.parse("ats:3"),
            client=gx.Client(local_steps=2),
        )
