"""The unfinished checkpoint of 64 px: it captions and labels what it was trained on."""

import io

import pytest
import torch
from PIL import Image

from diffusers_vqdit import VQDiTPipeline
from diffusers_vqdit.training.data import load_training_dataset


@pytest.fixture(scope="module")
def folder(root):
    return root / "model_cards" / "vqdit-emoji"


def test_it_captions_and_labels_pictures_of_training(folder, root):
    pipe = VQDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    emoji = load_training_dataset(
        dataset_name=str(root / "training/data/emoji.parquet"),
        split="train",
        image_column="image",
        columns=["text", "label"],
    )
    rows = list(range(100, 3400, 300))
    some = emoji.select(rows)
    pictures = [Image.open(io.BytesIO(one["bytes"])) for one in some["image"]]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(rows))]
    texts = pipe(image=pictures, output="text", generator=generators).texts
    labels = pipe.classify(image=pictures).labels
    assert sum(text == caption for text, caption in zip(texts, some["text"], strict=True)) >= 7
    assert sum(label == name for label, name in zip(labels, some["label"], strict=True)) >= 9
