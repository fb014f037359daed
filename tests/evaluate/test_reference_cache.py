import os
import time
from pathlib import Path

import pytest
import torch

from bitmend.evaluate.reference_cache import ReferenceCache, checksum, default_folder, digest_of


@pytest.fixture
def lines():
    return []


@pytest.fixture
def cache(tmp_path, lines):
    return ReferenceCache(tmp_path / "cache", lines.append)


def test_what_is_stored_comes_back_bit_for_bit(cache, lines):
    tensors = {"a": torch.randn(3, 4).bfloat16(), "b": torch.tensor([float("nan"), -0.0])}
    cache.store("key", tensors)
    loaded = cache.load("key")
    assert checksum(loaded) == checksum(tensors)
    assert cache.load("other") is None
    assert lines == []


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), lambda raw: raw[:-4], lambda raw: b""])
def test_a_damaged_entry_is_said_and_not_used(cache, lines, damage):
    cache.store("key", {"a": torch.ones(4)})
    path = next(cache.folder.iterdir())
    path.write_bytes(damage(path.read_bytes()))
    assert cache.load("key") is None
    assert len(lines) == 1
    assert "is computed again" in lines[0]
    cache.store("key", {"a": torch.ones(4)})
    assert cache.load("key") is not None


def test_entries_used_longest_ago_go_first(tmp_path, lines):
    cache = ReferenceCache(tmp_path, lines.append, limit_bytes=3000)
    for age, key in enumerate("cba"):
        cache.store(key, {"x": torch.zeros(200)})  # 800 bytes and a header
        os.utime(next(tmp_path.glob(f"*-{key}.*")), (age, age))
    cache.load("c")  # used: now the youngest
    cache.store("d", {"x": torch.zeros(200)})
    assert [cache.load(key) is not None for key in "abcd"] == [True, False, True, True]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3000


def test_what_is_larger_than_the_limit_is_not_stored(tmp_path, lines):
    ReferenceCache(tmp_path, lines.append, limit_bytes=10).store("key", {"x": torch.zeros(200)})
    assert lines == ["the reference's 800 bytes are not cached: the limit is 10 bytes"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said(tmp_path, lines):
    (tmp_path / "file").touch()
    ReferenceCache(tmp_path / "file" / "cache", lines.append).store("key", {"x": torch.zeros(2)})
    assert len(lines) == 1
    assert "cannot be written" in lines[0]


def test_files_of_killed_processes_are_removed_after_a_day(cache):
    cache.store("one", {"x": torch.zeros(2)})
    old, fresh = cache.folder / "reference-a.1.tmp", cache.folder / "reference-b.2.tmp"
    old.touch()
    fresh.touch()
    os.utime(old, (time.time() - 90_000,) * 2)
    cache.store("two", {"x": torch.zeros(2)})
    assert not old.exists()
    assert fresh.exists()


def test_the_folder_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("BITMEND_CACHE", "own")
    monkeypatch.setenv("XDG_CACHE_HOME", "shared")
    assert default_folder() == Path("own")
    monkeypatch.delenv("BITMEND_CACHE")
    assert default_folder() == Path("shared") / "bitmend"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "bitmend"


def test_digests_do_not_depend_on_order_but_on_values():
    assert digest_of({"a": 1, "b": "x"}) == digest_of({"b": "x", "a": 1}) != digest_of({"a": 2, "b": "x"})
