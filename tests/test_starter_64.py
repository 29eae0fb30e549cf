"""The shipped checkpoint of 64 px: it draws, captions and labels, and its card has the figures that were measured."""

import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_vqdit import VQDiTPipeline, __main__
from diffusers_vqdit.training.data import load_training_dataset


@pytest.fixture(scope="module")
def folder(root):
    return root / "model_cards" / "vqdit-emoji"


@pytest.fixture(scope="module")
def starter(folder):
    pipe = VQDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def emoji(root, split):
    return load_training_dataset(
        dataset_name=str(root / "training/data/emoji.parquet"),
        split=split,
        image_column="image",
        columns=["text", "label"],
    )


def pictures(table):
    return [Image.open(io.BytesIO(one["bytes"])).convert("RGB") for one in table["image"]]


def test_its_card_shows_the_figures_that_were_measured(folder, script):
    report = json.loads((folder / "evaluation.json").read_text())
    table = script("evaluate").as_table(report)
    assert table == (folder / "evaluation.md").read_text().strip()
    assert table in (folder / "README.md").read_text()


SEEN, UNSEEN, NEAREST = "training captions", "held-out compositions", "nearest picture is the one named"
FIGURES = {
    "text->image": [
        f"{which}, {language}, {NEAREST}" for which in (UNSEEN, SEEN) for language in ("English", "Chinese")
    ],
    "label->image": ["all labels, nearest picture has the label"],
    "image->text": [f"{which}, English, exact match" for which in (UNSEEN, "training pictures")],
    "image->text_zh": [f"{which}, Chinese, exact match" for which in (UNSEEN, "training pictures")],
    "inpainting": [
        f"{UNSEEN}, central half, with caption, nearest picture is the right one",
        "pixels outside of the mask bit-identical",
    ],
    "->text": ["samples that are captions of the dataset"],
    "infilling": [f"{UNSEEN}, one token, exact match", f"{UNSEEN}, one token, picture given, exact match"],
    "->image+text": [
        f"{how}, nearest picture is of the caption's emoji" for how in ("both at once", "->text, then text->image")
    ],
    "text->text_zh": [f"{UNSEEN}, English to Chinese, exact match"],
    "text_zh->text": [f"{UNSEEN}, Chinese to English, exact match"],
    "keywords->text": [f"{UNSEEN}, keywords to caption, exact match"],
    "image->label": [f"{which}, image->label, label is right" for which in (UNSEEN, "whole test split")],
    "text->label": [f"{which}, text->label, label is right" for which in (UNSEEN, "whole test split")],
    "zero-shot": [f"{UNSEEN}, picture, caption chosen among ten by likelihood"],
}
OF_TASKS = {
    "image->text_zh": "image->text",
    "text->text_zh": "text->text",
    "text_zh->text": "text->text",
    "keywords->text": "text->text",
    "image->label": "classification",
    "text->label": "classification",
    "zero-shot": "classification",
}


@pytest.mark.parametrize("page", ["README.md", "docs/tasks.md"])
def test_the_figures_of_the_tasks_table_are_the_cards(root, folder, page):
    report = json.loads((folder / "evaluation.json").read_text())
    rows = dict(re.findall(r"^\| (\S+) \|.*\| (.*) \|$", (root / page).read_text(), flags=re.MULTILINE))
    assert len(rows.keys() & FIGURES.keys()) >= 10
    for task in rows.keys() & FIGURES.keys():
        values = [report[OF_TASKS.get(task, task)][measure]["value"] for measure in FIGURES[task]]
        found = [float(one) for one in re.findall(r"(\d+(?:\.\d)?) %", rows[task])]
        assert found == [pytest.approx(100 * value, abs=0.051) for value in values], task


def test_it_captions_and_labels_pictures_of_training(starter, root):
    some = emoji(root, "train").select(range(100, 3400, 300))
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(some))]
    texts = starter(image=pictures(some), output="text", generator=generators).texts
    labels = starter.classify(image=pictures(some)).labels
    assert sum(text == caption for text, caption in zip(texts, some["text"], strict=True)) >= 10
    assert sum(label == name for label, name in zip(labels, some["label"], strict=True)) >= 10


@pytest.mark.slow
def test_eleven_of_the_demos_twelve_pictures_are_of_what_their_prompts_say(starter, root):
    wanted = [(meaning or prompt).removeprefix("a ").removeprefix("an ") for prompt, meaning in __main__.PROMPTS]
    wanted = [one.replace(" with medium", ", medium") for one in wanted]
    prompts = [prompt for prompt, _ in __main__.PROMPTS]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    drawn = starter(prompts, generator=generators, output_type="np").images.reshape(len(prompts), -1)
    tables = [emoji(root, split) for split in ("train", "test")]
    captions = [text for table in tables for text in table["text"]]
    assert set(wanted) <= set(captions)
    real = np.stack([np.asarray(one, np.float32).ravel() / 255 for table in tables for one in pictures(table)])
    distances = np.square(real).sum(1) - 2 * drawn @ real.T
    nearest = [captions[index] for index in distances.argmin(1)]
    assert sum(one == other for one, other in zip(nearest, wanted, strict=True)) >= 9, nearest

    def thing(caption):
        return caption.split(",")[0].removesuffix(" without snow")  # that is a snowman, too

    assert sum(thing(one) == thing(other) for one, other in zip(nearest, wanted, strict=True)) >= 11, nearest
