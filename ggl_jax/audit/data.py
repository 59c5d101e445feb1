"""Where private images come from: embedded pictures, .npz files, folders, TensorFlow Datasets.

:func:`load` decodes only the images that are asked for and preprocesses them as the paper's
published code does (torchvision's ``Resize`` and ``CenterCrop`` on PIL images).
"""

import csv
import functools
import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ggl_jax import files, npz
from ggl_jax.errors import GGLError, about, check_once, did_you_mean, explaining, first_line
from ggl_jax.priors.holdout import held_out_of
from ggl_jax.spec import AtLeast, Count, check

EMBEDDED = ("embedded", "embedded:faces", "embedded:nonfaces")
IMAGE_SUFFIXES = (
    *(".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm"),
    *(".png", ".ppm", ".tif", ".tiff", ".webp"),
)
LABEL_FILES = ("labels.csv", "labels.txt", "images.csv")
FILE_COLUMNS = ("file", "files", "filename", "image", "image_id", "name", "path")
LABEL_COLUMNS = ("label", "labels", "class_id", "class", "target")
#: Folders of these names are parts of a data set, not classes.
PARTS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}

# Images are returned in one float32 array; a request beyond this is a forgotten `indices`.
MAX_BYTES = 4 * 2**30
# Pillow's own threshold of suspicion (about 89 megapixels), which it only warns about.
MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 2**26


class Dataset(NamedTuple):
    """Images chosen from a data set, ready for a client.

    Attributes:
        images: float32 [n h w c] in [0, 1].
        labels: int32 [n], or None where the data set tells no labels.
        names: what each image is called, e.g. its file name; n of them.
        num_classes: the number of classes as far as the data set tells: its own where it declares
            one, else the largest label plus one and at least 2; None without labels.
        source: names of the public data sets whose training parts hold these images, e.g.
            ``{"lfw"}``; another part of a data set is told apart, e.g. ``{"celeba:test"}``. Empty
            where it is not known (the user's own files).
        indices: the images' positions in the whole data set; n of them.
        size: how many images the whole data set holds.
        sha256: of the .npz file the images come from, else None.
    """

    images: np.ndarray
    labels: np.ndarray | None
    names: list[str]
    num_classes: int | None
    source: frozenset[str]
    indices: list[int]
    size: int
    sha256: str | None


class _Opened(NamedTuple):
    """A data set of which no image has been decoded yet."""

    size: int
    read: Callable[[int], tuple[Image.Image, int | None]]
    name: Callable[[int], str]
    num_classes: int | None
    source: frozenset[str] = frozenset()
    sha256: str | None = None
    keep_size: bool = False  # images that already have the wanted size are left as they are

    @classmethod
    def of(cls, picture: Callable, names: Sequence[str], labels=None, **more) -> "_Opened":
        """One whose names and labels are known already."""
        known = None if labels is None else [int(label) for label in labels]
        classes = None if known is None else max(2, max(known) + 1)

        def read(i):
            return picture(i), None if known is None else known[i]

        return cls(len(names), read, names.__getitem__, classes, **more)


def load(
    spec: str | os.PathLike,
    *,
    image_size: int = 32,
    indices: str | Sequence[int] | None = None,
    max_images: int | None = None,
    labels: int | None = None,
) -> Dataset:
    """Load private images.

    Args:
        spec: where from.

            - ``embedded``: a portrait of the astronaut Eileen Collins (NASA, public domain; bundled
              with scikit-image) in CelebA's framing; label 0, not male.
            - ``embedded:faces``, ``embedded:nonfaces``: 100 grey 25x25 faces of LFW and 100 pieces
              of background (bundled with scikit-image); no labels.
            - ``FILE.npz``: ``images`` uint8 [n h w 3] (grey: [n h w 1] or [n h w]), and optionally
              ``labels`` int [n] and ``files``, n names. Images that already have the wanted size
              are left as they are.
            - a folder of images. Labels come from a file ``labels.csv``, ``labels.txt`` or
              ``images.csv`` with columns file and label (or class_id), else from class sub-folders;
              classes are whole numbers, or names that are then numbered in sorted order. Without
              either there are no labels. EXIF orientation is respected, transparency is laid on
              white, 16-bit grey is scaled to 8 bits.
            - an image file.
            - ``tfds:NAME[/CONFIG][:VERSION][:SPLIT][?data_dir=DIR]``: a data set prepared by
              TensorFlow Datasets in array_record format, e.g. ``tfds:celeb_a``,
              ``tfds:imagenet2012:validation[:100]``. The split is by default ``test``, else
              ``validation``, else ``train``; DIR is by default $TFDS_DATA_DIR, else tfds's own. The
              label is ``attributes/Male`` for celeb_a, else the first class label.
        image_size: height and width of the result in pixels, in [8, 2048]. See :func:`preprocess`.
        indices: which images: text as in :func:`parse_indices`, a sequence of positions without
            repeats, or None for all.
        max_images: at most so many of them, the first ones; at least 1.
        labels: the label of every image, at least 0, in place of the data set's own.

    Returns:
        A :class:`Dataset`. Only the chosen images are decoded.

    Raises:
        GGLError: an unknown spec; a missing, empty, corrupt or oversized file; a wrong dtype,
            shape or label; an index out of range; a tfds data set that is not prepared; more than
            4 GiB of images.

    >>> load("embedded").images.shape
    (1, 32, 32, 3)
    """
    spec = os.fspath(spec)
    check("image_size", image_size, Annotated[int, AtLeast(8, below=2049)])
    check("max_images", max_images, Count | None)
    check("labels", labels, Annotated[int, AtLeast(0, below=2**31)] | None)
    with about(f"data={spec!r}"):
        opened = _open(spec)
        chosen = _choose(indices, opened.size)[:max_images]
        if len(chosen) * image_size**2 * 12 > MAX_BYTES:
            raise GGLError(
                f"{len(chosen)} images of {image_size}x{image_size} need more than "
                f"{MAX_BYTES >> 30} GiB; name fewer with indices, e.g. 0:8"
            )
        images = np.empty((len(chosen), image_size, image_size, 3), np.float32)
        found: list[int | None] = []
        for row, index in enumerate(chosen):
            image, label = opened.read(index)
            if not (opened.keep_size and image.size == (image_size, image_size)):
                image = preprocess(image, image_size)
            images[row] = np.asarray(image, np.float32) / 255.0
            found.append(label)
        num_classes = opened.num_classes
        if labels is not None:
            found = [int(labels)] * len(chosen)
            num_classes = max(num_classes or 2, int(labels) + 1)
        known = [label for label in found if label is not None]
        if known and len(known) < len(found):
            raise GGLError(
                f"{opened.name(chosen[found.index(None)])} has no label while others have; "
                "choose other indices, or give one label for all with labels"
            )
    return Dataset(
        images=images,
        labels=np.asarray(known, np.int32) if known else None,
        names=[opened.name(index) for index in chosen],
        num_classes=num_classes if known else None,
        source=opened.source,
        indices=chosen,
        size=opened.size,
        sha256=opened.sha256,
    )


def preprocess(image: Image.Image, image_size: int) -> Image.Image:
    """Resize and centre-crop an image as torchvision does.

    Below 224 the short side is resized to ``image_size`` (CelebA in the paper's published code:
    Resize(32), CenterCrop(32)); from 224 on to 8/7 of it (ImageNet: Resize(256), CenterCrop(224)).
    Bilinear with antialiasing, which is what Pillow's bilinear filter does.

    Args:
        image: a PIL image in mode RGB.
        image_size: height and width of the result in pixels, at least 1.

    Returns:
        A PIL image in mode RGB of ``image_size`` x ``image_size``.

    Raises:
        GGLError: an image so elongated that resizing it needs more than 89 megapixels.

    >>> preprocess(Image.new("RGB", (178, 218)), 32).size
    (32, 32)
    """
    target = image_size if image_size < 224 else round(image_size * 8 / 7)
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if short != target:
        # torchvision's arithmetic: a float division, cut off
        resized_long = int(target * long / short)
        if target * resized_long > MAX_PIXELS:
            raise GGLError(f"an image of {width}x{height} pixels is too elongated; crop it first")
        size = (target, resized_long) if width <= height else (resized_long, target)
        image = image.resize(size, Image.Resampling.BILINEAR)
        width, height = size
    # Python's round takes halves to the even number, and so does torchvision
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    return image.crop((left, top, left + image_size, top + image_size))


def parse_indices(text: str, size: int) -> list[int]:
    """Read a choice of images.

    Args:
        text: positions and ranges as in Python, separated by commas: ``3``, ``1,5,9``, ``0:8``,
            ``0:100:10``, ``:8`` (the first 8, or all where there are fewer), ``:`` (all). Positions
            count from 0.
        size: how many images there are.

    Returns:
        The positions, in the order given.

    Raises:
        GGLError: anything else, no image at all, an image named twice, or a position outside
            [0, size - 1]; the end of a range with a start may be ``size`` at most.

    >>> parse_indices("7, 0:6:2", size=10)
    [7, 0, 2, 4]
    """
    chosen: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(
            r"\s*(?:(\d{1,18})|(\d{0,18}):(\d{0,18})(?::(\d{0,18}))?)\s*", part, re.ASCII
        )
        if not match:
            raise GGLError(
                f"indices={text!r}: {part!r} is neither a position nor a range; "
                "write for example 3, 1,5,9, 0:8 or 0:100:10"
            )
        single, start, stop, step = match.groups()
        if single is not None:
            chosen.append(int(single))
            continue
        first, last, stride = int(start or 0), int(stop or size), int(step or 1)
        if stride < 1:
            raise GGLError(f"indices={text!r}: the step of {part!r} must be at least 1")
        if start == "":
            last = min(last, size)
        if last > size:
            raise GGLError(
                f"indices={text!r}: the range {part!r} ends beyond the data set, whose size "
                f"is {size}; allowed are positions 0 to {size - 1}"
            )
        chosen.extend(range(first, last, stride))
    return _choose(chosen, size, shown=text)


def check_prior_overlap(dataset: Dataset, card: Mapping, *, allow_held_out: bool = False) -> None:
    """Refuse private images that the prior was trained on.

    A reconstruction of an image that the generator has memorised says nothing about the gradient.
    What can be checked is checked: public data sets by name and part, .npz files by their sha256.
    A folder of the user's own files, or an .npz with some of the training images in it under
    another sha256, cannot be told: there the user answers for it.

    Args:
        dataset: from :func:`load`.
        card: the prior's card: ``trained_on``, names of data sets (training parts), and ``data``,
            one object per training file with ``file``, ``sha256``, ``num_images`` and
            ``num_held_out``; the held-out images follow from the training seed,
            ``card["config"]["seed"]``. A denoiser beside the prior has its own, in
            ``card["denoiser"]``.
        allow_held_out: let images of a training file pass that were held out of training.

    Raises:
        GGLError: the private images, or some of them, are among the prior's training images.
    """
    trained_on = {_canonical(name) for name in card.get("trained_on", ())}
    overlap = sorted(dataset.source & trained_on)
    if overlap:
        raise GGLError(
            f"data: the private images come from {', '.join(overlap)}, which the prior was trained "
            "on, so it may have memorised them; choose other images (embedded, embedded:nonfaces, "
            f"a test split) or a prior trained without {', '.join(overlap)}"
        )
    parts = {"the prior": card, "the prior's denoiser": card.get("denoiser", {})}
    for who, part, entry in ((w, p, e) for w, p in parts.items() for e in p.get("data", ())):
        if dataset.sha256 is None or entry.get("sha256") != dataset.sha256:
            continue
        held_out = held_out_of(part, entry) if allow_held_out else []
        seen = sorted(set(dataset.indices) - set(held_out), key=dataset.indices.index)
        if seen:
            which = "among the held-out ones" if held_out else "a file that it was not trained on"
            raise GGLError(
                f"data: {who} was trained on image {seen[0]} of {entry.get('file')} "
                f"({len(seen)} of the {len(dataset.indices)} chosen); choose {which}"
            )


# --- choosing ---------------------------------------------------------------------------------


def _choose(indices, size: int, shown=None) -> list[int]:
    """The chosen positions, checked."""
    if indices is None:
        return list(range(size))
    if isinstance(indices, str):
        return parse_indices(indices, size)
    shown = list(indices) if shown is None else shown
    position = Annotated[int, AtLeast(0, below=size)]
    with about(f"indices={shown!r}"):
        chosen = [int(check("position", index, position)) for index in indices]
    if not chosen:
        raise GGLError(f"indices={shown!r} choose no image; write for example 0:8")
    check_once(f"indices={shown!r}: image", chosen)
    return chosen


def _open(spec: str) -> _Opened:
    if spec in EMBEDDED:
        return _open_embedded(spec)
    if spec.startswith("tfds:"):
        return _open_tfds(spec)
    path = Path(os.path.expanduser(spec))
    with explaining("cannot be read", "mend that or choose other data", OSError):
        if path.is_dir():
            return _open_folder(path)
        if path.suffix.lower() == ".npz" and path.is_file():
            return _open_npz(path)
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            return _Opened.of(lambda i: _read_image(path), [path.name])
        if path.is_file():
            raise GGLError(
                f"neither an .npz file nor an image that can be read ({', '.join(IMAGE_SUFFIXES)})"
            )
        known = [*EMBEDDED, "tfds:celeb_a", "tfds:imagenet2012"]
        if path.parent.is_dir():
            known += [str(path.parent / entry.name) for entry in path.parent.iterdir()]
    raise GGLError(
        f"not there; {did_you_mean(spec, known, after=' ')}allowed: {', '.join(EMBEDDED)}, an .npz "
        "file, a folder of images, an image file, or tfds:NAME"
    )


# --- embedded ---------------------------------------------------------------------------------


def _open_embedded(spec: str) -> _Opened:
    # here and not above: scikit-image's data sets are only needed for these
    import skimage.data

    if spec == "embedded":
        picture = skimage.data.astronaut()
        # CelebA's aligned pictures are 178x218 with the eyes at (69, 111) and (108, 111) and the
        # mouth at y = 152. Here the eyes are 43 pixels apart, so the same frame is 194x238 with
        # its corner at x = 128, y = -20. The rows above the picture are cut off again by the
        # centre crop; repeating the edge keeps them from darkening what is left.
        above = np.repeat(picture[:1, 128:322], 20, axis=0)
        frame = Image.fromarray(np.concatenate([above, picture[:218, 128:322]]))
        return _Opened.of(lambda i: frame, ["astronaut"], [0], source=frozenset({"nasa"}))
    pictures = np.rint(255 * skimage.data.lfw_subset()).astype(np.uint8)
    name, source, first = "face", "lfw", 0
    if spec == "embedded:nonfaces":
        # cut from LFW's backgrounds, which no face crop shows
        name, source, first = "nonface", "lfw-background", 100
    return _Opened.of(
        lambda i: Image.fromarray(pictures[first + i]).convert("RGB"),
        [f"{name}_{i:02d}" for i in range(100)],
        source=frozenset({source}),
    )


# --- npz --------------------------------------------------------------------------------------


def _open_npz(path: Path) -> _Opened:
    images, labels, names = npz.read(path)
    names = names or [f"{path.stem}[{i}]" for i in range(len(images))]
    more = {"sha256": files.sha256(path), "keep_size": True}
    return _Opened.of(lambda i: Image.fromarray(images[i]), names, labels, **more)


# --- folders ----------------------------------------------------------------------------------


def _pictures(root: Path, pattern: str) -> list[Path]:
    return sorted(
        path
        for path in root.glob(pattern)
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and path.is_file()
    )


def _open_folder(folder: Path) -> _Opened:
    label_file = next((folder / name for name in LABEL_FILES if (folder / name).is_file()), None)
    found = _pictures(folder, "**/*" if label_file else "*")
    raw: list[str] | None = None
    if not label_file and not found:
        classes = sorted(
            path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
        if classes and PARTS.issuperset(path.name.lower() for path in classes):
            raise GGLError(
                f"its folders ({', '.join(path.name for path in classes)}) are named as parts of a "
                f"data set, not as classes; choose one, e.g. {classes[-1]}"
            )
        found = [path for one in classes for path in _pictures(one, "**/*")]
        raw = [path.relative_to(folder).parts[0] for path in found]
    names = [path.relative_to(folder).as_posix() for path in found]
    if label_file:
        table = _read_label_file(label_file)
        missing = next((name for name in names if _key(name) not in table), None)
        if missing is not None:
            raise GGLError(f"{label_file.name} has no line for {missing}; add one `file,label`")
        raw = [table[_key(name)] for name in names]
    if not found:
        raise GGLError(
            f"holds no images ({', '.join(IMAGE_SUFFIXES)}), neither itself nor in class "
            "sub-folders"
        )
    labels = None if raw is None else _number(raw, label_file)
    return _Opened.of(lambda i: _read_image(found[i]), names, labels)


def _key(name: str) -> str:
    # the same name may be composed differently in a file system and in a text
    return unicodedata.normalize("NFC", str(PurePosixPath(name.replace("\\", "/"))))


def _read_label_file(path: Path) -> dict[str, str]:
    """Read ``file,label`` lines (or separated by spaces) into {file: label}."""
    with about(f"labels file {path}"):
        with explaining("not UTF-8 text", "save it as UTF-8"):
            lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        if any("," in line for line in lines):
            rows = [[cell.strip() for cell in row] for row in csv.reader(lines)]
        else:
            rows = [line.rsplit(maxsplit=1) for line in lines]
        label_column = 1
        if rows and rows[0][0].lower() in FILE_COLUMNS:
            header = [cell.lower() for cell in rows.pop(0)]
            label_column = next((i for i, cell in enumerate(header) if cell in LABEL_COLUMNS), -1)
            if label_column < 0:
                raise GGLError(
                    f"no column is called {', '.join(LABEL_COLUMNS)}; it has {', '.join(header)}"
                )
        table: dict[str, str] = {}
        for row in rows:
            if len(row) <= label_column or not row[label_column]:
                raise GGLError(f"no label in the line `{','.join(row)}`")
            name, label = _key(row[0]), row[label_column]
            if table.setdefault(name, label) != label:
                raise GGLError(f"it gives {name} two labels, {table[name]} and {label}")
        return table


def _number(raw: list[str], label_file: Path | None) -> list[int]:
    """Whole numbers stay as they are; names are numbered in sorted order."""
    where = label_file.name if label_file else "the sub-folders"
    numbers = [text for text in raw if re.fullmatch(r"[+-]?\d+", text, re.ASCII)]
    if not numbers:
        order = {name: number for number, name in enumerate(sorted(set(raw)))}
        return [order[name] for name in raw]
    if len(numbers) < len(raw):
        odd = next(text for text in raw if text not in numbers)
        raise GGLError(
            f"{where}: numbers and names mixed as labels ({numbers[0]} and {odd}); use one kind"
        )
    labels = [int(text) for text in raw]
    if wrong := [label for label in labels if not 0 <= label < 2**31]:
        raise GGLError(f"{where}: the label {wrong[0]} is not allowed; labels count from 0")
    return labels


def _read_image(path: Path) -> Image.Image:
    return _decode(path, str(path), exif=True)


def _decode(file: Path | BytesIO, shown: str, *, exif: bool) -> Image.Image:
    """The first frame in mode RGB, or an error that says which file is at fault."""
    # on corrupt bytes Pillow's decoders raise nearly anything
    damaged = explaining("corrupt, unreadable or not an image", "replace or remove it")
    with about(f"image {shown}"), damaged, warnings.catch_warnings():
        # Pillow only warns of an image of up to twice the limit
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image) if exif else image)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise GGLError(
                f"too large, more than {MAX_PIXELS} pixels; scale it down first"
            ) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would clip these to 255; 16-bit files are what comes in these modes
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise GGLError("its values do not fit 16 bits; convert it to 8 bits per channel")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise GGLError("it holds floating-point values; convert it to 8 bits per channel")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


# --- TensorFlow Datasets ----------------------------------------------------------------------


def _canonical(name: str) -> str:
    """One spelling per public data set; another part than the training part is kept after ``:``."""
    name, _, part = name.lower().partition(":")
    plain = re.sub(r"[^a-z0-9]", "", name)
    families = ("celeba", "imagenet", "lfw")
    plain = next((family for family in families if plain.startswith(family)), plain)
    return f"{plain}:{part}" if part and part != "train" else plain


def _open_tfds(spec: str) -> _Opened:
    target, question, option = spec.removeprefix("tfds:").partition("?")
    match = re.fullmatch(
        r"(?P<name>\w+(?:/[^:]+)?)(?::(?P<version>\d+\.\d+\.\d+))?(?::(?P<split>.+))?", target
    )
    option_name, _, given_dir = option.partition("=")
    if not match or (question and (option_name != "data_dir" or not given_dir)):
        raise GGLError(
            "write tfds:NAME[/CONFIG][:VERSION][:SPLIT][?data_dir=DIR], for example "
            "tfds:celeb_a:test"
        )
    import tensorflow_datasets as tfds  # here and not above: the import takes seconds

    name, version, split = match.group("name", "version", "split")
    data_dir = given_dir or os.environ.get("TFDS_DATA_DIR")
    where = os.path.expanduser(data_dir or "~/tensorflow_datasets")
    remedy = (
        f"prepare it with: tfds build {name} --file_format=array_record --data_dir={where} (which "
        "needs TensorFlow, once: pip install tensorflow), or name its folder with ?data_dir=DIR or "
        "TFDS_DATA_DIR"
    )
    with explaining(f"no such data set in {where}", remedy):
        builder = tfds.builder(
            name if version is None else f"{name}:{version}",
            **({"data_dir": where} if data_dir else {}),
        )
        splits = sorted(builder.info.splits)
    if not splits:
        raise GGLError(f"not prepared in {where}; {remedy}")
    split = split or next((s for s in ("test", "validation", "train") if s in splits), splits[0])
    features = builder.info.features
    image_key = _find(features, tfds.features.Image, "image")
    if image_key is None:
        raise GGLError(f"no image among its features {sorted(features)}")
    label_path, num_classes = _tfds_label(tfds, features)
    allowed = f"allowed are {', '.join(splits)} and parts of them such as {splits[0]}[:100]"
    with explaining(f"the split {split!r} cannot be opened", allowed):
        try:
            # the undecoded bytes, so that every data set is decoded by the same code
            source = builder.as_data_source(
                split=split, decoders={image_key: tfds.decode.SkipDecoding()}
            )
        except NotImplementedError as error:
            raise GGLError(
                f"{where} has it in a format without random access ({first_line(error)}); {remedy}"
            ) from error
        size = len(source)
    if not size:
        raise GGLError(f"the split {split!r} is empty; there are {splits}")
    set_name = name.split("/")[0]

    def shown(index: int) -> str:
        return f"{set_name}:{split}[{index}]"

    def read(index: int) -> tuple[Image.Image, int | None]:
        with explaining(f"example {shown(index)} cannot be read", remedy):
            example = source[index]
        data = example[image_key]
        content = BytesIO(data if isinstance(data, bytes) else data.item())
        image = _decode(content, shown(index), exif=False)
        if not label_path:
            return image, None
        label = int(functools.reduce(lambda part, key: part[key], label_path, example))
        # unlabelled splits, such as ImageNet's test split, are marked by -1
        return image, label if label >= 0 else None

    trains = "train" in split or split == "all"
    part = _canonical(set_name if trains else f"{set_name}:{split}")
    return _Opened(size, read, shown, num_classes, source=frozenset({part}))


def _find(features, kind: type, preferred: str) -> str | None:
    """The name of the feature of this kind, the preferred one if there are several."""
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    return preferred if preferred in names else next(iter(names), None)


def _tfds_label(tfds, features) -> tuple[tuple[str, ...], int | None]:
    """Where in an example the label is, and the number of classes; ``((), None)`` if nowhere."""
    if "attributes" in features and "Male" in features["attributes"]:
        return ("attributes", "Male"), 2
    key = _find(features, tfds.features.ClassLabel, "label")
    return ((), None) if key is None else ((key,), features[key].num_classes)
