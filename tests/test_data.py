"""Data sources against Pillow by hand, scikit-image's pictures and a real tfds data set on disk."""

import io
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ggl_jax.audit import data
from ggl_jax.errors import GGLError
from ggl_jax.priors.holdout import holdout_split

SHARED = Path(__file__).parents[2] / "shared" / "data"


def noise(seed, height, width, channels=3):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def fails(spec, match, **options):
    """Loading fails with one line that holds `match`."""
    with pytest.raises(GGLError) as info:
        data.load(spec, **options)
    message = str(info.value)
    assert "\n" not in message
    assert match in message
    return message


# --- preprocessing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "target", "resized", "corner"),
    [
        # By torchvision's rules: long side cut off, offset rounded with halves to even.
        ((178, 218), 32, (32, 39), (0, 4)),  # 39.19; (39 - 32) / 2 = 3.5 -> 4
        ((100, 117), 32, (32, 37), (0, 2)),  # 37.44; 2.5 -> 2
        ((117, 100), 32, (37, 32), (2, 0)),
        ((31, 61), 32, (32, 62), (0, 15)),  # 62.97 -> 62
        ((32, 40), 32, (32, 40), (0, 4)),  # short side fits: not resized
        ((20, 10), 32, (64, 32), (16, 0)),  # enlarged
        (
            (500, 375),
            224,
            (341, 256),
            (58, 16),
        ),  # Resize(256); 341.33; (341 - 224) / 2 = 58.5 -> 58
        ((299, 299), 224, (256, 256), (16, 16)),
        ((224, 224), 224, (256, 256), (16, 16)),
        ((90, 64), 64, (90, 64), (13, 0)),
    ],
)
def test_preprocess_is_torchvisions_resize_and_center_crop(size, target, resized, corner):
    image = Image.fromarray(noise(0, size[1], size[0]))
    ours = data.preprocess(image, target)
    by_hand = image if size == resized else image.resize(resized, Image.Resampling.BILINEAR)
    left, top = corner
    expected = np.asarray(by_hand)[top : top + target, left : left + target]
    np.testing.assert_array_equal(np.asarray(ours), expected)


def test_preprocess_refuses_what_would_explode():
    with pytest.raises(GGLError, match="elongated"):
        data.preprocess(Image.new("RGB", (1, 200_000)), 32)


# --- indices ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", [3]),
        ("1,5,9", [1, 5, 9]),
        ("9,1", [9, 1]),
        ("0:8", list(range(8))),
        (":12", list(range(10))),
        ("0:10:4", [0, 4, 8]),
        (":2, 7", [0, 1, 7]),
        ("8:", [8, 9]),
        (":", list(range(10))),
    ],
)
def test_parse_indices(text, expected):
    assert data.parse_indices(text, 10) == expected


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 5))
def test_ranges_mean_what_they_mean_in_python(start, stop, step):
    expected = list(range(30))[start:stop:step]
    text = f"{start}:{stop}:{step}"
    if expected:
        assert data.parse_indices(text, 30) == expected
    else:
        with pytest.raises(GGLError, match="no image"):
            data.parse_indices(text, 30)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("10", "position: got 10, allowed: whole numbers of at least 0 and below 10"),
        ("0:11", "0:11.*ends beyond.*0 to 9"),
        ("-1", "neither a position nor a range"),
        ("0:5:0", "step"),
        ("5:5", "no image"),
        ("", "neither"),
        ("1;2", "neither"),
        ("1.5", "neither"),
        ("1,1", "image: 1 is there twice"),
        ("0:4,3", "image: 3 is there twice"),
        ("9" * 5000, "neither"),
        ("٣", "neither"),  # a digit elsewhere, but no position here
    ],
)
def test_bad_indices(text, match):
    with pytest.raises(GGLError, match=match):
        data.parse_indices(text, 10)


# --- embedded ---------------------------------------------------------------------------------


def test_embedded_portrait_has_celebas_framing():
    found = data.load("embedded")
    assert found.images.shape == (1, 32, 32, 3)
    assert found.images.dtype == np.float32
    assert found.labels.tolist() == [0]
    assert (found.num_classes, found.source, found.size) == (2, {"nasa"}, 1)
    # the same by hand: 218 x 178 scaled by 1.09, with the eyes where CelebA has them
    padded = np.pad(skimage.data.astronaut(), ((20, 0), (0, 0), (0, 0)), mode="edge")
    frame = Image.fromarray(padded[:238, 128:322]).resize((32, 39), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(
        np.rint(found.images[0] * 255), np.asarray(frame.crop((0, 4, 32, 36)))
    )
    # the eyes, at (69, 111) and (108, 111) of 178 x 218, are darker than the cheeks below them
    grey = found.images[0].mean(-1)
    for column in (12, 19):
        assert grey[15:17, column].mean() < grey[18:20, column].mean() - 0.1


def test_embedded_faces_and_nonfaces_are_scikit_images():
    source = skimage.data.lfw_subset()
    for spec, part, name in (
        ("embedded:faces", source[:100], "lfw"),
        ("embedded:nonfaces", source[100:], "lfw-background"),
    ):
        found = data.load(spec, image_size=25)
        assert found.images.shape == (100, 25, 25, 3)
        np.testing.assert_allclose(found.images, part[..., None].repeat(3, -1), atol=0.51 / 255)
        assert (found.labels, found.num_classes, found.source) == (None, None, {name})
        assert len(set(found.names)) == 100


def test_one_label_for_all_and_max_images():
    found = data.load("embedded:faces", labels=3, max_images=2, indices="7,9,11")
    assert found.labels.tolist() == [3, 3]
    assert (found.num_classes, found.indices, found.size) == (4, [7, 9], 100)
    assert data.load("embedded", labels=1).labels.tolist() == [1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image_size": 0}, "image_size: got 0"),
        ({"image_size": None}, "image_size: got None"),
        ({"image_size": 32.0}, "image_size: got 32.0"),
        ({"max_images": 0}, "max_images: got 0"),
        ({"labels": -1}, "labels: got -1"),
        ({"labels": True}, "labels: got True"),
        ({"indices": "100"}, "'embedded:faces': indices='100'"),
        ({"indices": [0, 100]}, "position: got 100, allowed"),
        ({"indices": [-1]}, "position: got -1, allowed"),
        ({"indices": []}, "no image"),
        ({"indices": [0.5]}, "position: got 0.5, allowed: whole numbers"),
        ({"image_size": 2048}, "more than 4 GiB; name fewer"),
    ],
)
def test_bad_options(options, match):
    fails("embedded:faces", match, **options)


# --- npz --------------------------------------------------------------------------------------


def test_npz(tmp_path):
    path = tmp_path / "set.npz"
    images = noise(1, 5 * 32, 32).reshape(5, 32, 32, 3)
    np.savez(path, images=images, labels=[0, 2, 1, 0, 2], files=[f"{i}.jpg" for i in range(5)])
    found = data.load(path, indices="3,1")
    np.testing.assert_array_equal(np.rint(found.images * 255), images[[3, 1]])
    assert found.images.dtype == np.float32
    assert found.labels.tolist() == [0, 2]
    assert found.labels.dtype == np.int32
    assert (found.names, found.num_classes, found.source) == (["3.jpg", "1.jpg"], 3, frozenset())
    # the classes are those of the whole file, not of the choice
    assert data.load(path, indices="0").num_classes == 3


def test_npz_of_the_wanted_size_is_not_resampled(tmp_path):
    images = noise(2, 224, 224)[None]
    np.savez(tmp_path / "set.npz", images=images)
    found = data.load(tmp_path / "set.npz", image_size=224)
    np.testing.assert_array_equal(np.rint(found.images * 255), images)
    assert found.labels is None
    assert found.names == ["set[0]"]
    small = data.load(tmp_path / "set.npz", image_size=32)
    expected = data.preprocess(Image.fromarray(images[0]), 32)
    np.testing.assert_array_equal(np.rint(small.images[0] * 255), np.asarray(expected))


@pytest.mark.parametrize("shape", [(3, 28, 28, 1), (3, 28, 28)])
def test_grey_npz(tmp_path, shape):
    images = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images)
    found = data.load(tmp_path / "set.npz", image_size=28)
    expected = images.reshape(3, 28, 28, 1).repeat(3, axis=-1)
    np.testing.assert_array_equal(np.rint(found.images * 255), expected)


GOOD = np.zeros((2, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"images": GOOD / 255.0}, "float64, must be uint8; convert with numpy.rint"),
        ({"images": GOOD.astype(np.int32)}, "int32, must be uint8"),
        ({"images": GOOD[..., :2]}, "[2, 32, 32, 2], must be [n, h, w, 3]"),
        ({"images": GOOD[0, 0]}, "[32, 3], must be [n, h, w, 3]"),
        ({"images": GOOD[0]}, "[32, 32, 3], must be [n, h, w, 3]"),
        ({"images": GOOD.transpose(0, 3, 1, 2)}, "[2, 3, 32, 32], must be"),
        ({"images": GOOD[:0]}, "no images"),
        ({"images": GOOD[:, :0]}, "must be [n, h, w, 3]"),
        ({"pictures": GOOD}, "no array `images`, only pictures"),
        ({"images": GOOD, "labels": [0]}, "int64 [1], must be whole numbers [2]"),
        ({"images": GOOD, "labels": [[0, 1]]}, "int64 [1, 2], must be whole numbers [2]"),
        ({"images": GOOD, "labels": [0, -1]}, "label -1"),
        ({"images": GOOD, "labels": [0, 2**31]}, "label 2147483648"),
        ({"images": GOOD, "labels": [0.0, 1.0]}, "float64 [2], must be whole numbers"),
        ({"images": GOOD, "labels": ["a", "b"]}, "must be whole numbers"),
        ({"images": GOOD, "files": ["a"]}, "must be 2 texts"),
        ({"images": np.array([{}, {}], object)}, "Object arrays cannot be loaded"),
        ({"images": GOOD, "labels": np.array([0, None], object)}, "Object arrays cannot be"),
    ],
)
def test_bad_npz(tmp_path, arrays, match):
    np.savez(tmp_path / "set.npz", **arrays)
    assert "set.npz" in fails(tmp_path / "set.npz", match)


def test_corrupt_npz(tmp_path):
    path = tmp_path / "set.npz"
    np.savez_compressed(path, images=noise(0, 64, 32).reshape(2, 32, 32, 3))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 32, 32, 3)}
    )
    for content in (
        b"",
        b"text, not a zip",
        whole[: len(whole) // 2],
        bytes(damaged),
        b"\x93NUMPY\x01\x00",
    ):
        path.write_bytes(content)
        fails(path, "not a readable .npz file")
    np.save(tmp_path / "one.npy", GOOD)
    path.write_bytes((tmp_path / "one.npy").read_bytes())
    fails(path, "it is a single array")
    # a header that promises terabytes, and a member that is no array
    for content, match in ((header.getvalue(), "not a readable .npz file"), (b"text", "|S4, must")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", content)
        fails(path, match)


def test_names_in_any_encoding(tmp_path):
    np.savez(tmp_path / "set.npz", images=GOOD, files=np.array([b"a\xe9", "ü".encode()]))
    assert data.load(tmp_path / "set.npz").names == ["a\\xe9", "ü"]


# --- folders ----------------------------------------------------------------------------------


def only(found):
    """The one image of a set, as uint8."""
    assert len(found.images) == 1
    return np.rint(found.images[0] * 255).astype(np.uint8)


def test_folder_is_read_as_pillow_reads_it(tmp_path):
    for name, seed in (("b.png", 0), ("a.png", 1)):
        Image.fromarray(noise(seed, 218, 178)).save(tmp_path / name)
    Image.fromarray(noise(2, 218, 178)).save(tmp_path / "C.JPEG")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._a.png").write_bytes(b"what macOS leaves behind")
    found = data.load(tmp_path)
    assert found.names == ["C.JPEG", "a.png", "b.png"]
    assert (found.labels, found.num_classes, found.size) == (None, None, 3)
    for row, name in enumerate(found.names):
        by_hand = Image.open(tmp_path / name).resize((32, 39), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(
            np.rint(found.images[row] * 255), np.asarray(by_hand.crop((0, 4, 32, 36)))
        )
    # a single image file is a set of one
    np.testing.assert_array_equal(data.load(tmp_path / "b.png").images[0], found.images[2])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    picture = noise(orientation, 40, 32)
    # what a camera stores for each orientation tag, so that turning it upright gives `picture`
    stored = {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture, 1),  # the camera was turned so that "up" is at the right
        7: picture[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(picture, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(only(data.load(tmp_path)), picture[4:36])


def test_other_modes(tmp_path):
    grey = noise(0, 32, 32, 0)
    rgba = noise(1, 32, 32, 4)
    alpha = rgba[..., 3:] / 255.0
    on_white = rgba[..., :3] * alpha + 255 * (1 - alpha)
    deep = np.random.default_rng(2).integers(0, 2**16, (32, 32)).astype(np.uint16)
    palette = Image.fromarray(noise(3, 32, 32)).quantize(16)
    cut_out = palette.copy()
    cut_out.info["transparency"] = 0
    cmyk = Image.fromarray(noise(4, 32, 32, 4), "CMYK")
    floats = Image.fromarray(np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32))
    over = np.where((np.asarray(palette) == 0)[..., None], 255, np.asarray(palette.convert("RGB")))

    def check(image, name, expected, tolerance=0):
        path = tmp_path / name
        image.save(path)
        found = only(data.load(path)).astype(int)
        assert np.abs(found - np.asarray(expected, float)).max() <= tolerance, name

    check(Image.fromarray(grey), "grey.png", grey[..., None].repeat(3, -1))
    check(Image.fromarray(grey > 127), "bits.png", (grey > 127)[..., None].repeat(3, -1) * 255)
    check(Image.fromarray(rgba), "alpha.png", on_white, 1)
    grey_alpha = Image.fromarray(rgba[..., 2:], "LA")
    expected = rgba[..., 2:3] * alpha + 255 * (1 - alpha)
    check(grey_alpha, "grey_alpha.png", expected.repeat(3, -1), 1)
    # Pillow itself would clip all but the darkest 256 values to white
    check(Image.fromarray(deep), "deep.png", (deep / 257)[..., None].repeat(3, -1), 0.51)
    check(Image.fromarray(deep), "deep.tif", (deep / 257)[..., None].repeat(3, -1), 0.51)
    check(palette, "palette.png", palette.convert("RGB"))
    check(cut_out, "cut_out.png", over)
    check(cmyk, "cmyk.tif", cmyk.convert("RGB"))
    floats.save(tmp_path / "floats.tif")
    fails(tmp_path / "floats.tif", "floating-point")


def test_only_the_chosen_images_are_decoded(tmp_path):
    Image.fromarray(noise(0, 32, 32)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.jpg").write_text("no picture")
    assert data.load(tmp_path, indices="0").names == ["a.png"]
    fails(tmp_path, "b.png: corrupt", indices="1")
    fails(tmp_path, "c.jpg: corrupt, unreadable or not an image", indices="2")
    fails(tmp_path, "b.png: corrupt")


def test_decompression_bomb(tmp_path):
    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    for side in (10_000, 60_000):  # Pillow warns of the first and refuses the second
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
        (tmp_path / "bomb.png").write_bytes(content + chunk(b"IEND", b""))
        fails(tmp_path, "bomb.png: too large")


def make_folder(folder, names):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(seed, 32, 32)).save(folder / name)


@pytest.mark.parametrize(
    ("file", "text", "expected", "num_classes"),
    [
        ("labels.csv", "b.png,4\na.png,1\n", [1, 4], 5),
        ("labels.csv", "file,label\na.png,0\nb.png,1\nelsewhere.png,7\n", [0, 1], 2),
        (
            "labels.csv",
            "\ufefffilename, author, class\r\na.png,me,0\r\n\r\nb.png,you,0\r\n",
            [0, 0],
            2,
        ),
        ("labels.txt", "a.png 3\nb.png 2\n", [3, 2], 4),
        ("labels.csv", "a.png,dog\nb.png,cat\n", [1, 0], 2),
        ("images.csv", 'file,class_id,author\na.png,5,"x, y"\nb.png,0,z\n', [5, 0], 6),
    ],
)
def test_label_files(tmp_path, file, text, expected, num_classes):
    make_folder(tmp_path, ["a.png", "b.png"])
    (tmp_path / file).write_text(text, encoding="utf-8")
    found = data.load(tmp_path)
    assert found.names == ["a.png", "b.png"]
    assert found.labels.tolist() == expected
    assert found.num_classes == num_classes


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a.png,1\n", "no line for b.png"),
        ("a.png,1\nb.png,-1\n", "label -1"),
        ("a.png,1\nb.png,cat\n", "numbers and names mixed"),
        ("a.png,1\nb.png,2\nb.png,3\n", "two labels, 2 and 3"),
        ("a.png,1\nb.png\n", "no label in the line `b.png`"),
        ("a.png,1\nb.png,\n", "no label in the line"),
        ("file,author\na.png,x\nb.png,y\n", "no column is called"),
        ("", "no line for a.png"),
    ],
)
def test_bad_label_files(tmp_path, text, match):
    make_folder(tmp_path, ["a.png", "b.png"])
    (tmp_path / "labels.csv").write_text(text)
    fails(tmp_path, match)


def test_label_file_in_another_encoding(tmp_path):
    make_folder(tmp_path, ["a.png"])
    (tmp_path / "labels.csv").write_bytes("a.png,é".encode("latin-1"))
    fails(tmp_path, "not UTF-8")


def test_parts_of_a_data_set_are_no_classes(tmp_path):
    make_folder(tmp_path, ["train/cat/1.png", "train/dog/2.png", "val/cat/3.png"])
    fails(tmp_path, "(train, val) are named as parts of a data set, not as classes; choose one")
    assert data.load(tmp_path / "train").labels.tolist() == [0, 1]
    # beside other names they are classes
    make_folder(tmp_path / "vehicles", ["train/1.png", "bus/2.png"])
    assert data.load(tmp_path / "vehicles").labels.tolist() == [0, 1]


def test_class_folders(tmp_path):
    make_folder(tmp_path / "named", ["dog/1.png", "cat/2.png", "cat/deep/0.png"])
    found = data.load(tmp_path / "named")
    assert found.names == ["cat/2.png", "cat/deep/0.png", "dog/1.png"]
    assert found.labels.tolist() == [0, 0, 1]
    # numbered folders keep their numbers, "10" after "9"
    make_folder(tmp_path / "numbered", ["10/x.png", "9/y.png"])
    found = data.load(tmp_path / "numbered")
    assert dict(zip(found.names, found.labels, strict=True)) == {"10/x.png": 10, "9/y.png": 9}
    assert found.num_classes == 11


def test_missing_files_and_typing_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "holds no images")
    fails("~nobody-of-this-name/faces.npz", "not there")
    fails("embeded", "did you mean 'embedded'?")
    (tmp_path / "faces.npz").write_bytes(b"")
    fails(tmp_path / "face.npz", "faces.npz'?")
    fails(tmp_path / "nowhere" / "x.npz", "not there")
    (tmp_path / "notes.doc").write_text("")
    fails(tmp_path / "notes.doc", "neither an .npz file nor an image")


# --- TensorFlow Datasets ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """Two small data sets written by tfds itself, without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")

    def jpeg(seed):
        file = io.BytesIO()
        Image.fromarray(noise(seed, 218, 178)).save(file, "JPEG")
        return io.BytesIO(file.getvalue())

    class Base(tfds.core.GeneratorBasedBuilder):
        def _split_generators(self, dl_manager):
            parts = {"train": 5, "test": 3} if "celeb" in self.name else {"train": 4}
            return {part: self._generate_examples(part, num) for part, num in parts.items()}

    # registered under a name of its own: tfds knows celeb_a already, and reads what is on disk
    with tfds.core.registered.skip_registration():

        class CelebA(Base):
            VERSION = tfds.core.Version("2.1.0")

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=(218, 178, 3), encoding_format="jpeg"),
                    "landmarks": {"lefteye_x": np.int64},
                    "attributes": {"Male": np.bool_, "Smiling": np.bool_},
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _generate_examples(self, part, num):
                for i in range(num):
                    yield (
                        i,
                        {
                            "image": jpeg(100 * (part == "test") + i),
                            "landmarks": {"lefteye_x": 69},
                            "attributes": {"Male": i == 1, "Smiling": True},
                        },
                    )

        class TinyPhotos(Base):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "picture": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "kind": tfds.features.ClassLabel(names=["a", "b", "c"]),
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _generate_examples(self, part, num):
                for i in range(num):
                    yield i, {"picture": jpeg(i), "kind": "abc"[i % 3] if i < 3 else -1}

    folder = tmp_path_factory.mktemp("tfds")
    settings = tfds.download.DownloadConfig(try_download_gcs=False)
    for builder in (CelebA, TinyPhotos):
        builder(data_dir=folder, file_format="array_record").download_and_prepare(
            download_config=settings
        )
    return folder


def test_tfds_celeb_a(tfds_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    before = "tensorflow" in sys.modules
    found = data.load("tfds:celeb_a")
    assert ("tensorflow" in sys.modules) == before
    assert (found.size, found.num_classes, found.source) == (3, 2, {"celeba:test"})
    assert found.names == [f"celeb_a:test[{i}]" for i in range(3)]
    # tfds shuffles what it writes: know the examples by their pixels
    expected = {}
    for i in range(3):
        file = io.BytesIO()
        Image.fromarray(noise(100 + i, 218, 178)).save(file, "JPEG")
        small = Image.open(file).resize((32, 39), Image.Resampling.BILINEAR)
        expected[small.crop((0, 4, 32, 36)).tobytes()] = int(i == 1)
    for image, label in zip(found.images, found.labels, strict=True):
        assert expected.pop(np.rint(image * 255).astype(np.uint8).tobytes()) == label
    assert not expected


def test_tfds_splits_versions_and_folders(tfds_dir, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    where = f"?data_dir={tfds_dir}"
    whole = data.load(f"tfds:celeb_a:train{where}")
    assert (whole.size, whole.source) == (5, {"celeba"})
    part = data.load(f"tfds:celeb_a:2.1.0:train[1:4]{where}", indices="0:2")
    assert (part.size, part.indices, part.source) == (3, [0, 1], {"celeba"})
    np.testing.assert_array_equal(part.images, whole.images[1:3])
    np.testing.assert_array_equal(part.labels, whole.labels[1:3])


def test_tfds_any_data_set(tfds_dir):
    # the builder's code is not registered: only the files tell what the features are
    spec = f"tfds:tiny_photos?data_dir={tfds_dir}"
    with pytest.raises(GGLError, match="has no label while others have"):
        data.load(spec)
    unlabelled = data.load(spec, labels=0, image_size=224)
    assert unlabelled.images.shape == (4, 224, 224, 3)
    labels = []
    for index in range(4):
        found = data.load(spec, indices=[index])
        if found.labels is not None:
            labels += found.labels.tolist()
            assert found.num_classes == 3
    assert sorted(labels) == [0, 1, 2]


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("tfds:mnist", "tfds build mnist --file_format=array_record --data_dir="),
        ("tfds:no_such_set", "no such data set"),
        ("tfds:celeb_a:validation", "allowed are test, train"),
        ("tfds:celeb_a:train[90:99]", "cannot be opened"),
        ("tfds:celeb_a:9.9.9", "9.9.9"),
        ("tfds:", "write tfds:NAME"),
        ("tfds:../x", "write tfds:NAME"),
    ],
)
def test_bad_tfds(tfds_dir, spec, match):
    fails(f"{spec}?data_dir={tfds_dir}", match)


def test_bad_tfds_option():
    fails("tfds:celeb_a?dir=x", "?data_dir=DIR")
    fails("tfds:celeb_a?data_dir=", "?data_dir=DIR")


def test_tfds_corrupt_record(tfds_dir, tmp_path):
    import shutil

    shutil.copytree(tfds_dir, tmp_path / "copy")
    (record,) = (tmp_path / "copy").glob("celeb_a/*/celeb_a-test*")
    content = bytearray(record.read_bytes())
    record.write_bytes(content[: len(content) // 2])
    with pytest.raises(GGLError, match="celeb_a"):
        data.load(f"tfds:celeb_a?data_dir={tmp_path / 'copy'}")


# --- overlap with a prior ---------------------------------------------------------------------


def test_private_images_must_not_be_the_priors(tmp_path):
    card = {"trained_on": ["celeba", "LFW"], "data": []}
    with pytest.raises(GGLError, match="come from lfw, which the prior was trained on"):
        data.check_prior_overlap(data.load("embedded:faces", max_images=1), card)
    for spec in ("embedded", "embedded:nonfaces"):
        data.check_prior_overlap(data.load(spec, max_images=1), card)
    data.check_prior_overlap(
        data.load("embedded:faces", max_images=1), {"trained_on": ["celeba"], "data": []}
    )


def test_tfds_overlap_is_by_part(tfds_dir):
    card = {"trained_on": ["celeba"]}
    where = f"?data_dir={tfds_dir}"
    data.check_prior_overlap(data.load(f"tfds:celeb_a:test{where}"), card)
    with pytest.raises(GGLError, match="a test split"):
        data.check_prior_overlap(data.load(f"tfds:celeb_a:train[:1]{where}"), card)


def test_training_files_are_known_by_their_hash(tmp_path):
    path, other = tmp_path / "private.npz", tmp_path / "other.npz"
    np.savez(path, images=noise(0, 20 * 32, 32).reshape(20, 32, 32, 3))
    np.savez(other, images=noise(1, 20 * 32, 32).reshape(20, 32, 32, 3))
    sha256 = data.load(path).sha256
    # the file's name does not matter
    entry = {"file": "public.npz", "sha256": sha256, "num_images": 20, "num_held_out": 4}
    card = {"trained_on": ["celeba"], "data": [entry], "config": {"seed": 7}}
    data.check_prior_overlap(data.load(other), card)
    trained, held_out = (part.tolist() for part in holdout_split(20, 4, 7))
    with pytest.raises(GGLError, match=r"of public.npz \(4 of the 4 chosen\)"):
        data.check_prior_overlap(data.load(path, indices=held_out), card)
    data.check_prior_overlap(data.load(path, indices=held_out), card, allow_held_out=True)
    mixed = data.load(path, indices=[*held_out, trained[3]])
    with pytest.raises(GGLError, match=rf"image {trained[3]} of public.npz \(1 of the 5 chosen\)"):
        data.check_prior_overlap(mixed, card, allow_held_out=True)
    entry["num_held_out"] = 0
    with pytest.raises(GGLError, match="file that it was not trained on"):
        data.check_prior_overlap(data.load(path, indices="0"), card, allow_held_out=True)


def test_training_files_of_a_denoiser_count_too(tmp_path):
    path = tmp_path / "private.npz"
    np.savez(path, images=noise(0, 20 * 32, 32).reshape(20, 32, 32, 3))
    entry = {"file": "public.npz", "num_images": 20, "num_held_out": 4}
    entry["sha256"] = data.load(path).sha256
    card = {"trained_on": [], "data": [], "config": {"seed": 0}}
    card["denoiser"] = {"data": [entry], "config": {"seed": 7}}
    trained, held_out = (part.tolist() for part in holdout_split(20, 4, 7))
    data.check_prior_overlap(data.load(path, indices=held_out), card, allow_held_out=True)
    with pytest.raises(GGLError, match=f"denoiser was trained on image {trained[0]} of public.npz"):
        data.check_prior_overlap(data.load(path, indices=trained[:1]), card, allow_held_out=True)


# --- the development data ---------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="the development data are not here")
def test_development_data():
    found = data.load(SHARED / "celeba32_private.npz", indices="0:4")
    assert (found.size, found.num_classes, found.images.shape) == (512, 2, (4, 32, 32, 3))
    photos = data.load(SHARED / "imagenet_ccby", image_size=224, max_images=2)
    assert photos.images.shape == (2, 224, 224, 3)
    rows = dict(
        line.split(",")[:2]
        for line in (SHARED / "imagenet_ccby/images.csv").read_text().split("\n")
        if line
    )
    assert photos.labels.tolist() == [int(rows[name]) for name in photos.names]
    # the portrait is framed as CelebA's faces are: it is nearer to their mean where it lies than
    # when shifted by two pixels
    mean = data.load(SHARED / "celeba32_public.npz", indices="0:3562:10").images.mean(0)
    portrait = data.load("embedded").images[0]

    def correlation(shift):
        moved = np.roll(portrait.mean(-1), shift, axis=(0, 1))[6:26, 6:26]
        return np.corrcoef(moved.ravel(), mean.mean(-1)[6:26, 6:26].ravel())[0, 1]

    shifts = [(dy, dx) for dy in (-3, 0, 3) for dx in (-3, 0, 3)]
    assert max(shifts, key=correlation) == (0, 0)
