"""Fetching weights from a server on this machine that misbehaves in all the ways servers do."""

import contextlib
import errno
import hashlib
import http.server
import json
import os
import struct
import threading

import numpy as np
import pytest
from test_cli import one_error_line
from test_lpips import random_tensors

from ggl_jax import checkpoint, foreign
from ggl_jax.audit import lpips, weights
from ggl_jax.cli import run
from ggl_jax.errors import GGLError

CONTENT = np.random.default_rng(0).bytes(1_000_003)


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `ranges` is whether and how it resumes, `cuts` where answers break off."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"/file.pth": CONTENT}
        self.asked: list[int | None] = []  # the Range of each request
        self.ranges = "yes"
        self.cuts: list[int] = []

    def source(self, name, content=None):
        """What is expected at that address."""
        content = self.files[name] if content is None else content
        digest = hashlib.sha256(content).hexdigest()
        url = f"http://127.0.0.1:{self.server_port}{name}"
        return weights.Source(url, digest, len(content), "none")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else None
        self.server.asked.append(start)
        total = len(content)
        if start is not None and start >= total:
            return self.send_error(416)
        if start is not None and self.server.ranges != "no":
            if self.server.ranges == "wrong":
                start = 7
            content = content[start:]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        cut = self.server.cuts.pop(0) if self.server.cuts else len(content)
        with contextlib.suppress(OSError):
            self.wfile.write(content[:cut])
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(weights, "_PAUSE", 0.0)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "downloads" / "file.pth"


def part_of(target):
    return target.with_name(target.name + ".part")


def only_part_is_kept(target, size):
    assert not target.exists()
    assert part_of(target).read_bytes() == CONTENT[:size]


def nothing_is_kept(target):
    assert not any(path for path in target.parent.rglob("*") if path.is_file())


def failing(match, source, target, **options):
    with pytest.raises(GGLError, match=match) as caught:
        weights.download(source, target, **options)
    assert "\n" not in str(caught.value)


def test_download(server, target):
    seen = []
    weights.download(server.source("/file.pth"), target, progress=lambda *p: seen.append(p))
    assert target.read_bytes() == CONTENT
    assert not part_of(target).exists()
    assert seen[-1] == ("file.pth", len(CONTENT), len(CONTENT))
    assert server.asked == [None]
    # what is there is not fetched again, unless it is damaged
    weights.download(server.source("/file.pth"), target)
    assert server.asked == [None]
    target.write_bytes(b"?" + CONTENT[1:])
    weights.download(server.source("/file.pth"), target)
    assert target.read_bytes() == CONTENT


def test_cut_off_and_resumed(server, target):
    server.cuts = [400_000, 1_000]
    weights.download(server.source("/file.pth"), target)
    assert server.asked == [None, 400_000, 401_000]
    assert target.read_bytes() == CONTENT


def test_cut_off_for_good_and_resumed_by_the_next_call(server, target):
    server.cuts = [500, 500, 500, 500]
    failing("cut off at 2,000 of 1,000,003 bytes", server.source("/file.pth"), target)
    only_part_is_kept(target, 2_000)
    weights.download(server.source("/file.pth"), target)
    assert server.asked[-1] == 2_000
    assert target.read_bytes() == CONTENT


def test_interrupted_and_resumed(server, target):
    def stop(file, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights.download(server.source("/file.pth"), target, progress=stop)
    size = part_of(target).stat().st_size
    assert 0 < size < len(CONTENT)
    only_part_is_kept(target, size)
    weights.download(server.source("/file.pth"), target)
    assert server.asked == [None, size]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("ranges", ["no", "wrong"])
def test_servers_that_do_not_resume(server, target, ranges):
    server.ranges = ranges
    server.cuts = [300_000]
    weights.download(server.source("/file.pth"), target)
    assert server.asked[:2] == [None, 300_000]
    assert target.read_bytes() == CONTENT


def test_wrong_hash(server, target):
    source = server.source("/file.pth")
    server.files["/file.pth"] = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    failing("sha256.*nothing was kept", source, target)
    nothing_is_kept(target)


def test_another_size(server, target):
    source = server.source("/file.pth")
    for content in (b"<html>please log in</html>", CONTENT + b"more"):
        server.files["/file.pth"] = content
        failing(f"offers {len(content):,} bytes, expected 1,000,003", source, target)
        nothing_is_kept(target)
    # a .part that is longer than the file cannot be right either
    server.files["/file.pth"] = CONTENT
    part_of(target).write_bytes(CONTENT + b"?")
    failing("sha256", source, target)
    weights.download(source, target)


def test_not_found_and_no_server(server, target):
    failing("404.*--from", server.source("/none.pth", b"?"), target)
    nothing_is_kept(target)
    nobody = weights.Source("http://127.0.0.1:9/file.pth", "0" * 64, 9, "none")
    failing("no connection.*--from", nobody, target)
    nothing_is_kept(target)


def test_full_disk(server, target, monkeypatch):
    whole = weights.Path.open

    def full(path, mode="r", *args, **kwargs):
        file = whole(path, mode, *args, **kwargs)
        if "b" in mode and mode != "rb":
            write, room = file.write, [300_000]

            class Full:
                def __enter__(self):
                    return self

                def __exit__(self, *error):
                    file.close()

                def write(self, chunk):
                    room[0] -= len(chunk)
                    if room[0] < 0:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    write(chunk)

            return Full()
        return file

    monkeypatch.setattr(weights.Path, "open", full)
    failing("No space left.*1,000,003 bytes.*goes on", server.source("/file.pth"), target)
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "*")
    only_part_is_kept(target, part_of(target).stat().st_size)
    weights.download(server.source("/file.pth"), target)
    assert target.read_bytes() == CONTENT


def test_unwritable_folder(server, tmp_path):
    (tmp_path / "file").write_text("")
    failing("cannot write", server.source("/file.pth"), tmp_path / "file" / "below.pth")


# --- reading ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tensors():
    return random_tensors("squeeze")


def write_safetensors(path, tensors):
    """The format by hand: length of the header, header in JSON, values."""
    header, values = {}, b""
    for name, tensor in tensors.items():
        begin = len(values)
        values += tensor.tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [begin, len(values)],
        }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor)


@pytest.mark.parametrize("legacy", [False, True])  # torchvision's files are of the old format
def test_torch_format(tensors, tmp_path, legacy):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    path = tmp_path / "a.pth"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    same(foreign.read(path), tensors)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_files_is_never_run(tmp_path, legacy):
    torch = pytest.importorskip("torch")
    proof = tmp_path / "proof"
    path = tmp_path / "a.pth"
    torch.save({"x": Attack(proof)}, path, _use_new_zipfile_serialization=not legacy)
    proof.unlink(missing_ok=True)
    with pytest.raises(GGLError, match="more than tensors"):
        foreign.read(path)
    assert not proof.exists()


def test_without_the_extra(monkeypatch, capsys):
    # Said before half a gigabyte is fetched for nothing.
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    assert run(["weights", "lpips-vgg"]) == 2
    one_error_line(capsys, "torch", "pip install 'ggl-jax[convert]'")


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    path = tmp_path / "shelf"
    monkeypatch.setenv("GGL_JAX_WEIGHTS", str(path))
    return path


def split(tensors):
    lin = {name: tensor for name, tensor in tensors.items() if name.startswith("lin")}
    return {name: tensor for name, tensor in tensors.items() if name not in lin}, lin


def test_weights_from_files(tensors, shelf, tmp_path, capsys):
    assert weights.load_lpips("squeeze") is None
    assert run(["weights", "lpips-squeeze", "--from"]) == 2
    one_error_line(capsys, "from", "no file")
    network, lin = tmp_path / "network.npz", tmp_path / "lin.npz"
    np.savez(network, **split(tensors)[0])
    np.savez(lin, **split(tensors)[1])
    assert run(["weights", "lpips-squeeze", "--from", str(network)]) == 2
    one_error_line(capsys, "lin0.model.1.weight", "lpips/weights/v0.1/squeeze.pth")
    assert not shelf.exists()
    assert run(["weights", "lpips-squeeze", "--from", str(network), str(lin)]) == 0
    shown = capsys.readouterr().out.replace("\n", "")
    assert str(shelf / "lpips-squeeze") in shown
    assert weights.installed() == {"lpips-squeeze": shelf / "lpips-squeeze"}
    expected = lpips.from_torch(tensors, "squeeze")
    loaded = weights.load_lpips("squeeze")
    assert checkpoint.sha256(loaded) == checkpoint.sha256(expected)
    card = checkpoint.load_card(shelf / "lpips-squeeze")
    digest = hashlib.sha256(network.read_bytes()).hexdigest()
    assert card["sources"][0]["sha256"] == digest
    # weights of one network under the name of another
    (shelf / "lpips-squeeze").rename(shelf / "lpips-alex")
    with pytest.raises(GGLError, match="not those of lpips-alex"):
        weights.load_lpips("alex")
    assert run(["weights", "lpips-vgg", "--from", str(network), str(lin)]) == 2
    one_error_line(capsys, "features.10.bias", "missing", "lpips-vgg")
    assert run(["weights", "lpips-squeeze", "--from", str(network), str(network)]) == 2
    one_error_line(capsys, "features.0.bias", "network.npz")


def test_weights_by_download(tensors, server, shelf, tmp_path, capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    classifier = {"classifier.1.bias": np.zeros(1000, np.float32)}  # as in torchvision's file
    for name, part in zip(("net", "lin"), split({**classifier, **tensors}), strict=True):
        torch.save({k: torch.from_numpy(v) for k, v in part.items()}, tmp_path / name)
        server.files[f"/{name}.pth"] = (tmp_path / name).read_bytes()
    sources = server.source("/net.pth"), server.source("/lin.pth")
    monkeypatch.setitem(weights.SOURCES, "lpips-squeeze", sources)
    out = tmp_path / "elsewhere"

    whole = weights._fetch

    def interrupted(source, part, progress):
        server.cuts = [1_000_000]
        whole(source, part, progress)
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "_fetch", interrupted)
    assert run(["weights", "lpips-squeeze", "--out", str(out)]) == 130
    assert "goes on" in capsys.readouterr().out
    assert not (out / "lpips-squeeze").exists()
    monkeypatch.setattr(weights, "_fetch", whole)
    assert run(["weights", "lpips-squeeze", "--out", str(out)]) == 0
    assert server.asked == [None, 1_000_000, None]
    assert "GGL_JAX_WEIGHTS=" in capsys.readouterr().out.replace("\n", "")
    assert sorted(path.name for path in out.iterdir()) == ["lpips-squeeze"]
    card = checkpoint.load_card(out / "lpips-squeeze")
    assert [source["url"] for source in card["sources"]] == [source.url for source in sources]
    monkeypatch.setenv("GGL_JAX_WEIGHTS", str(out))
    assert checkpoint.sha256(weights.load_lpips("squeeze")) == card["sha256"]
    assert run(["info"]) == 0
    shown = capsys.readouterr().out
    assert "lpips-squeeze" in shown
    assert "ggl-jax weights lpips-vgg" in shown.replace("\n", "")
    server.files.clear()
    assert run(["weights", "lpips-squeeze", "--out", str(tmp_path / "new")]) == 2
    one_error_line(capsys, "404", "net.pth")
    assert not (tmp_path / "new" / "lpips-squeeze").exists()


def test_recorded_sources():
    """The hash in torchvision's file names is the beginning of the recorded one."""
    assert set(weights.SOURCES) == {f"lpips-{name}" for name in lpips.BACKBONES}
    for network, lin in weights.SOURCES.values():
        assert network.filename.endswith(f"-{network.sha256[:8]}.pth")
        for source in (network, lin):
            assert source.url.startswith("https://")
            assert len(bytes.fromhex(source.sha256)) == 32
