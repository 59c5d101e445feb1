"""Sweeps: what a grid expands to, and that no death of the process loses or repeats a cell."""

import dataclasses
import errno
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_SHAPE

import ggl_jax as gx
from ggl_jax import checkpoint, trees
from ggl_jax.audit import folder as folders
from ggl_jax.audit import run as runs
from ggl_jax.audit import sweep as sweeps
from ggl_jax.audit.cells import Inputs
from ggl_jax.audit.controls import read_controls
from ggl_jax.commands.sweep import load_grid, read_grid
from ggl_jax.errors import StorageError
from ggl_jax.priors import dcgan
from ggl_jax.types import Defense

SETTINGS = gx.Search(optimizer="cma_es:8", steps=3)


@pytest.fixture
def tiny(tiny_model, tiny_prior, tiny_prior_params, tiny_images):
    """Arguments of a sweep over two images in the tiny prior's range."""
    return {
        "images": np.asarray(tiny_images),
        "labels": [0, 1],
        "model": tiny_model,
        "prior": tiny_prior,
        "prior_params": tiny_prior_params,
        "search": SETTINGS,
        "num_controls": 8,
        "ceiling_steps": 3,
    }


def lines(folder):
    """All rows and failures on disk, as a reader without our code would see them."""
    found = [json.loads(p.read_text()) for p in sorted(Path(folder).glob("cells/*.json"))]
    return [row for one in found for row in one.get("rows", [one])]


def plan(**given):
    """A grid's cells."""
    names = ("axes", "search", "client", "exclude")
    own = {name: given.pop(name) for name in names if name in given}
    return sweeps.plan(Inputs(**given), own.pop("axes"), **own).cells


# --- the grid -----------------------------------------------------------------------------------


def test_a_grid_is_the_product_of_its_axes_less_the_exclusions(tiny):
    axes = {
        "defense": ["none", "noise:{0.1,0.2}"],
        "attack": ["ggl", "ig"],
        "steps": [2, 3],
        "seed": [0, 1],
    }
    with pytest.raises(gx.GGLError, match="attack is no axis of one given search"):
        plan(**tiny, axes=axes)
    tiny["search"] = "paper"
    cells = plan(**tiny, axes=axes)
    assert len(cells) == 3 * 2 * 2 * 2 * 2
    assert len({cell.id for cell in cells}) == len(cells)
    exclude = [
        {"attack": "ig", "defense": "noise:*"},
        {"image": "image-1", "seed": 1},
        {"optimizer": "adam*", "steps": [3, 9]},
    ]
    left = plan(**tiny, axes=axes, exclude=exclude)
    expected = [
        (defense, attack, steps, seed, image)
        for attack in ("ggl", "ig")
        for steps in (2, 3)
        for defense in ("none", "noise:0.1", "noise:0.2")
        for seed in (0, 1)
        for image in ("image-0", "image-1")
        if not (attack == "ig" and defense != "none")
        and not (image == "image-1" and seed == 1)
        # Published inverting gradients searches by Adam.
        and not (attack == "ig" and steps == 3)
    ]
    found = [
        tuple(cell.axes[k] for k in ("defense", "attack", "steps", "seed", "image"))
        for cell in left
    ]
    assert sorted(found) == sorted(expected)


def test_models_and_weights_are_axes_told_apart_by_their_values(tiny, tmp_path):
    net = gx.convnet(3, TINY_SHAPE, width=2)
    early, late = (jax.jit(net.init)(jax.random.key(i)) for i in (1, 2))
    checkpoint.save(tmp_path / "early", early, {"model": "convnet:2"})
    checkpoint.save(tmp_path / "late", late, {"model": "convnet:2"})
    named = zip(trees.names(early), jax.tree.leaves(early), strict=True)
    np.savez(tmp_path / "early.npz", **{name: np.asarray(leaf) for name, leaf in named})
    paths = [str(tmp_path / name) for name in ("early", "late", "early.npz")]
    tiny["model"] = net
    modes = [f"convnet:2,batch_norm={mode}" for mode in ("eval", "train")]
    axes = {"weights": ["random", *paths[:2]], "model": modes}
    made = plan(**tiny, axes=axes)
    assert len({cell.id for cell in made}) == 3 * 2 * 2
    same = plan(**tiny, axes={**axes, "weights": [paths[2]]})
    ids = {(c.axes["weights"], c.axes["model"], c.images): c.id for c in made}
    assert [c.id for c in same] == [ids[paths[0], c.axes["model"], c.images] for c in same]
    # A combination that cannot be is no error where it is left out.
    other = {"weights": ["random", paths[0]], "model": ["convnet:2", "convnet:3"]}
    with pytest.raises(
        gx.GGLError, match=r"weights: the tensors.*model convnet .*is convnet:2.*bn1"
    ):
        plan(**tiny, axes=other)
    left = plan(**tiny, axes=other, exclude=[{"weights": paths[0], "model": "convnet:3"}])
    assert len(left) == 3 * 2

    # What a cell finds is what an audit with these weights finds.
    tiny |= {"images": tiny["images"][:1], "labels": [0]}
    axes["weights"] = ["random", paths[1]]
    result = gx.sweep(**tiny, axes=axes, out=tmp_path / "run")
    (alone,) = gx.audit(**tiny, defenses=["none"], variables=late).rows
    losses = {(r["axes"]["weights"], r["axes"]["model"]): r["loss"] for r in result.rows}
    assert losses[paths[1], modes[0]] == pytest.approx(alone["loss"], rel=1e-4)
    assert len({float(f"{loss:.3g}") for loss in losses.values()}) == 4
    known = result.records.config["inputs"]
    assert (len(known["variables"]), len(known["model"])) == (2, 2)


def test_a_cells_name_follows_what_it_computes_and_nothing_else(tiny):
    def ids(**changes):
        return [c.id for c in plan(**tiny | {"axes": {"seed": [0]}} | changes)]

    base = ids()
    assert ids(axes={"seed": [0], "defense": ["none"]}) == base
    assert ids(axes={"seed": [1, 0]})[2:] == base
    assert ids(speed=gx.Speed(chunk_size=4, instances=2, precision="float32")) == base
    assert ids(others=np.zeros((1, *TINY_SHAPE), np.float32)) == base
    for change in (
        {"search": dataclasses.replace(SETTINGS, steps=4)},
        {"client": gx.Client(local_steps=2)},
        {"images": tiny["images"][::-1]},
        {"labels": [1, 1]},
        {"num_controls": 9},
        {"prior_params": jax.tree.map(lambda x: 2 * x, tiny["prior_params"])},
        {"axes": {"defense": ["clip:1"]}},
    ):
        assert ids(**change)[0] != base[0], change


def test_expand():
    assert sweeps.expand("clip:{1,2}+noise:{0.1, 0.2}") == [
        "clip:1+noise:0.1",
        "clip:1+noise:0.2",
        "clip:2+noise:0.1",
        "clip:2+noise:0.2",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axes": {"step": [1]}}, "did you mean 'steps'"),
        ({"axes": {"seed": []}}, "at least one value"),
        ({"axes": {"seed": 3}}, "a list"),
        ({"axes": {"seed": [0, 0]}}, "twice"),
        ({"axes": {"seed": [-1]}}, "at least 0"),
        ({"axes": {"defense": ["nose:1"]}}, "did you mean 'noise'"),
        ({"axes": {"attack": ["gll"]}, "search": "paper"}, "did you mean 'ggl'"),
        ({"axes": {"steps": [0]}}, "steps: got 0"),
        ({"axes": {}, "search": "fast"}, "preset: got 'fast'"),
        ({"axes": {}, "exclude": [{"attack": "ig"}]}, "matches no cell"),
        ({"axes": {}, "exclude": [{"atack": "ig"}]}, "atack"),
        ({"axes": {}, "exclude": [{"attack": "ggl"}]}, "no cell is left"),
        ({"axes": {"batch_size": [3]}}, "batch"),
    ],
)
def test_mistakes_in_a_grid_are_named(tiny, changes, words):
    with pytest.raises(gx.GGLError, match=words):
        plan(**tiny | changes)


# --- running ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "batch_size"),
    [
        ({"defense": ["none", "clip:0.5"], "seed": [0, 7], "optimizer": ["adam"]}, 1),
        ({"batch_size": [2], "seed": [7], "optimizer": ["adam"]}, 2),
    ],
)
def test_cells_are_what_audits_compute(tiny, tmp_path, axes, batch_size):
    result = gx.sweep(**tiny, axes=axes, out=tmp_path)
    assert not result.failures
    assert len(result.rows) == 2 * len(axes["seed"]) * len(axes.get("defense", ["none"]))
    alone = gx.audit(
        **{k: v for k, v in tiny.items() if k != "search"},
        search=dataclasses.replace(SETTINGS, optimizer="adam"),
        client=gx.Client(batch_size=batch_size),
        defenses=axes.get("defense", ["none"]),
        seed=7,
    )
    by_key = {(r["seed"], r["defense"], r["image"]): r for r in result.rows}
    for row in alone.rows:
        own = by_key[7, row["defense"], row["image"]]
        for name in ("loss", "psnr", "psnr_ceiling", "psnr_control_best"):
            np.testing.assert_allclose(own[name], row[name], rtol=1e-4)
    for row in result.rows:
        assert (tmp_path / row["reconstruction"]).is_file()
        controls, original = read_controls(tmp_path / row["controls"])
        assert controls.scores["psnr_ceiling"] == row["psnr_ceiling"]
        position = int(row["image"].removeprefix("image-"))
        np.testing.assert_array_equal(original, tiny["images"][position])
    # Nothing is left to do: no audit is run again.
    before = lines(tmp_path)
    assert gx.sweep(**tiny, axes=axes, out=tmp_path).rows == result.rows
    assert lines(tmp_path) == before


def poisonous(image: int) -> Defense:
    """A defense whose update is NaN for one image of the two."""

    def apply(key, update, context):
        bad = context.labels[0] == image
        return jax.tree.map(lambda g: jax.numpy.where(bad, jax.numpy.nan, g), update)

    return gx.from_function(apply, name="poison")


def test_a_failing_cell_is_recorded_and_the_others_go_on(tiny, tmp_path, monkeypatch):
    tiny["speed"] = gx.Speed(instances=2)
    axes = {"defense": [poisonous(1), "none"]}
    result = gx.sweep(**tiny, axes=axes, out=tmp_path)
    assert len(result.records.finished) == 3
    (cell,) = result.failures
    assert result.records.cells[cell]["image"] == "image-1"
    assert "NaN" in result.failures[cell]
    before = lines(tmp_path)
    # A failed cell is settled, until it is asked for.
    gx.sweep(**tiny, axes=axes, out=tmp_path)
    assert lines(tmp_path) == before
    for module in ("client.share.trees", "adversary.estimation"):
        monkeypatch.setattr(f"ggl_jax.{module}.check_finite", lambda *args: None)
    retried = gx.sweep(**tiny, axes=axes, out=tmp_path, retry_failed=True)
    assert not retried.failures
    assert len(lines(tmp_path)) == len(before)
    assert not [line for line in lines(tmp_path) if "failed" in line]


def test_ctrl_c_keeps_what_is_done(tiny, tmp_path):
    def interrupt(phase, number, total, fraction, loss):
        if number == 1 and "search" in phase:
            raise KeyboardInterrupt

    tiny["speed"] = gx.Speed(instances=1)
    result = gx.sweep(**tiny, axes={"seed": [0, 1]}, out=tmp_path, progress=interrupt)
    assert result.interrupted
    assert len(result.records.finished) == 1
    assert len(result.records.left) == 3
    assert not gx.sweep(**tiny, axes={"seed": [0, 1]}, out=tmp_path).records.left


def test_a_batch_too_large_for_memory_is_split_for_good(tiny, tmp_path, monkeypatch):
    sizes = []
    whole = runs.reconstruct

    def limited(keys, public, shared, **options):
        sizes.append(len(shared))
        if len(shared) > 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
        return whole(keys, public, shared, **options)

    monkeypatch.setattr(runs, "reconstruct", limited)
    tiny["speed"] = gx.Speed(instances=2)
    result = gx.sweep(**tiny, axes={"seed": [0, 1]}, out=tmp_path)
    assert not result.failures
    assert len(result.records.finished) == 4
    assert sizes == [2, 1, 1, 1, 1]


def test_another_configuration_is_refused_with_a_diff_or_extends(tiny, tmp_path):
    gx.sweep(**tiny, axes={"defense": ["none"]}, out=tmp_path)
    wider = {"defense": ["none", "clip:1"]}
    with pytest.raises(gx.GGLError, match=r"axes\.defense: \+ 'clip:1'.*--extend"):
        gx.sweep(**tiny, axes=wider, out=tmp_path)
    changed = tiny | {"search": dataclasses.replace(SETTINGS, steps=2)}
    with pytest.raises(gx.GGLError, match=r"search\.steps: 3 -> 2"):
        gx.sweep(**changed, axes={"defense": ["none"]}, out=tmp_path)
    assert len(lines(tmp_path)) == 2
    extended = gx.sweep(**tiny, axes=wider, out=tmp_path, extend=True)
    assert len(extended.records.cells) == 4
    assert len(lines(tmp_path)) == 4
    # What is finished stays, though the grid of today has no such cell.
    narrow = gx.sweep(**tiny, axes={"defense": ["clip:1"]}, out=tmp_path, extend=True)
    assert len(narrow.rows) == 4
    assert len(lines(tmp_path)) == 4
    # What was extended to is now the configuration; the grid before is not.
    assert len(gx.sweep(**tiny, axes={"defense": ["clip:1"]}, out=tmp_path).rows) == 4
    with pytest.raises(gx.GGLError, match="--extend"):
        gx.sweep(**tiny, axes=wider, out=tmp_path)
    history = json.loads((tmp_path / "config.json").read_text())["history"]
    assert [old["options"]["axes"]["defense"] for old in history] == [["none"], wider["defense"]]


# --- the folder ---------------------------------------------------------------------------------


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tiny, tmp_path, monkeypatch):
    axes = {"defense": ["none", "clip:0.5"]}
    expected = gx.sweep(**tiny, axes=axes, out=tmp_path / "undisturbed").records
    out = tmp_path / "full"
    whole, written = os.replace, []

    def full(source, target):
        if Path(target).parent.name == "cells":
            written.append(target)
            # in the midst of the third cell: its images are there, its rows are not
            if len(written) == 9:
                raise OSError(errno.ENOSPC, "No space left on device")
        whole(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="no space left"):
        gx.sweep(**tiny, axes=axes, out=out)
    assert len(lines(out)) == 2
    assert not list(out.rglob("*.part"))
    assert len(gx.sweep(**tiny, axes=axes, out=out).rows) == 4
    assert {row["cell"] for row in lines(out)} == expected.finished


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="needs root")
def test_a_full_file_system(tiny, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = "size=40k,nr_inodes=200"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        out = disk / "sweep"
        axes = {"seed": list(range(4))}
        with pytest.raises(StorageError, match="no space left"):
            gx.sweep(**tiny, axes=axes, out=out)
        kept = [row["cell"] for row in lines(out)]
        assert kept
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        result = gx.sweep(**tiny, axes=axes, out=out)
        found = [row["cell"] for row in lines(out)]
        assert len(result.rows) == 8
        assert set(kept) < set(found)
        assert len(found) == len(set(found)) == 8
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


# --- processes ----------------------------------------------------------------------------------

SCRIPT = textwrap.dedent(
    """
    import os, sys
    sys.path.insert(0, {tests!r})
    import conftest, jax, numpy as np, ggl_jax as gx
    from ggl_jax.commands import _devices
    coordinator, number, process = sys.argv[3:6] if len(sys.argv) > 3 else (None, None, None)
    if coordinator:
        _devices.join(coordinator, int(number), int(process), False)
    model = conftest.from_flax(conftest.TinyNet(), image_shape=conftest.TINY_SHAPE, num_classes=3)
    prior = conftest.make_tiny_prior()
    params = prior.init(jax.random.key(1))
    latents = prior.sample_latent(jax.random.key(2), 5)
    images = np.asarray(prior.apply(params, latents, None))
    def said(phase, number, total, fraction, loss):
        print(phase, number, flush=True)
    settings = {{
        "many": gx.Search(optimizer="cma_es:8", steps=3),
        "one": gx.Search(optimizer="cma_es:9", steps=3),
        "cells": gx.Search(optimizer="cma_es:8", steps=2),
    }}[sys.argv[2]]
    axes = {{"defense": ["clip:0.5"], "seed": [0]}}
    if sys.argv[2] == "cells":
        axes = {{"defense": ["none", "clip:0.5"], "seed": [0, 1]}}
    try:
        result = gx.sweep(
            images, [0, 1, 2, 0, 1], model=model, prior=prior, prior_params=params,
            axes=axes,
            search=settings, num_controls=8, ceiling_steps=3, out=sys.argv[1], progress=said,
            mesh=_devices.mesh(len(jax.devices()) > 1),
        )
    except gx.GGLError as error:
        print("GGLError", error, flush=True)
        sys.exit(2)
    print("FINISHED", len(result.rows), len(result.failures), flush=True)
    """
).format(tests=str(Path(__file__).parent))


def start(out, kind, *args, devices=1):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    flags = environment["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out), kind, *map(str, args)],
        env={**environment, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    output = process.communicate(timeout=240)[0]
    assert process.returncode == code, output
    return output


def kill_again_and_again(out, kills, seed):
    """Start, kill at a random moment of a random cell, start again; then let it finish."""
    chance = random.Random(seed)
    for _ in range(kills):
        process = start(out, "cells")
        # Up to a random message after the first cell began, then a random moment more.
        messages = chance.randrange(1, 12)
        for line in process.stdout:
            messages -= "search" in line
            if messages <= 0 or "FINISHED" in line:
                break
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        # Half a file, as a kill in the middle of a write would leave.
        if (out / "cells").exists() and chance.random() < 0.5:
            (out / "cells" / "0123.json.part").write_text('{"rows": [{"cell": "0123", "par')
    assert "FINISHED 20 0" in finish(start(out, "cells"))


def compare_with_undisturbed(tmp_path, kills, seed):
    kill_again_and_again(tmp_path / "killed", kills, seed)
    finish(start(tmp_path / "undisturbed", "cells"))
    found, expected = (lines(tmp_path / name) for name in ("killed", "undisturbed"))
    assert len(found) == len(expected) == 20  # each cell once
    expected = {row["cell"]: row for row in expected}
    assert {row["cell"] for row in found} == set(expected)
    for row in found:
        for name in ("loss", "psnr", "psnr_ceiling", "defense", "seed", "image"):
            assert row[name] == expected[row["cell"]][name], name
    status = folders.read(tmp_path / "killed")
    assert (len(status.finished), len(status.failures), status.left) == (20, 0, [])


@pytest.mark.slow
def test_killed_sweeps_go_on(tmp_path):
    compare_with_undisturbed(tmp_path, kills=1, seed=1)


@pytest.mark.slow
def test_a_sweep_killed_ten_times_goes_on(tmp_path):
    compare_with_undisturbed(tmp_path, kills=10, seed=0)


def test_a_second_process_on_a_folder_is_refused(tiny, tmp_path):
    with folders.lock(tmp_path):
        before = sorted(tmp_path.iterdir())
        assert "is in use by process" in finish(start(tmp_path, "cells"), code=2)
        assert sorted(tmp_path.iterdir()) == before
    with folders.lock(tmp_path):
        pass


def losses(folder):
    return {row["cell"]: (row["loss"], row["psnr"]) for row in lines(folder)}


def assert_same(folder, reference):
    found, expected = losses(folder), losses(reference)
    assert found.keys() == expected.keys()
    for cell, values in found.items():
        # Programs of other shapes round differently; three steps do not amplify that much.
        np.testing.assert_allclose(values, expected[cell], rtol=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Results of one device, by kind of batch."""

    @functools.cache
    def run_alone(kind):
        out = tmp_path_factory.mktemp("alone") / kind
        assert "FINISHED 5 0" in finish(start(out, kind))
        return out

    return run_alone


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["many", "one"])
def test_four_devices_find_what_one_finds(tmp_path, kind, alone):
    assert "FINISHED 5 0" in finish(start(tmp_path / "four", kind, devices=4))
    assert_same(tmp_path / "four", alone(kind))


def free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["many", pytest.param("one", marks=pytest.mark.slow)])
def test_two_processes_find_what_one_finds(tmp_path, kind, alone):
    coordinator = f"127.0.0.1:{free_port()}"
    for process in [start(tmp_path / "two", kind, coordinator, 2, i) for i in range(2)]:
        assert "FINISHED 5 0" in finish(process)
    assert_same(tmp_path / "two", alone(kind))
    cells = [row["cell"] for row in lines(tmp_path / "two")]
    assert len(cells) == len(set(cells))


def test_the_work_is_really_shared_out():
    """Each device of four evaluates (and denoises) a quarter of the candidates, or of instances."""
    script = textwrap.dedent(
        """
        import jax, jax.numpy as jnp, numpy as np
        from ggl_jax.adversary import sharding
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("any",))
        layout = sharding.Layout(mesh, 1)
        shapes = []
        def loss(x):
            shapes.append(x.shape)
            return jnp.sum(x, axis=1)
        with layout.active():
            out = jax.jit(lambda x: sharding.over_population(loss)(x))(jnp.ones((10, 3)))
        assert shapes == [(3, 3)] and out.shape == (10,), (shapes, out.shape)
        import ggl_jax as gx
        from ggl_jax.adversary import attack
        shapes = []
        def denoise(params, images):
            shapes.append(images.shape)
            return params * images
        model, prior = gx.mlp(image_shape=(4, 4, 3)), gx.pixels((4, 4, 3))
        search = gx.Search(space="pixels", regularizer="denoised:2")
        space = attack._space(model, prior, search, 1)
        of = attack._penalties(model, prior._replace(denoise=denoise), search, space)
        penalty = of(gx.Problem({}, {}, jnp.float32(0.9), jnp.zeros(1), {}))
        points = jax.random.uniform(jax.random.key(0), (10, 48))
        images = points.reshape(10, 1, 4, 4, 3)
        alone = penalty(points, images)
        with layout.active():
            found = jax.jit(penalty)(points, images)
        assert shapes == [(10, 4, 4, 3), (3, 4, 4, 3)], shapes
        np.testing.assert_allclose(found, alone, rtol=1e-6)
        np.testing.assert_allclose(alone, 0.01 * (points**2).sum(1), rtol=1e-5)
        layout = sharding.Layout(mesh, 5)
        assert layout.num_padded == 8
        x = layout.instances(jnp.arange(8.0))
        assert [s.data.shape for s in x.addressable_shards] == [(2,)] * 4
        np.testing.assert_array_equal(layout.fetch(x), np.arange(5.0))
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)


def test_importing_the_package_starts_no_device():
    """Or several processes could not be joined any more."""
    script = "import ggl_jax.cli; from jax._src import xla_bridge as x; assert not x._backends"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)


# --- grid files ---------------------------------------------------------------------------------


def grid_file(tmp_path, text):
    path = tmp_path / "grid.toml"
    path.write_text(textwrap.dedent(text))
    return path


def test_a_grid_file(tmp_path):
    grid = read_grid(
        grid_file(
            tmp_path,
            """
            preset = "paper"
            fixed = {num_controls = 3, finalists = 1}
            [axes]
            image = [0, 2]
            restarts = [1, 2]
            [[exclude]]
            restarts = 2
            """,
        )
    )
    assert grid.fixed.judge.num_controls == 3
    assert (grid.search, grid.axes) == ({"finalists": 1}, {"restarts": [1, 2]})
    assert grid.options == {
        "preset": "paper",
        "fixed": {"num_controls": 3, "finalists": 1},
        "axes": {"restarts": [1, 2], "image": "0,2"},
        "exclude": [{"restarts": 2}],
    }


def test_a_grid_files_model_has_the_classes_of_its_prior(tmp_path):
    arguments = {"width": 2, "latent_dim": 4, "num_classes": 5}
    card = {"name": "five", "kind": "dcgan", "arguments": arguments, "trained_on": [], "data": []}
    checkpoint.save(tmp_path / "five", dcgan(**arguments).init(jax.random.key(0)), card)
    fixed = f'fixed = {{prior = "{tmp_path / "five"}", model = "lenet"}}'
    grid = load_grid(read_grid(grid_file(tmp_path, fixed)))
    assert grid.inputs.model.num_classes == 5
    assert all(cell.evaluations for cell in grid.cells)
    # Another number cannot be searched; its cell says so when it is run.
    grid = load_grid(read_grid(grid_file(tmp_path, fixed.replace("}", ", num_classes = 4}"))))
    assert grid.inputs.model.num_classes == 4
    assert not any(cell.evaluations for cell in grid.cells)


def test_a_grid_file_names_models_and_weights(tmp_path):
    net = gx.convnet(4, (32, 32, 3), width=2)
    weights = jax.jit(net.init)(jax.random.key(3))
    checkpoint.save(tmp_path / "early", jax.tree.map(jnp.ones_like, weights), {})
    checkpoint.save(tmp_path / "late", weights, {})
    early, late = f'"{tmp_path / "early"}"', f'"{tmp_path / "late"}"'
    modes = 'model = ["convnet:2,batch_norm={eval,train}"]'
    axes = f'[axes]\n{modes}\nweights = ["random", {early}, {late}]'
    grid = load_grid(read_grid(grid_file(tmp_path, axes)))
    # The classes are those of the weights that are read, for random ones, too.
    assert [cell.inputs.model.num_classes for cell in grid.cells] == [4] * 6
    assert sum(cell.inputs.variables is None for cell in grid.cells) == 2
    fixed = f'fixed = {{model = "convnet:2", weights = {late}}}'
    (cell,) = load_grid(read_grid(grid_file(tmp_path, fixed))).cells
    assert jax.tree.all(jax.tree.map(np.array_equal, cell.inputs.variables, weights))
    with pytest.raises(gx.GGLError, match=r"num_classes: got 5, but .*late are weights of 4"):
        load_grid(read_grid(grid_file(tmp_path, fixed.replace("}", ", num_classes = 5}"))))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("axes = [", "not TOML"),
        ("[axis]\nseed = [0]", "axis"),
        ("preset = 'fast'", "preset"),
        ("[fixed]\nnum_control = 3", "did you mean 'num_controls'"),
        ("[fixed]\nnum_controls = '3'", "num_controls: got '3'"),
        ("[fixed]\nseed = 1", r"seed is an axis; write seed = \[...\]"),
        ("[fixed]\nindices = '0:2'", "write image = "),
        ("[fixed]\nout = 'x'", "out: no such option"),
        ("[fixed]\nsteps = 1\n[axes]\nsteps = [1]", "fixed and an axis"),
        ("[axes]\nsteps = [1.5]", "steps: got 1.5"),
        ("[axes]\nsupport = ['all']", "support"),
        ("[axes]\nfinalists = ['published']", "finalists"),
        ("[axes]\nimages = [1]", "did you mean 'image'"),
    ],
)
def test_mistakes_in_a_grid_file_are_named(tmp_path, text, words):
    with pytest.raises(gx.GGLError, match=words):
        read_grid(grid_file(tmp_path, text))
    with pytest.raises(gx.GGLError, match="does not exist"):
        read_grid(tmp_path / "none.toml")
