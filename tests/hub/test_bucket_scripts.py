"""Pictures of several aspect ratios through the public scripts: encoded, trained on, published, loaded, drawn."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.training.codes import CodeDataset


BUCKETS = "16,16;24,12;12,24"
TINY = "--num_layers 1 --num_attention_heads 2 --attention_head_dim 16 --report_to none --train_batch_size 2"
TINY += f" --validation_steps 0 --seed 3 --aspect_ratio_buckets {BUCKETS}"
TASKS = "--tasks text->image,image->text,image_lowres->image,->image"
ALONE = """
import sys
import torch
from diffusers import DiffusionPipeline
from PIL import Image

options = {"custom_pipeline": "pipeline", "trust_remote_code": True, "token": "hf_alice"}
pipe = DiffusionPipeline.from_pretrained("alice/buckets", **options)
assert "diffusers_vqdit" not in sys.modules
wide = Image.new("RGB", (66, 30))
assert pipe(image=wide, output="image", strength=0.5).images[0].size == (24, 12)
assert pipe("a red box", height=20, width=12).images[0].size == (12, 20)
"""


@pytest.fixture
def places(image_vq, text_vq, tokenizer, tmp_path):
    """Tokenizers, and a folder of tall, wide and square pictures."""
    image_vq.save_pretrained(tmp_path / "image_vq")
    text_vq.save_pretrained(tmp_path / "text_vq")
    tokenizer.save_pretrained(tmp_path / "text_vq" / "tokenizer")
    (tmp_path / "pictures").mkdir()
    generator, lines = np.random.default_rng(0), []
    for index in range(11):
        height, width = [(20, 20), (44, 20), (18, 40)][index % 3]
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"a red box {index}"}))
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


def weights(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def same(one, other):
    return all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


@pytest.mark.slow
def test_three_aspect_ratios(run, places, hub, client):
    data = f"--train_data_dir {places / 'pictures'} --image_vq {places / 'image_vq'} --text_vq {places / 'text_vq'}"
    data += " --lowres_factor 2 --image_augmentations 1"
    run("encode_dataset", f"{data} --aspect_ratio_buckets {BUCKETS} --output_dir {places / 'codes'}")
    codes = CodeDataset(places / "codes")
    assert codes.buckets.tolist() == [0] * 4 + [1] * 4 + [2] * 3
    own = f"--codes_dir {places / 'codes'} --image_vq {places / 'image_vq'} --text_vq {places / 'text_vq'}"
    rotary = "--use_rotary_positional_embeddings"
    run("train_vqdit", f"{own} {TASKS} {TINY} {rotary} --max_train_steps 12 --output_dir {places / 'out'}")
    # Encoded at the start, stopped and resumed in the middle of an epoch: the same batches, and so the same weights.
    begin = f"{data} {TASKS} {TINY} {rotary} --output_dir {places / 'again'} --checkpointing_steps 1"
    with pytest.MonkeyPatch.context() as patch:
        module = "diffusers_vqdit.training.run.TrainingRun.stop_requested"
        patch.setattr(module, lambda run: run.step == 5)
        run("train_vqdit", f"{begin} --max_train_steps 12")
    run("train_vqdit", f"{begin} --max_train_steps 12 --resume_from_checkpoint latest")
    assert same(places / "out", places / "again")

    saved = VQDiTPipeline.from_pretrained(places / "out")
    saved.push_to_hub("alice/buckets")
    loaded = VQDiTPipeline.from_pretrained("alice/buckets", cache_dir=places / "cache")
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 255, (30, 66, 3), dtype=np.uint8))
    mask = Image.new("L", wide.size)
    mask.paste(255, (0, 0, 30, 30))
    drawn = []
    for pipe in (saved, loaded):
        pipe.set_progress_bar_config(disable=True)
        assert pipe.config.segments["image"]["buckets"] == [[4, 4], [6, 3], [3, 6]]
        assert pipe.transformer.config.segments["image"]["centered_positions"]
        drawn.append([])
        for height, width in ((16, 16), (24, 12), (12, 24), (20, 12), (16, 20)):  # the last two are in between
            generator = torch.Generator().manual_seed(height)
            one = pipe("a red box 1", height=height, width=width, generator=generator).images[0]
            assert one.size == (width, height)
            drawn[-1].append(np.asarray(one).tobytes())
        painted = pipe(image=wide, mask_image=mask, output="image").images[0]
        assert painted.size == wide.size
        assert np.array_equal(np.asarray(painted)[:, 30:], np.asarray(wide)[:, 30:])
        found = pipe(image=wide, output="image", strength=0.5, output_type="latent").segments["image"]
        assert found.shape == (1, 3, 6)
        assert len(pipe(image=wide, output="text").texts) == 1
        assert pipe(image=Image.new("RGB", (12, 6)), output="image").images[0].size == (24, 12)  # enlarged
    assert drawn[0] == drawn[1]
    # Without the package.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(places / "hf"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    # Finetuned: by the buckets of the pipeline, which must begin as it does.
    tuned = (
        f"--pretrained_model_name_or_path {places / 'out'} --train_data_dir {places / 'pictures'} --report_to none "
    )
    tuned += f"--tasks text->image --train_batch_size 2 --max_train_steps 1 --output_dir {places / 'tuned'}"
    run("train_vqdit", tuned)
    assert CodeDataset(places / "tuned" / "codes").settings["aspect_ratio_buckets"] == [[16, 16], [24, 12], [12, 24]]
    # On codes of one grid, it goes on to know the others.
    run("encode_dataset", f"{data} --resolution 16 --output_dir {places / 'square'}")
    of_codes = f"--codes_dir {places / 'square'} --report_to none --tasks text->image --train_batch_size 2"
    of_codes += f" --max_train_steps 1 --output_dir {places / 'one'}"
    run("train_vqdit", f"--pretrained_model_name_or_path {places / 'out'} {of_codes}")
    entry = VQDiTPipeline.from_pretrained(places / "one").config.segments["image"]
    assert entry["buckets"] == [[4, 4], [6, 3], [3, 6]]
    for arguments, message in (
        (f"{tuned} --aspect_ratio_buckets 24,12;16,16", r"\[\[24, 12\], \[16, 16\]\] must begin with \[16, 16\]"),
        (f"{tuned} --aspect_ratio_buckets 16,16;22,12", r"\[22, 12\] must be a multiple of \[4, 4\].*, such as"),
        (
            f"{own} {TASKS} {TINY} --patch image=2x1 --output_dir {places / 'x'}",
            r"\[3, 6\] must be a multiple of \[2, 1",
        ),
        (
            f"{data} {TASKS} {TINY} --patch image=2x1 --output_dir {places / 'x'}",
            r"\[12, 24\] must be a multiple of \[8",
        ),
        (
            f"{own} {TASKS} {TINY} --output_dir {places / 'x'}".replace(BUCKETS, "16,16"),
            r"aspect_ratio_buckets=\[\[16, 16\]\], but the codes in .* have \[\[16, 16\], \[24, 12\], .*: encode",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run("train_vqdit", arguments)
