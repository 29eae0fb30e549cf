"""Figures of pipelines whose prompts are states of an encoder, or whose captions are token ids."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_vqdit import MaskedDiffusionScheduler, VQDiTPipeline, VQDiTTransformer2DModel
from diffusers_vqdit.training.byte_pairs import train_text_tokenizer
from diffusers_vqdit.training.evaluation import Roles


WORDS = ["a red apple", "a blue box", "green", "a yellow dot", "white", "a dot"]
IMAGE = {"vocab_size": 32, "shape": [4, 4]}
LABEL = {"vocab_size": 3, "shape": [1]}
STATES = {"channels": 16, "shape": [9]}


@pytest.fixture
def data(tmp_path):
    """A test split of six pictures, with captions, labels and emoji."""
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(12)]
    rows = {
        "image": pictures,
        "reference": pictures[::-1],
        "text": WORDS * 2,
        "label": ["fruit", "box", "dot"] * 4,
        "emoji": list("aabbcc") * 2,
        "split": ["train"] * 6 + ["test"] * 6,
    }
    kinds = {n: datasets.Image() if n in ("image", "reference") else datasets.Value("string") for n in rows}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(tmp_path / "data.parquet")
    return tmp_path


def make(segments, tasks, entries, **parts):
    model = VQDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, segments=segments, tasks=tasks
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return VQDiTPipeline(
        model.eval(), MaskedDiffusionScheduler(), segments=entries, labels=["fruit", "box", "dot"], **parts
    )


def measured(run, pipe, folder):
    pipe.save_pretrained(folder / "pipe")
    options = "--num_samples 2 --num_inference_steps 1 --batch_size 3"
    run(
        "evaluate",
        f"--pretrained_model_name_or_path {folder / 'pipe'} --dataset_name {folder / 'data.parquet'} {options}",
    )
    assert Image.open(folder / "pipe" / "evaluation.png").size[0] > 300
    found = json.loads((folder / "pipe" / "evaluation.json").read_text())
    return {task: list(figures) for task, figures in found.items()}


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_captions_that_are_states_alone(run, data, image_vq, encoders, kind):
    tasks = ["text->image", "->image", "text->label", "image+text->label"]
    pipe = make(
        {"image": IMAGE, "text": STATES, "label": LABEL},
        tasks,
        {"text": {"modality": "states"}},
        image_vq=image_vq,
        text_encoder=encoders.text_encoder(kind),
        tokenizer_2=encoders.text_tokenizer(WORDS * 3),
    )
    roles = Roles.of(pipe)
    assert (roles.caption, roles.prompt, roles.texts, roles.states) == ("", "text", [], ["text"])
    found = measured(run, pipe, data)
    assert set(found) == {
        *("tokenizers", "text->image", "inpainting", "repair", "classification", "retrieval", "likelihood")
    }
    assert any("text->label" in name for name in found["classification"])
    assert all("text->image" in name for name in found["retrieval"])  # a gallery holds no states
    assert {name.split(", ")[1] for name in found["likelihood"]} == {"text->image", "->image"}


def test_a_prompt_of_states_beside_captions_of_codes(run, data, image_vq, text_vq, tokenizer, encoders):
    """The prompt reads the captions, or a column of its own where there is one."""
    pipe = make(
        {"image": IMAGE, "text": {"vocab_size": 64, "shape": [12]}, "prompt": STATES, "reference": STATES},
        ["prompt->image", "image->text", "->image", "reference->image", "reference+prompt->image"],
        {"prompt": {"modality": "states"}, "reference": {"modality": "image_states"}},
        image_vq=image_vq,
        text_vq=text_vq,
        tokenizer=tokenizer,
        text_encoder=encoders.text_encoder("t5"),
        tokenizer_2=encoders.text_tokenizer(WORDS * 3),
        image_encoder=encoders.image_encoder("clip"),
        feature_extractor=encoders.feature_extractor(),
    )
    roles = Roles.of(pipe)
    assert (roles.caption, roles.prompt, roles.states) == ("text", "prompt", ["prompt"])
    found = measured(run, pipe, data)
    assert {"text->image", "image->text", "image->image", "inpainting", "retrieval", "text similarity"} <= set(found)
    assert len(found["text->image"]) == 2  # of training, and held out
    assert {name.split(",")[0] for name in found["image->image"]} == {"reference->image", "prompt+reference->image"}


def test_captions_that_are_token_ids(run, data, image_vq):
    words = train_text_tokenizer(WORDS * 3, 290)
    pipe = make(
        {"image": IMAGE, "text": {"vocab_size": len(words), "shape": [12], "block_length": 4}},
        ["text->image", "image->text", "->text", "->image"],
        {"text": {"modality": "text", "tokenizer": "tokenizer"}},
        image_vq=image_vq,
        tokenizer=words,
    )
    found = measured(run, pipe, data)
    assert {"text->image", "image->text", "->text", "infilling", "retrieval", "classification"} <= set(found)
    assert "text similarity" not in found and not any("round trip" in name for name in found["tokenizers"])
