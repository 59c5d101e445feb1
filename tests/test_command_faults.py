"""Faults of what the command line is given: one line on stderr, exit 2, and nothing is left."""

import json
import shlex
import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from ggl_jax import checkpoint, trees
from ggl_jax.__main__ import main
from ggl_jax.cli import OPTIONS
from ggl_jax.client.models import get_model
from ggl_jax.priors import dcgan
from ggl_jax.spec import options_of

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (4, 32, 32, 3), np.uint8)
LABELS = np.array([0, 1, 0, 1])
MODEL = "mlp:width=4"

#: Archives that are no data for an audit.
DATA = {
    "good": {"images": IMAGES, "labels": LABELS},
    "many": {"images": np.repeat(IMAGES, 10, axis=0), "labels": np.repeat(LABELS, 10)},
    "unlabelled": {"images": IMAGES},
    "floats": {"images": IMAGES / 255.0},
    "nans": {"images": np.full(IMAGES.shape, np.nan, np.float32)},
    "nothing": {"images": IMAGES[:0]},
    "flat": {"images": IMAGES.reshape(4, -1)},
    "two-channels": {"images": IMAGES[..., :2]},
    "objects": {"images": np.array([IMAGES[0], None], dtype=object)},
    "other-names": {"x": IMAGES},
    "few-labels": {"images": IMAGES, "labels": LABELS[:3]},
    "negative": {"images": IMAGES, "labels": LABELS - 1},
    "fractions": {"images": IMAGES, "labels": LABELS / 2},
    "texts": {"images": IMAGES, "labels": np.array(list("abcd"))},
    "identifiers": {"images": IMAGES, "labels": LABELS + 2**20},
    "past-int32": {"images": IMAGES, "labels": LABELS + 2**40},
}

#: What becomes of each tensor of the model: files that are no update, or no weights.
TENSORS = {
    "update": lambda x: RNG.normal(size=x.shape).astype(np.float32),
    "weights": lambda x: x,
    "zeros": lambda x: 0 * x,
    "not-a-number": lambda x: x * np.nan,
    "infinite": lambda x: x + np.inf,
    "huge": lambda x: x * 1e30,
    "tiny": lambda x: x * 1e-30,
    "complex": lambda x: x.astype(complex),
    "words": lambda x: np.array("x"),
    "objects-of-tensors": lambda x: np.array([x, None], dtype=object),
    "deeper": lambda x: np.ones((3, *x.shape), np.float32),
    "transposed": lambda x: x.T,
}

GRIDS = {
    "cut": "axes = [",
    "list": "axes = [1]",
    "no-list": "[axes]\nseed = 0",
    "empty-axis": "[axes]\ndefense = []",
    "date": "[axes]\nseed = [2020-01-01]",
    "preset": "preset = 3",
    "seed": f"[axes]\nseed = [{2**63}]",
    "exclude": "exclude = 'x'",
    "table": "[axis]\nseed = [0]",
    "axis": "[axes]\ndefence = ['none']",
    "option": "[fixed]\nnum_control = 3",
    "type": "[fixed]\nnum_controls = '3'",
    "defense": "[axes]\ndefense = ['clipp:4']",
    "brace": "[axes]\ndefense = ['clip:{1,2']",
    "attack": "[axes]\nattack = ['igg']",
    "optimizer": "[axes]\noptimizer = ['adma']",
    "model": "axes.model = ['mpl']",
    "weights": "[axes]\nweights = ['none.npz']",
    "image": "[axes]\nimage = [99]",
    "data": "[fixed]\ndata = 'none.npz'",
    "prior": "[fixed]\nprior = 'dcgan32_face'",
}


def save(path, tensors):
    np.savez(path, **tensors)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A folder of everything that the commands name; ``@`` stands for it."""
    root = tmp_path_factory.mktemp("stock")
    for name, arrays in DATA.items():
        save(root / f"{name}.npz", arrays)
    whole = (root / "good.npz").read_bytes()
    (root / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (root / "text.npz").write_text("images\n")
    (root / "empty.npz").write_bytes(b"")
    (root / "single.npz").write_bytes(np_bytes(IMAGES))
    (root / "file").write_text("x\n")
    for name in ("folder", "broken", "unreadable", "pictures", "thesis"):
        (root / name).mkdir()
    Image.fromarray(IMAGES[0]).save(root / "pictures" / "a.png")
    Image.fromarray(IMAGES[0]).save(root / "unreadable" / "a.png")
    (root / "unreadable" / "labels.csv").write_text("name;class\n")
    (root / "broken" / "a.png").write_bytes(b"\x89PNG\r\n")
    (root / "broken" / "labels.csv").write_text("file,label\na.png,0\n")
    (root / "thesis" / "thesis.tex").write_text("do not touch")

    params = get_model(MODEL).init(jax.random.key(0))["params"]
    leaves = dict(zip(trees.names(params), map(np.asarray, jax.tree.leaves(params)), strict=True))
    for name, change in TENSORS.items():
        save(root / f"{name}.npz", {k: change(x) for k, x in leaves.items()})
    save(root / "no-head.npz", {k: x for k, x in leaves.items() if not k.startswith("fc/")})
    save(root / "others.npz", {"foo": np.ones(3, np.float32)})
    save(root / "no-tensors.npz", {})
    five = get_model(MODEL, 5).init(jax.random.key(0))["params"]
    save(root / "five-classes.npz", dict(zip(leaves, jax.tree.leaves(five), strict=True)))
    (root / "text.pt").write_text("x")
    (root / "text.safetensors").write_text("x")
    (root / "weights.h5").write_text("x")

    prior = dcgan(width=2, latent_dim=4)
    arguments = {"width": 2, "latent_dim": 4}
    card = {"name": "tiny", "kind": "dcgan", "arguments": arguments, "trained_on": ["lfw"]}
    checkpoint.save(root / "prior", prior.init(jax.random.key(0)), {**card, "data": []})
    card = json.loads((root / "prior" / "card.json").read_text())
    cards = {
        "kind": {**card, "kind": "dcgam"},
        "arguments": {**card, "arguments": {"width": 2, "latent_dim": 5}},
        "argument": {**card, "arguments": {"widht": 2}},
        "damaged": {**card, "sha256": "0" * 64},
        "list": [],
    }
    for name, changed in cards.items():
        shutil.copytree(root / "prior", root / f"prior-{name}")
        (root / f"prior-{name}" / "card.json").write_text(json.dumps(changed))
    for name, text in GRIDS.items():
        fixed = f"[fixed]\nmodel = '{MODEL}'\n[axes]"
        (root / f"{name}.toml").write_text(text.replace("[axes]", fixed))
    (root / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (root / "fails.py").write_text("import numpy\nnumpy.nothing\n")
    (root / "syntax.py").write_text("def\n")
    return root


def np_bytes(array):
    from io import BytesIO

    stream = BytesIO()
    np.save(stream, array)
    return stream.getvalue()


AUDIT = f"audit --prior @/prior --model {MODEL} --attack ig --steps 1 --restarts 1 --out out"
ATTACK = f"attack --weights @/weights.npz --gradient @/update.npz --prior @/prior --model {MODEL}"
ATTACK += " --attack ig --steps 1 --restarts 1 --out out"
UNREADABLE = "not a readable .npz file"
#: Every command that has a seed.
SEEDED = [
    AUDIT, ATTACK, "reproduce table3 --data @/good.npz", "landscape", "leaderboard",
    "utility --defenses none --data @/many.npz --out out", "train-model --data @/good.npz",
    "train-prior --data @/good.npz", "train-denoiser --data @/good.npz",
    "score-prior --data @/good.npz", "sample-prior",
]  # fmt: skip


def audits(option, faults, command=AUDIT):
    return {(option, given): (f"{command} {option} {given}", faults[given]) for given in faults}


def attacks(option, faults):
    found = audits(option, faults, ATTACK)
    return {(f"attack {option}", given): one for (option, given), one in found.items()}


def commands(faults):
    return {tuple(command.split(maxsplit=1)): (command, words) for command, words in faults.items()}


#: Kind of input, kind of fault -> the command, and what its line says.
FAULTS = {
    **audits("--data", {
        "@/cut.npz": [UNREADABLE], "@/text.npz": [UNREADABLE], "@/empty.npz": [UNREADABLE],
        "@/single.npz": [UNREADABLE, "single array"], "@/objects.npz": [UNREADABLE, "pickle"],
        "@/floats.npz": ["float64", "uint8"], "@/nans.npz": ["float32", "uint8"],
        "@/nothing.npz": ["no images"], "@/flat.npz": ["[4, 3072]"],
        "@/two-channels.npz": ["[4, 32, 32, 2]"], "@/other-names.npz": ["only x"],
        "@/few-labels.npz": ["labels", "[3]", "[4]"], "@/negative.npz": ["label -1"],
        "@/fractions.npz": ["float64", "whole numbers"], "@/texts.npz": ["whole numbers"],
        "@/identifiers.npz": ["at most 262,144"], "@/past-int32.npz": ["not allowed"],
        "@/unlabelled.npz": ["--label"], "@/weights.npz": ["no array `images`"],
        "@/none.npz": ["not there"], "@/none": ["not there"], "embeded": ["'embedded'"],
        "@/folder": ["no images"], "@/prior": ["no images"], "@/file": ["neither an .npz"],
        "@/pictures": ["no labels"], "@/broken": ["a.png", "corrupt"],
        "@/unreadable": ["labels.csv", "name;class"], "embedded:faces": ["lfw"],
        "tfds:": ["tfds:NAME"], "tfds:nothing_at_all": ["nothing_at_all"],
        "tfds:celeb_a?data_dir=@/folder": ["not prepared", "tfds build"],
        "@/good.npz --indices 4": ["'4'", "below 4"], "@/good.npz --indices -1": ["'-1'"],
        "@/good.npz --indices 1,1": ["is there twice"], "@/good.npz --indices ''": ["indices"],
        "@/good.npz --indices 0:100:10": ["'0:100:10'"], "@/good.npz --indices x": ["'x'"],
        "@/good.npz --batch-size 3": ["batch_size", "3"],
    }),
    **audits("--label", {
        "-1": ["label: got -1"], "x": ["label: got 'x'", "whole numbers"],
        "2147483646": ["num_classes=2147483647", "at most"],
    }),
    **audits("--num-classes", {"0": ["num_classes: got 0"], "1": ["num_classes: got 1"]}),
    **audits("--weights", {
        "randm": ["did you mean 'random'"], "@/none.npz": ["does not exist"],
        "@/not-a-number.npz": ["fc.bias", "finite"], "@/infinite.npz": ["finite"],
        "@/zeros.npz": ["same features and logits"], "@/deeper.npz": ["no matrix fc.kernel"],
        "@/no-head.npz": ["no matrix fc.kernel"], "@/text.npz": ["pickle"],
        "@/cut.npz": ["zip"], "@/objects-of-tensors.npz": ["Object arrays"],
        "@/text.pt": ["cannot be read"], "@/text.safetensors": ["cannot be read"],
        "@/weights.h5": ["unknown type"], "@/folder": ["no checkpoint"],
        "@/prior": ["holds no model"], "@/good.npz": ["fc.kernel"], "@/no-tensors.npz": ["no ent"],
        "@/five-classes.npz --num-classes 2": ["num_classes: got 2", "5 classes"],
        "@/weights.npz --model lenet": ["lenet"],
    }),
    **audits("--prior", {
        "dcgan32_face": ["did you mean 'dcgan32_faces'"], "@/none": ["neither a folder"],
        "@/folder": ["card.json"], "@/file": ["neither a folder"], "@/good.npz": ["neither"],
        "@/prior-kind": ["'dcgam'"], "@/prior-arguments": ["latent_dim", "5"],
        "@/prior-argument": ["arguments do not fit"], "@/prior-damaged": ["sha256"],
        "@/prior-list": ["no card"],
    }),
    **audits("--defenses", {
        "": ["got none"], "''": ["got ''"], "clipp:4": ["did you mean 'clip'"],
        "clip:-1": ["got -1"], "clip:nan": ["got nan"], "clip:inf": ["got inf"],
        "clip:abc": ["'abc'"], "clip:1:2": ["'1:2'"], "clip:4,4": ["is not understood"],
        "clip:4+": ["got ''"], "noise:0.1+nise:1": ["did you mean 'noise'"],
        "sparsify:1.5": ["rate", "1.5"], "none none": ["twice"], "clip:4 clip:4.0": ["twice"],
    }),
    **audits("--attack", {"igg": ["did you mean 'ig'"], "": ["got nothing"]}),
    **audits("--optimizer", {
        "adma": ["did you mean 'adam'"], "adam:rate=1": ["rate=1", "learning_rate"],
        "cma_es:2": ["population", "2"],
    }),
    **audits("--regularizer", {
        "total_variatio:1": ["did you mean 'total_variation'"], "l2:-1": ["'-1'"],
        "l2:x": ["'x'"], "batch_norm:1": ["BatchNorm"],
    }),
    **audits("--distance", {"cosin": ["did you mean 'cosine'"]}),
    **audits("--model", {
        "mpl": ["did you mean 'mlp'"], "mlp:widht=4": ["width"], "mlp:width=0": ["width: got 0"],
        "resnet18:batch_norm=off": ["batch_norm", "off"],
    }),
    **audits("--space", {"pixel": ["space: got 'pixel'", "did you mean 'pixels'"]}),
    **audits("--labels", {"infered": ["did you mean 'inferred'"]}),
    **audits("--lpips", {"alx": ["lpips: got 'alx'", "did you mean 'alex'"]}),
    **audits("--preset", {"fast": ["preset: got 'fast'", "standard"]}),
    **audits("--local-optimizer", {"sdg": ["did you mean 'sgd'"]}),
    **audits("--steps", {
        "": ["steps: got nothing"], "0": ["steps: got 0"], "1e3": ["steps: got '1e3'"],
        "1 --restarts 0": ["restarts: got 0"], "1 --refine pixels --refine-steps 0": ["refine_st"],
        "1 --stepss 3": ["--stepss", "did you mean '--steps'"], "1 extra": ["extra"],
    }),
    **audits("--seed", {"-1": ["seed: got -1"], "x": ["seed: got 'x'"], "1.5": ["'1.5'"]}),
    **audits("--num-controls", {"0": ["num_controls: got 0"]}),
    **audits("--batch-size", {"0": ["batch_size: got 0"], "two": ["batch_size: got 'two'"]}),
    **audits("--local-steps", {"0": ["local_steps: got 0"], "1.5": ["local_steps: got '1.5'"]}),
    **audits("--rounds", {
        "0": ["rounds: got 0"], "2 --defenses mixup": ["rounds: got 2, allowed: 1 for mixup"],
    }),
    **audits("--local-learning-rate", {"0": ["local_learning_rate", "above 0"]}),
    **audits("--memory", {"-1": ["memory: got -1"], "nan": ["memory: got nan"], "x": ["'x'"]}),
    **audits("--adaptive", {"true": ["a switch takes no value", "--no-adaptive"]}),
    **audits("--plugin", {
        "@/none.py": ["plugin: got"], "@/fails.py": ["AttributeError", "nothing"],
        "@/syntax.py": ["SyntaxError"],
    }),
    **audits("--out", {
        "@/file": ["is a file"], "@/file/out": ["Not a directory"],
        "@/thesis": ["not an empty folder"], "/proc/out": ["/proc/out"],
    }),
    **attacks("--gradient", {
        "@/none.npz": ["does not exist"], "@/zeros.npz": ["zero"], "@/tiny.npz": ["or nearly"],
        "@/huge.npz": ["too large"], "@/not-a-number.npz": ["finite"],
        "@/infinite.npz": ["finite"], "@/complex.npz": ["finite real"], "@/text.npz": ["pickle"],
        "@/words.npz": ["no tensor"],
        "@/cut.npz": ["zip"], "@/single.npz": ["single array"], "@/deeper.npz": ["[3, 2]"],
        "@/transposed.npz": ["fc.kernel [2, 4] instead of [4, 2]"], "@/others.npz": ["foo"],
        "@/five-classes.npz": ["fc.bias [5] instead of [2]"], "@/good.npz": ["images"],
        "@/no-tensors.npz": ["no entries"], "@/update.npz --after @/update.npz": ["one of the tw"],
    }),
    **attacks("--weights", {
        "@/none.npz": ["does not exist"], "@/zeros.npz": ["same features"],
        "@/not-a-number.npz": ["finite"], "@/deeper.npz": ["fc.kernel"],
        "@/five-classes.npz": ["fc.bias [2] instead of [5]"],
    }),
    **attacks("--mean", {
        "": ["mean"], "x": ["mean: got 'x'"], "nan": ["mean: got nan"], "inf": ["mean: got inf"],
        "0.1 0.2": ["1 or 3"],
    }),
    **attacks("--std", {
        "0": ["std: got 0"], "-1": ["std: got -1"], "nan": ["std: got nan"], "0.1 0.2": ["1 or 3"],
    }),
    **attacks("--loss-scale", {
        "0": ["loss_scale"], "-1": ["loss_scale"], "nan": ["loss_scale"], "x": ["auto or numbers"],
    }),
    **attacks("--defense", {"clipp:1": ["did you mean 'clip'"]}),
    **attacks("--image", {
        "@/none.png": ["does not exist"], "@/file": ["neither an .npz"],
        "@/broken/a.png": ["corrupt"], "@/pictures/a.png --label 7": ["label: got 7", "0 to 1"],
        "@/pictures/a.png --batch-size 2": ["one image only"], "@/good.npz": ["4 images"],
    }),
    **attacks("--statistics", {"@/none.npz": ["does not exist"], "@/update.npz": ["unknown"]}),
    **attacks("--rounds", {"2": ["rounds: got 2, allowed: 1", "their mean"]}),
    **attacks("--labels", {"smallest --batch-size 9": ["labels: 9"]}),
    **attacks("--regularizer", {"batch_norm:1": ["BatchNorm"]}),
    **attacks("--out", {"@/file": ["is a file"], "@/thesis": ["not an empty folder"]}),
    ("after", "no rate"): (
        ATTACK.replace("--gradient", "--after"), ["--after needs", "--learning-rate"]
    ),
    ("after", "rate 0"): (
        ATTACK.replace("--gradient", "--after") + " --learning-rate 0", ["learning_rate: got 0.0"]
    ),
    ("update", "none"): (ATTACK.replace(" --gradient @/update.npz", ""), ["give --gradient"]),
    **commands({
        "sweep @/cut.toml --out out": ["not TOML"], "sweep @/binary.toml --out out": ["not TOML"],
        "sweep @/none.toml --out out": ["does not exist"], "sweep @/folder --out out": ["no file"],
        "sweep @/list.toml --out out": ["[axes]"], "sweep @/exclude.toml --out out": ["[[exclude"],
        "sweep @/no-list.toml --out out": ["seed is 0"], "sweep @/date.toml --out out": ["seed"],
        "sweep @/empty-axis.toml --out out": ["at least one"],
        "sweep @/preset.toml --out out": ["preset: got 3"],
        "sweep @/table.toml --out out": ["axis"],
        "sweep @/axis.toml --out out": ["did you mean 'defense'"],
        "sweep @/option.toml --out out": ["did you mean 'num_controls'"],
        "sweep @/type.toml --out out": ["num_controls: got '3'"],
        "sweep @/defense.toml --out out": ["did you mean 'clip'"],
        "sweep @/brace.toml --out out": ["'clip:{1,2'"],
        "sweep @/attack.toml --out out": ["did you mean 'ig'"],
        "sweep @/optimizer.toml --out out": ["did you mean 'adam'"],
        "sweep @/model.toml --out out": ["did you mean 'mlp'"],
        "sweep @/weights.toml --out out": ["none.npz"], "sweep @/image.toml --out out": ["99"],
        "sweep @/data.toml --out out": ["none.npz"],
        "sweep @/prior.toml --out out": ["did you mean 'dcgan32_faces'"],
        "sweep @/cut.toml --out out --process-id 0": ["give all three"], "sweep": ["grid"],
        "sweep @/cut.toml --shard 1": ["shard", "takes no value"],
        "report @/none": ["no folder of an audit"], "report @/thesis": ["no folder of an audit"],
        "report": ["folders: got 0"], "check @/none": ["no folder"], "check": ["Folder"],
        "check @/none --max-psnr x": ["--max-psnr"], "status @/file": ["no folder"],
        "reproduce": ["table1"], "reproduce tabel3": ["did you mean 'table3'"],
        "reproduce table3 --data @/good.npz --scale x": ["scale: got 'x'", "paper"],
        "reproduce table3 --data @/good.npz --images 41 --out out": ["images", "41"],
        "landscape --defense nois:1 --out out": ["did you mean 'noise'"],
        "landscape --label 7 --num-classes 2 --out out": ["label", "7"],
        "leaderboard --data @/good.npz --images 9 --out out --prior @/prior --model lenet": ["9"],
        f"utility --defenses clip:-4 --data @/many.npz --model {MODEL} --batch-size 2 --out out": [
            "clip", "-4"
        ],
        f"utility --defenses none --data @/many.npz --model {MODEL} --batch-size 500 --out out": [
            "500"
        ],
        "utility --defenses none --data @/good.npz --model nets --out out": ["nets"],
        "utility --data @/good.npz --rounds 0 --out out": ["rounds: got 0"],
        "train-model --data @/unlabelled.npz --out out": ["no labels"],
        "train-model --data @/good.npz --model mpl --out out": ["did you mean 'mlp'"],
        "train-model": ["--data"], "train-prior --data @/none.npz --out out": ["none.npz"],
        "train-prior --data @/good.npz --holdout 9 --out out": ["holdout", "9"],
        "sample-prior --prior @/none --out out": ["none"],
        "sample-prior --prior @/prior --num 0 --out out": ["num"],
        "sample-prior --prior @/prior --out @/folder": ["exists"],
        "score-prior --data @/good.npz --prior @/folder": ["card.json"],
        "import-prior dcgn --from @/weights.npz --out out": ["got 'dcgn'", "did you mean 'dcgan'"],
        "import-prior dcgan --from @/none.npz --out out": ["none.npz"],
        "import-prior dcgan --from @/weights.npz --out out": ["layers"],
        "weights lpips-vg": ["did you mean 'lpips-vgg'"], "weights": ["lpips-vgg"],
        "check @/none --steps 2": ["options: --steps 2; see ggl-jax check --help"],
        "info extra": ["extra"], "repot": ["did you mean 'report'"], "--versio": ["--versio"],
        **{
            f"{one} --seed {seed}": [f"seed: got {seed}", "below 4,294,967,296"]
            for one in SEEDED for seed in (2**32, 2**63)
        },
        "sweep @/seed.toml --out out": ["seed: got 9223372036854775808", "below 4,294,967,296"],
        "audit --config @/none.json --out out": ["none.json"],
        "audit --config @/prior/card.json --out out": ["config.json"],
    }),
    ("nothing", "at all"): ("", ["audit", "sweep", "--help"]),
}  # fmt: skip


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("fault", FAULTS, ids=" ".join)
def test_one_line_for_each_fault(fault, stock, tmp_path, monkeypatch, capsys):
    command, words = FAULTS[fault]
    argv = [one.replace("@", str(stock)) for one in shlex.split(command)]
    before = everything(stock)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ggl-jax", *argv])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # main puts its own
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert stop.value.code == 2, said.err
    (line,) = said.err.splitlines()
    for word in words:
        assert word in line
    assert "Traceback" not in said.out
    assert not everything(tmp_path)  # nothing is in the corrected command's way
    assert everything(stock) == before


def test_the_table_is_large_enough():
    assert len(FAULTS) >= 200
    seeded = {name for name, kind in OPTIONS.items() if "seed" in options_of(kind)}
    assert seeded == {one.split()[0] for one in SEEDED}
