"""CONTRIBUTING.md's worked example: a modality is one file and one line of the table."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest


def block(text, mark):
    """The code that stands below a mark."""
    return re.search(rf"<!-- {re.escape(mark)} -->\n```\w+\n(.*?)```", text, re.DOTALL)[1]


@pytest.fixture(scope="module")
def page(root):
    return (root / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tree(page, root, tmp_path_factory):
    """The package and its scripts with the new modality, and captioned curves."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("diffusers_vqdit", "training"):
        shutil.copytree(root / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "model_cards").symlink_to(root / "model_cards")
    pipelines = tree / "diffusers_vqdit" / "pipelines"
    (pipelines / "series_segment.py").write_text(block(page, "series_segment.py"), encoding="utf-8")
    table = (pipelines / "segment_processors.py").read_text(encoding="utf-8")
    for hunk in block(page, "segment_processors.py").split("@@\n"):
        lines = hunk.splitlines()
        before, after = ("\n".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert table.count(before) == 1
        table = table.replace(before, after)
    (pipelines / "segment_processors.py").write_text(table, encoding="utf-8")
    run(tree, [sys.executable, "-c", block(page, "data")])
    return tree


def run(tree, arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": str(tree), "ACCELERATE_USE_CPU": "true", **environment}
    done = subprocess.run(arguments, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_worked_example_trains_draws_and_is_loaded_without_the_package(page, tree):
    command = shlex.split(block(page, "train").replace("\\\n", " "))
    assert command[0] == "python"
    quick = "--report_to none --checkpointing_steps 0"
    run(tree, [sys.executable, "-W", "ignore", *command[1:], *quick.split()])
    check = """
import numpy as np, torch
curves = pipe(["rising", "falling"], output="curve", generator=torch.Generator().manual_seed(0)).segments["curve"]
rising = np.linspace(-0.5, 0.5, 8)
assert curves.shape == (2, 8) and (np.abs(curves - [rising, -rising]) < 0.02).mean() > 0.8, curves
assert pipe(inputs={"curve": curves}, output="text").texts == ["rising", "falling"]
for wrong in ([1.0] * 7, "rising", [float("nan")] * 8):
    try:
        pipe(inputs={"curve": wrong}, output="text")
    except ValueError as error:
        assert "curve" in str(error) and "8 finite numbers" in str(error), error
    else:
        raise AssertionError(wrong)
"""
    run(tree, [sys.executable, "-W", "ignore", "-c", block(page, "use") + check])
    alone = f"""
import sys; from diffusers import DiffusionPipeline
code = {{"custom_pipeline": "outputs/curves/pipeline.py", "trust_remote_code": True}}
pipe = DiffusionPipeline.from_pretrained("outputs/curves", **code)
assert "diffusers_vqdit" not in sys.modules
{check}"""
    shutil.move(tree / "diffusers_vqdit", tree / "moved")
    try:
        run(tree, [sys.executable, "-W", "ignore", "-c", "import torch\n" + alone], PYTHONSAFEPATH="1")
    finally:
        shutil.move(tree / "moved", tree / "diffusers_vqdit")


def test_every_path_and_name_on_the_page_is_there(page, root):
    for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|toml))`", page):
        places = [root, root / "diffusers_vqdit", root / "diffusers_vqdit" / "pipelines"]
        made = name.endswith("series_segment.py") or name == "pipeline.py"  # by the reader, and by saving
        assert made or any((place / name).exists() for place in places), name
