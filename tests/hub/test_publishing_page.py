"""docs/hub.md's first commands, as they stand there: a Hub in one terminal, a push and a drawing of it in another."""

import os
import re
import subprocess
import sys

import pytest
from PIL import Image


pytestmark = pytest.mark.slow


@pytest.fixture
def blocks(root):
    return re.findall(r"```bash\n(.*?)```", (root / "docs/hub.md").read_text(), re.DOTALL)[:2]


@pytest.fixture
def environment(root, tmp_path):
    """One without an account, and with an empty cache."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    binaries = os.pathsep.join([os.path.dirname(sys.executable), own["PATH"]])
    return {**own, "PATH": binaries, "PYTHONPATH": str(root), "HF_HOME": str(tmp_path / "hf")}


@pytest.fixture
def server(root, blocks, environment):
    """What the first terminal prints."""
    words = [sys.executable, *blocks[0].split()[1:]]
    with subprocess.Popen(words, cwd=root, env=environment, stdout=-1, stderr=-1, text=True, bufsize=1) as process:
        try:
            if not (line := process.stdout.readline()):
                problem = process.stderr.read()
                assert "Address already in use" in problem, problem
                pytest.skip("another program has the port of the local Hub")
            yield line
        finally:
            process.terminate()


def test_what_is_pushed_is_drawn_with(root, blocks, environment, server, tmp_path):
    assert server in blocks[1]
    (tmp_path / "model_cards").symlink_to(root / "model_cards")
    command = ["bash", "-euo", "pipefail", "-c", blocks[1]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "alice/emoji" in done.stdout and "Drew: a red apple" in done.stdout
    assert (tmp_path / "hf" / "hub" / "models--alice--emoji").is_dir()  # where the second process has it from
    with Image.open(tmp_path / "outputs/apple.png") as picture:
        assert picture.size == (128, 182)
