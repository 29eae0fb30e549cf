"""A newcomer's first hour, by the README alone: draw, train on forty pictures of another kind, look, publish, and load
elsewhere. The commands are the README's own; training takes two steps."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image, ImageDraw

from diffusers_vqdit import VQDiTPipeline, __main__


COUNT = 40
LOAD_AND_DRAW = """
import sys
import torch
from diffusers_vqdit import VQDiTPipeline
pipe = VQDiTPipeline.from_pretrained("alice/mine")
image = pipe("a red flag", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
image.save("flag.png")
print(pipe.config.resize_mode)
"""


@pytest.fixture
def commands(root, documented):
    """The README's commands of ours, by module, with their arguments."""
    return dict(documented.commands((root / "README.md").read_text(encoding="utf-8")))


def train_command(text):
    """The words of a page's command that finetunes on ``my_pictures``, installation aside."""
    (line,) = [line for line in text if "--train_data_dir my_pictures" in line]
    return shlex.split(line)


def test_training_is_told_alike_wherever_it_stands(root, documented):
    (readme, page) = ((root / name).read_text(encoding="utf-8") for name in ("README.md", "docs/train.md"))
    command = train_command(documented.lines(readme))
    assert train_command(documented.lines(page)) == command
    book = json.loads((root / "examples/train.ipynb").read_text(encoding="utf-8"))
    source = "\n".join("".join(cell["source"]) for cell in book["cells"])
    (own,) = re.findall(r'command = f"""(.*?)"""', source, re.DOTALL)
    values = {"sys.executable": "python", "folder": "my_pictures", "output": "outputs/mine"}
    values |= dict(re.findall(r"^(max_train_steps|train_batch_size) = (\d+)$", source, re.MULTILINE))
    own = re.sub(r"{([\w.]+)}", lambda found: values[found[1]], own).split()
    assert own[:3] == ["python", "-m", "accelerate.commands.launch"] and command[:2] == ["accelerate", "launch"]
    assert own[3:] == command[2:]


@pytest.fixture
def flags(tmp_path):
    """Forty pictures that are no emoji, none of them square."""
    folder, lines = tmp_path / "my_pictures", []
    folder.mkdir()
    for number in range(COUNT):
        colour = ("red", "green", "blue", "gold")[number % 4]
        picture = Image.new("RGB", (60, 40), "white")
        ImageDraw.Draw(picture).rectangle((4, 4, 14 + number, 34), fill=colour)
        picture.save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"a {colour} flag"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.slow
def test_the_demo_is_drawn(commands, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    __main__.main(__main__.parse_args(commands["diffusers_vqdit.__main__"]))
    assert "vqdit_demo.png: 18 pictures" in capsys.readouterr().out
    with Image.open(tmp_path / "vqdit_demo.png") as grid:
        assert grid.size == (6 * 128, 3 * 182)


@pytest.mark.slow
def test_forty_pictures_are_trained_on_published_and_loaded_elsewhere(
    root, commands, flags, hub, client, script, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_cards").symlink_to(root / "model_cards")
    readme = (root / "README.md").read_text(encoding="utf-8")
    publish = re.search(r"`(--push_to_hub --hub_model_id) you/model`", readme)[1]
    arguments = [*commands["training.train_vqdit"], "--max_train_steps", "2", "--report_to", "none"]
    arguments += [*publish.split(), "alice/mine"]
    monkeypatch.setattr(sys, "argv", ["training/train_vqdit.py", *arguments])
    module = script("train_vqdit")
    module.main(module.parse_args())
    result = re.search(r'VQDiTPipeline\.from_pretrained\("(outputs/mine)"\)', readme)[1]
    pipe = VQDiTPipeline.from_pretrained(result)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(image=Image.open(flags / "0.png"), num_inference_steps=2).texts) == 1

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_alice", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(root)}
    own["HF_HOME"] = str(elsewhere / "hf")
    process = [sys.executable, "-c", LOAD_AND_DRAW]
    done = subprocess.run(process, cwd=elsewhere, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["auto"]  # as the README's command reads pictures that are not square
    with Image.open(elsewhere / "flag.png") as picture:
        assert picture.size == (64, 64)
