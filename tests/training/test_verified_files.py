"""Large files are read for their SHA-256 once, and again only where they may have changed."""

import os
import time

import pytest

from diffusers_vqdit.training import verified_files
from diffusers_vqdit.training.verified_files import VERIFIED_FILE, changed_files
from diffusers_vqdit.utils.fingerprints import file_sha256


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two old files with their digests, and the names of those that are read."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 100)
        os.utime(tmp_path / name, ns=(0, time.time_ns() - 10**11))
    read = []
    monkeypatch.setattr(verified_files, "file_sha256", lambda path: read.append(path.name) or file_sha256(path))
    return tmp_path, {name: file_sha256(tmp_path / name) for name in ("a", "b")}, read


def test_what_was_found_whole_is_not_read_again(folder):
    path, digests, read = folder
    assert changed_files(path, digests) == changed_files(path, digests) == [] and read == ["a", "b"]
    assert changed_files(path, {"a": digests["a"]}) == changed_files(path, digests) == [] and read == ["a", "b"]


@pytest.mark.parametrize("change", ["content", "size", "digest", "forgotten"])
def test_whatever_may_have_changed_is_read_again(folder, change):
    path, digests, read = folder
    changed_files(path, digests)
    if change == "content":
        (path / "a").write_bytes(b"x" * 100)  # of the same size, now
    elif change == "size":
        time_of = (path / "a").stat().st_mtime_ns
        (path / "a").write_bytes(b"a" * 99)
        os.utime(path / "a", ns=(time_of, time_of))
    elif change == "digest":
        digests = {**digests, "a": "0"}
    else:
        (path / VERIFIED_FILE).write_text("[]")
    assert changed_files(path, digests) == ([] if change == "forgotten" else ["a"])
    assert read == ["a", "b", "a"] + ["b"] * (change == "forgotten")


def test_a_file_written_just_now_is_not_trusted_yet_nor_one_where_nothing_can_be_kept(folder, monkeypatch):
    path, digests, read = folder
    os.utime(path / "a")
    for _ in range(2):
        assert changed_files(path, digests) == []
    assert read == ["a", "b", "a"]

    def refused(path):
        raise OSError("read-only")

    monkeypatch.setattr(verified_files, "replacing_file", refused)
    (path / VERIFIED_FILE).unlink()
    for _ in range(2):
        assert changed_files(path, digests) == []
    assert read == ["a", "b", "a", *["a", "b"] * 2]
