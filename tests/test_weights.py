"""Fetching weights, from a server on this machine that misbehaves, and reading them."""

import errno
import hashlib
import http.server
import io
import logging
import os
import sys
import threading

import numpy as np
import pooch.core
import pytest
from test_cli import one_error_line
from test_lpips import random_tensors

from ggl_jax import checkpoint, foreign
from ggl_jax.audit import lpips, weights
from ggl_jax.cli import run
from ggl_jax.errors import GGLError

CONTENT = np.random.default_rng(0).bytes(1_000_003)


@pytest.fixture
def server(monkeypatch):
    """A loopback server of ``server.files``; ``server.cut`` says where answers break off."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            content = server.files.get(self.path)
            if content is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: server.cut])
            self.close_connection = True

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.cut = {"/file.pth": CONTENT}, [], None
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def source(server, name="/file.pth"):
    """What is expected at that address."""
    digest = hashlib.sha256(server.files.get(name, b"")).hexdigest()
    return weights.Source(f"http://127.0.0.1:{server.server_port}{name}", digest, "none")


def failing(match, source, target):
    with pytest.raises(GGLError, match=match) as caught:
        weights.download(source, target)
    assert "\n" not in str(caught.value)
    if target.parent.is_dir():
        assert not list(target.parent.iterdir())


def test_download(server, tmp_path):
    target = tmp_path / "downloads" / "file.pth"
    weights.download(source(server), target)
    assert target.read_bytes() == CONTENT
    # what is there is not fetched again, unless it is damaged
    weights.download(source(server), target)
    assert len(server.asked) == 1
    target.write_bytes(b"?" + CONTENT[1:])
    weights.download(source(server), target)
    assert target.read_bytes() == CONTENT


def test_download_says_nothing(server, tmp_path, capfd, monkeypatch):
    # Messages on a closed stream come with a traceback, on an open one as they are.
    closed, (handler,) = io.StringIO(), pooch.get_logger().handlers
    closed.close()
    for stream in (closed, sys.stderr):
        monkeypatch.setattr(handler, "stream", stream)
        target = tmp_path / "downloads" / "file.pth"
        weights.download(source(server), target)
        target.unlink()
        failing("404", source(server, "/none.pth"), target)
    assert capfd.readouterr() == ("", "")
    assert pooch.get_logger().level == logging.NOTSET  # the user's own use of pooch is as it was


def test_what_is_not_the_file_is_not_kept(server, tmp_path, monkeypatch):
    target = tmp_path / "downloads" / "file.pth"
    expected = source(server)
    server.cut = 300_000
    failing("could not be fetched.*--from", expected, target)
    server.cut = None
    for content in (CONTENT[:-1] + b"?", CONTENT + b"more", b"<html>please log in</html>"):
        server.files["/file.pth"] = content
        failing("does not match.*--from", expected, target)
    failing("404.*--from", source(server, "/none.pth"), target)
    failing("--from", weights.Source("http://127.0.0.1:9/file.pth", "0" * 64, "none"), target)
    (tmp_path / "file").write_text("")
    with pytest.raises(GGLError, match="--from"):
        weights.download(expected, tmp_path / "file" / "below.pth")


def test_full_disk_and_interruption(server, tmp_path, monkeypatch):
    def failing_move(*args):
        raise error

    monkeypatch.setattr(pooch.core.shutil, "move", failing_move)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    failing("No space left", source(server), tmp_path / "downloads" / "file.pth")
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        weights.download(source(server), tmp_path / "downloads" / "file.pth")
    assert not list((tmp_path / "downloads").iterdir())


# --- reading ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tensors():
    return random_tensors("squeeze")


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
    one_error_line(capsys, "features.10.", "missing", "lpips-vgg")
    assert run(["weights", "lpips-squeeze", "--from", str(network), str(network)]) == 2
    one_error_line(capsys, "features.0.bias", "network.npz")


def test_weights_by_download(tensors, server, shelf, tmp_path, capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    classifier = {"classifier.1.bias": np.zeros(1000, np.float32)}  # as in torchvision's file
    for name, part in zip(("net", "lin"), split({**classifier, **tensors}), strict=True):
        torch.save({k: torch.from_numpy(v) for k, v in part.items()}, tmp_path / name)
        server.files[f"/{name}.pth"] = (tmp_path / name).read_bytes()
    sources = source(server, "/net.pth"), source(server, "/lin.pth")
    monkeypatch.setitem(weights.SOURCES, "lpips-squeeze", sources)
    out = tmp_path / "elsewhere"

    # The second file is missing at first: the first one is not fetched twice.
    lin = server.files.pop("/lin.pth")
    assert run(["weights", "lpips-squeeze", "--out", str(out)]) == 2
    one_error_line(capsys, "404", "lin.pth")
    assert not (out / "lpips-squeeze").exists()
    server.files["/lin.pth"] = lin
    assert run(["weights", "lpips-squeeze", "--out", str(out)]) == 0
    assert server.asked == ["/net.pth", "/lin.pth", "/lin.pth"]
    assert "GGL_JAX_WEIGHTS=" in capsys.readouterr().out.replace("\n", "")
    assert sorted(path.name for path in out.iterdir()) == ["lpips-squeeze"]
    card = checkpoint.load_card(out / "lpips-squeeze")
    assert [each["url"] for each in card["sources"]] == [each.url for each in sources]
    monkeypatch.setenv("GGL_JAX_WEIGHTS", str(out))
    assert checkpoint.sha256(weights.load_lpips("squeeze")) == card["sha256"]
    assert run(["info"]) == 0
    shown = capsys.readouterr().out
    assert "lpips-squeeze" in shown
    assert "ggl-jax weights lpips-vgg" in shown.replace("\n", "")


def test_recorded_sources():
    """The hash in torchvision's file names is the beginning of the recorded one."""
    assert set(weights.SOURCES) == {f"lpips-{name}" for name in lpips.BACKBONES}
    for network, lin in weights.SOURCES.values():
        assert network.filename.endswith(f"-{network.sha256[:8]}.pth")
        for each in (network, lin):
            assert each.url.startswith("https://")
            assert len(bytes.fromhex(each.sha256)) == 32
