"""The wheel: what is in it, that it works without the source tree, and what importing it costs."""

import os
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


def run(arguments, **environment):
    done = subprocess.run(arguments, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory):
    """The wheel, built from a copy of what it is made of."""
    pytest.importorskip("setuptools", minversion="77")
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    for name in ("diffusers_vqdit", "model_cards", "tests", "training"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run([*pip, "--wheel-dir", str(output), str(source)])
    (path,) = output.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel, root):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = root / "diffusers_vqdit"
    modules = {p.relative_to(root).as_posix() for p in package.rglob("*.py")} | {"diffusers_vqdit/py.typed"}
    others = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert others == modules
    assert wheel.stat().st_size < 1_000_000


@pytest.mark.slow
def test_the_installed_wheel_passes_the_tests_that_need_no_source_tree(wheel, root, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
    run([*pip, str(wheel)])
    shutil.copytree(root / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    where = run([sys.executable, "-c", "import diffusers_vqdit; print(diffusers_vqdit.__file__)"], **environment)
    assert Path(where.strip()).is_relative_to(site)
    names = ["test_tasks", "utils/test_images", "models/quantizers/test_quantizers", "models/test_image_vq"]
    tests = [str(tmp_path / "tests" / f"{name}.py") for name in names]
    output = run([sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", *tests], **environment)
    assert "passed" in output


@pytest.mark.slow
def test_importing_costs_little_more_than_diffusers(tmp_path):
    code = "import time; start = time.process_time(); import {}; print(time.process_time() - start)"

    def seconds(modules):
        return float(run([sys.executable, "-c", code.format(modules)]))

    # Processor time, which other processes hardly change; turn by turn, so that what they do falls on both.
    plain, ours = zip(
        *((seconds("torch, diffusers"), seconds("torch, diffusers, diffusers_vqdit")) for _ in range(5)), strict=True
    )
    assert statistics.median(ours) < 1.2 * statistics.median(plain)
