"""Frozen encoders through the public scripts: states encoded, trained on, resumed, published, loaded with and without
the package."""

import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.tasks import Task
from diffusers_vqdit.training.codes import CodeDataset


TUNE = "--report_to none --train_batch_size 4 --max_train_steps 4 --seed 2 --mixed_precision no"
TINY = f"--num_layers 1 --num_attention_heads 2 --attention_head_dim 16 {TUNE}"
WORDS = ["a red box", "a blue box and a green dot", "pink", "a dot in a box", "green"]
ALONE = """
import json
import sys
import torch
from diffusers import DiffusionPipeline
from PIL import Image

repository, given, output = sys.argv[1:]
options = {"custom_pipeline": "pipeline", "trust_remote_code": True, "token": "hf_alice"}
pipe = DiffusionPipeline.from_pretrained(repository, **options)
assert "diffusers_vqdit" not in sys.modules
pipe.set_progress_bar_config(disable=True)
inputs = {"reference": Image.new("RGB", (20, 16), "red")} if given == "picture" else None
prompt = None if given == "picture" else ["a red box", "green"]
drawn = pipe(prompt, inputs=inputs, generator=torch.Generator().manual_seed(0), output_type="latent")
with open(output, "w") as file:
    json.dump(drawn.segments["image"].tolist(), file)
"""


@pytest.fixture
def places(image_vq, text_vq, tokenizer, encoders, tmp_path):
    """Tokenizers, encoders, and data with two wordings of some captions."""
    image_vq.save_pretrained(tmp_path / "image_vq")
    text_vq.save_pretrained(tmp_path / "text_vq")
    tokenizer.save_pretrained(tmp_path / "text_vq" / "tokenizer")
    words = encoders.text_tokenizer(WORDS * 3)
    for kind in ("t5", "bert"):
        encoders.save(tmp_path / kind, encoders.text_encoder(kind), words)
    encoders.save(tmp_path / "clip", encoders.whole_clip(), words)
    encoders.feature_extractor().save_pretrained(tmp_path / "clip")
    encoders.save(tmp_path / "dinov2", encoders.image_encoder("dinov2"), encoders.feature_extractor())
    generator = np.random.default_rng(0)
    pixels = [generator.integers(0, 255, (20, 24, 3), dtype=np.uint8) for _ in range(10)]
    rows = {
        "image": [Image.fromarray(one) for one in pixels],
        "text": [WORDS[i % 5 : i % 5 + 1 + i % 2] for i in range(10)],
        "other": [WORDS[-i % 5] for i in range(10)],
    }
    kinds = {"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))}
    features = datasets.Features({**kinds, "other": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "data.parquet"))
    return tmp_path


def weights(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def same(one, other):
    return all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


def without_the_package(hub, places, repository, given):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(places / "hf"), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", ALONE, repository, given, str(places / "alone.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.tensor(json.loads((places / "alone.json").read_text()))


@pytest.mark.slow
def test_captions_as_states_of_t5(run, places, hub, client):
    """``--text_encoder`` in place of ``--text_vq``: encoded before or at the start, resumed, loaded over HTTP."""
    data = f"--dataset_name {places / 'data.parquet'} --image_vq {places / 'image_vq'}"
    encoder = f"--text_encoder {places / 't5'} --prompt_columns other --max_sequence_length 9"
    run("encode_dataset", f"{data} {encoder} --output_dir {places / 'codes'} --shard_size 4 --batch_size 3")
    codes = CodeDataset(places / "codes")
    assert codes.segments["text"] == {"channels": 16, "shape": [9]}
    assert codes.entries["text"] == {"modality": "states", "tokenizer": "text_encoder"}
    tokens = [len(row) for row in codes.states["text"].variants(3)]
    assert len(tokens) == 3 and max(tokens) <= 9 and codes.states["text"].variants(3)[0].dtype == torch.float16
    given, generated = codes.batch(torch.tensor([0, 3, 9]), Task.parse("text->image"))
    assert given["text"].states.shape[0] == 3 and set(generated) == {"image"}

    tasks = "--tasks text->image,->image"
    own = f"--codes_dir {places / 'codes'} --image_vq {places / 'image_vq'} {encoder} {tasks}"
    own = own.replace("--prompt_columns other --max_sequence_length 9 ", "")
    run("train_vqdit", f"{own} {TINY} --output_dir {places / 'out'}")
    again = f"{data} {encoder} {tasks} {TINY} --output_dir {places / 'again'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers_vqdit.training.run.TrainingRun.stop_requested", lambda run: run.step == 2)
        run("train_vqdit", again)
    run("train_vqdit", f"{again} --resume_from_checkpoint latest")
    assert same(places / "out", places / "again")

    saved = VQDiTPipeline.from_pretrained(places / "out")
    saved.push_to_hub("alice/t5")
    loaded = VQDiTPipeline.from_pretrained("alice/t5", cache_dir=places / "cache")
    drawn = []
    for pipe in (saved, loaded):
        pipe.set_progress_bar_config(disable=True)
        assert pipe.text_encoder.config.model_type == "t5" and pipe.text_vq is None
        options = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        drawn.append(pipe(["a red box", "green"], **options).segments["image"])
        assert pipe("green", negative_prompt="pink", num_inference_steps=2).images[0].size == (16, 16)
        assert str(pipe.tasks[0].call) == 'pipe(prompt=..., output="image")' and pipe.hub_task == "text-to-image"
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(without_the_package(hub, places, "alice/t5", "text"), drawn[0])

    # Finetuned, with the pipeline's own encoder and length; another one did not make the codes.
    tuned = f"--pretrained_model_name_or_path {places / 'out'} --dataset_name {places / 'data.parquet'} {TUNE} {tasks}"
    run("train_vqdit", f"{tuned} --output_dir {places / 'tuned'}")
    assert CodeDataset(places / "tuned" / "codes").fingerprints["text_encoder"] == codes.fingerprints["text_encoder"]
    for arguments, message in (
        (own.replace("/t5", "/bert"), "were made by another text_encoder than the one given"),
        (f"{data} {encoder} --tasks image->text", r"'image->text' generates \['text'\], but states of an encoder"),
        (f"{tuned} --max_sequence_length 5", "max_sequence_length=5, but the pretrained pipeline's 'text' has 9"),
        (f"{data} {encoder} {tasks}".replace("length 9", "length 0"), None),
        (
            f"{data} --text_encoder {places / 'clip'} --max_sequence_length 15 {tasks}",
            "max_sequence_length=15 must be",
        ),
    ):
        with pytest.raises(SystemExit if message is None else ValueError, match=message):
            run("train_vqdit", f"{arguments} {TUNE} --output_dir {places / 'x'}")


def test_both_sides_of_clip_and_dinov2(run, places, hub, client):
    """By ``--segment``, beside captions that are generated as codes: texts and pictures given as states."""
    data = f"--dataset_name {places / 'data.parquet'} --image_vq {places / 'image_vq'} --text_vq {places / 'text_vq'}"
    flags = f"--segment prompt=states:other:{places / 'clip'} --segment reference=image_states:image:{places / 'clip'}"
    flags += f" --segment second=image_states:image:{places / 'dinov2'}"
    tasks = "--tasks prompt->image,reference->image,prompt+second->image,image->text,reference->text"
    run("encode_dataset", f"{data} {flags} --output_dir {places / 'codes'}")
    codes = CodeDataset(places / "codes")
    names = {name: codes.entries[name]["tokenizer"] for name in ("prompt", "reference", "second")}
    assert names == {"prompt": "text_encoder", "reference": "image_encoder", "second": "second"}
    assert codes.segments["reference"] == {"channels": 16, "shape": [5]} and codes.segments["prompt"]["shape"] == [14]
    assert len(list((places / "codes").glob("states-*.arrow"))) == 1
    own = f"--codes_dir {places / 'codes'} --image_vq {places / 'image_vq'} --text_vq {places / 'text_vq'}"
    run("train_vqdit", f"{own} {flags} {tasks} {TINY} --output_dir {places / 'out'}")
    run("train_vqdit", f"{data} {flags} {tasks} {TINY} --output_dir {places / 'again'}")
    assert same(places / "out", places / "again")
    saved = VQDiTPipeline.from_pretrained(places / "out")
    assert list(saved.segment_tokenizers.tokenizers) == ["second"]
    assert type(saved.text_encoder).__name__ == "CLIPTextModel"
    assert type(saved.image_encoder).__name__ == "CLIPVisionModel"
    saved.push_to_hub("alice/clip")
    loaded = VQDiTPipeline.from_pretrained("alice/clip", cache_dir=places / "cache")
    picture, drawn = Image.new("RGB", (20, 16), "red"), []
    for pipe in (saved, loaded):
        pipe.set_progress_bar_config(disable=True)
        options = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", "output": "image"}
        drawn.append(pipe(inputs={"reference": picture}, **options).segments["image"])
        assert pipe(inputs={"prompt": "green", "second": picture}, num_inference_steps=2).images[0].size == (16, 16)
        assert len(pipe(inputs={"reference": picture}, output="text").texts) == 1
        assert len(pipe(image=picture, output="text").texts) == 1
    assert torch.equal(drawn[0], drawn[1])
