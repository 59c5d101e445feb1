"""Banks that are kept on disk: found again by what they depend on, and never in the way."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ggl_jax as gx
from ggl_jax import cache, files
from ggl_jax.adversary import bank as banks
from ggl_jax.adversary import regression
from ggl_jax.files import digest

NUM = 12


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder, empty, and a process that has no bank yet."""
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "arrays")
    monkeypatch.setattr(banks, "_BANKS", {})
    return tmp_path / "arrays"


@pytest.fixture
def public(tiny_model, tiny_variables, tiny_prior, tiny_prior_params):
    return gx.Public(tiny_model, tiny_variables, tiny_prior, tiny_prior_params)


def bank_of(public, label=1, num=NUM):
    """As another process would get it."""
    banks._BANKS.clear()
    return banks.bank_of(public, label, num)


def content(bank):
    """Of all arrays; bfloat16 by its bits."""
    bits = [[x.view(np.uint16) for x in one] for one in bank.arrays]
    return digest(*bank._replace(arrays=bits))


def compute_none(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("computed")

    monkeypatch.setattr(banks, "make_bank", refuse)


def test_another_process_reads_the_same(public, kept, monkeypatch):
    sent, _ = gx.share(
        jax.random.key(1), public, jnp.full((1, 8, 8, 3), 0.4), [1], defense=gx.parse("none")
    )
    problem = gx.Problem(sent.update, *public[1::2], jnp.asarray([1]), {})

    def read():
        banks._BANKS.clear()
        found = regression.read(public, problem, None, gx.Client(), NUM)
        return digest(found.guess.mean, found.guess.factor, found.rmse)

    computed, bank = read(), content(banks.bank_of(public, 1, NUM))
    compute_none(monkeypatch)
    assert read() == computed
    assert content(banks.bank_of(public, 1, NUM)) == bank
    # Its own weights, at other places in memory.
    copied = public._replace(variables=jax.tree.map(jnp.copy, public.variables))
    assert content(bank_of(copied)) == bank


def test_what_differs_is_another_bank(public, kept, monkeypatch):
    def moved(tree):
        return jax.tree.map(lambda w: w + 1e-3, tree)

    model = public.model._replace(loss=lambda logits, labels: jnp.mean(logits[:, labels[0]] ** 2))
    others = {
        "weights": (public._replace(variables=moved(public.variables)), 1, NUM),
        "prior": (public._replace(prior_params=moved(public.prior_params)), 1, NUM),
        "model": (public._replace(model=model), 1, NUM),
        "label": (public, 2, NUM),
        "num": (public, 1, NUM + 1),
    }
    first = bank_of(public)
    names = {banks._content(*other) for other in others.values()}
    assert len(names - {banks._content(public, 1, NUM)}) == len(others)
    compute_none(monkeypatch)
    assert content(bank_of(public)) == content(first)
    for other in others.values():
        with pytest.raises(AssertionError, match="computed"):
            bank_of(*other)


def test_a_model_is_told_by_its_derivative_and_traced_once(public, kept):
    """Of two with the same values; the bank of another label looks at neither again."""
    calls = []

    def halved(share):
        @jax.custom_vjp
        def same(x):
            return x

        same.defvjp(lambda x: (x, None), lambda _, g: (share * g,))

        def apply(variables, images):
            calls.append(share)
            logits, features = public.model.apply(variables, images)
            return same(logits), features

        return public._replace(model=public.model._replace(apply=apply))

    one, other = halved(0.5), halved(0.25)
    assert banks._content(one, 1, NUM) != banks._content(other, 1, NUM)
    seen = len(calls)
    assert banks._content(one, 2, NUM) != banks._content(one, 1, NUM)
    assert len(calls) == seen > 0


@pytest.mark.parametrize("damage", ["flipped", "half", "empty", "longer"])
def test_a_damaged_file_is_computed_again(damage, public, kept, monkeypatch):
    first = content(bank_of(public))
    (path,) = kept.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(
        {
            "flipped": bytes(flipped),
            "half": whole[: len(whole) // 2],
            "empty": b"",
            "longer": whole + b"0",
        }[damage]
    )
    assert content(bank_of(public)) == first
    assert path.read_bytes() == whole
    compute_none(monkeypatch)
    assert content(bank_of(public)) == first


def test_a_disk_that_takes_nothing_is_no_error(public, kept, monkeypatch):
    kept.write_text("not a folder")
    bank_of(public)
    kept.unlink()

    def full(*_):
        raise files.storage_error(kept, OSError(28, "No space left on device"))

    monkeypatch.setattr(files, "write_by", full)
    bank_of(public)
    assert not [*kept.iterdir()]


def test_what_was_used_last_stays(kept, monkeypatch):
    arrays = [np.full(100, n, np.float32) for n in range(4)]
    monkeypatch.setattr(cache, "MOST_BYTES", 1000)  # two of them
    for n in (0, 1):
        cache.keep(f"{n}", arrays[n])
        os.utime(kept / f"{n}", (n, n))
    assert cache.load("0", arrays[0])[0] == 0
    cache.keep("2", arrays[2])
    assert {path.name for path in kept.iterdir()} == {"0", "2"}
    cache.keep("large", np.zeros(300, np.float32))
    assert {path.name for path in kept.iterdir()} == {"0", "2"}


def test_it_lies_beside_the_compiled_programs(tmp_path):
    names = "jax_compilation_cache_dir", "jax_enable_compilation_cache"
    before = [getattr(jax.config, name) for name in names]
    try:
        for values, expected in {
            (str(tmp_path), True): tmp_path / "arrays",
            (str(tmp_path), False): None,
            (None, True): None,
            ("gs://bucket/programs", True): None,
        }.items():
            for name, value in zip(names, values, strict=True):
                jax.config.update(name, value)
            assert cache.folder() == expected
    finally:
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)


def test_a_model_that_calls_back_is_not_kept(public, kept):
    """Its program does not tell what it does."""
    model = public.model

    def hidden(variables, images):
        logits, features = model.apply(variables, images)
        nothing = jax.pure_callback(lambda: np.float32(0), jax.ShapeDtypeStruct((), np.float32))
        return logits + nothing, features

    assert banks._content(public, 1, NUM) is not None
    other = public._replace(model=model._replace(apply=hidden))
    assert banks._content(other, 1, NUM) is None


def test_processes_agree_on_names(kept, tmp_path):
    code = """
import jax, ggl_jax as gx
from ggl_jax.adversary.bank import _content
model, prior = gx.convnet(width=4, num_classes=3), gx.load_prior("dcgan32_faces")[:2]
name = _content(gx.Public(model, model.init(jax.random.key(0)), *prior), 1, 5)
"""
    own = {}
    exec(code, own)
    found = subprocess.run(
        [sys.executable, "-c", code + "print(name)"],
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == own["name"]
