"""docs/recipes.md, command by command as it stands there, with small models and few steps."""

import json
import re
import shlex
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image
from transformers import ResNetConfig, ResNetModel

from diffusers_vqdit import VQDiTPipeline


pytestmark = pytest.mark.slow

TRAINING = "--max_train_steps 2 --train_batch_size 2 --mixed_precision no --report_to tensorboard --lr_warmup_steps 1"
SMALL = {
    "train_image_vq": f"{TRAINING} --block_out_channels 8 8 8 8 8 --layers_per_block 1 --norm_num_groups 4 "
    "--latent_channels 4 --num_vq_embeddings 32 --dataloader_num_workers 0 --perceptual_backbone backbone "
    "--perceptual_image_size 32 --adversarial_start 1 --discriminator_warmup 1 --discriminator_channels 4",
    "evaluate": "",
    "train_text_vq": "--max_train_steps 2 --train_batch_size 2 --report_to none --lr_warmup_steps 1 "
    "--tokenizer_vocab_size 270 --num_codes 32 --hidden_size 16",
    "encode_dataset": "--dataloader_num_workers 0",
    "train_vqdit": f"{TRAINING} --num_layers 1 --num_attention_heads 2 --attention_head_dim 8 --validation_steps 2",
    "plot_run": "",
}


@pytest.fixture
def photographs(tmp_path):
    """Eight photographs of different sizes, two of them to measure with."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        folder = tmp_path / "photographs" / split
        folder.mkdir(parents=True)
        rows = []
        for number in range(count):
            height, width = generator.integers(256, 320, 2)
            coarse = generator.integers(0, 255, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((width, height)).save(folder / f"{number}.jpg")
            rows.append(json.dumps({"file_name": f"{number}.jpg", "text": f"boats in harbour {number} at dusk"}))
        (folder / "metadata.jsonl").write_text("\n".join(rows))
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path / "backbone")
    return tmp_path


def blocks(root, language):
    text = (root / "docs" / "recipes.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_every_command(root, photographs, script, monkeypatch):
    monkeypatch.chdir(photographs)
    seen = []
    for block in blocks(root, "bash"):
        for line in block.replace("\\\n", " ").strip().splitlines():
            words = shlex.split(line)
            (path,) = [word for word in words if word.endswith(".py")]
            name = path.removeprefix("training/").removesuffix(".py")
            arguments = words[words.index(path) + 1 :] + SMALL[name].split()
            # One takes a compiler's minutes, the other would change float32 products of the tests after this one.
            arguments = [word for word in arguments if word not in ("--compile", "--allow_tf32")]
            if name == "evaluate" and "--tokenizer" in arguments:
                name = "evaluate_tokenizer"
            elif name == "evaluate":
                arguments[arguments.index("--num_samples") + 1] = "1"
                arguments += ["--num_inference_steps", "1"]
            seen.append(name)
            if name == "plot_run" and find_spec("matplotlib") is None:
                continue
            monkeypatch.setattr(sys, "argv", [name, *arguments])
            module = script(name)
            module.main(module.parse_args(arguments))
    assert set(seen) == set(SMALL) | {"evaluate_tokenizer"}

    figures = json.loads((photographs / "outputs/photographs/evaluation.json").read_text())
    assert figures.keys() == {"text->image", "image->text", "inpainting", "super-resolution", "likelihood"}
    assert list((photographs / "outputs/photographs").glob("*.png"))

    (draw,) = blocks(root, "python")
    pushed = []
    monkeypatch.setattr(VQDiTPipeline, "push_to_hub", lambda self, name: pushed.append(name))
    exec(draw)
    assert pushed == ["you/photographs"]
    with Image.open(photographs / "harbour.png") as picture:
        assert picture.size == (256, 256)
