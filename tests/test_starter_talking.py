"""The checkpoint that listens and speaks, with the figures that were measured."""

import json
import re

import pytest
import torch

from diffusers_vqdit import VQDiTPipeline


@pytest.fixture(scope="module")
def folder(root):
    return root / "model_cards" / "vqdit-talking-emoji"


def test_its_card_shows_the_figures_that_were_measured(folder, script):
    report = json.loads((folder / "evaluation_speech.json").read_text())
    assert script("evaluate").as_table(report) in (folder / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/tasks.md"])
def test_the_figures_of_the_tasks_table_are_the_cards(root, folder, page):
    report = json.loads((folder / "evaluation_speech.json").read_text())
    measures = {"text->speech": "recognised", "audio->text": "exact match", "audio->image": "nearest picture"}
    values = [report[task][f"pair, {name}"]["value"] for task, name in measures.items()]
    unseen = max(report[task][f"picture, {name}"]["value"] for task, name in measures.items())
    (row,) = [one for one in (root / page).read_text().splitlines() if one.startswith(f"| {', '.join(measures)} |")]
    assert re.findall(r"\d+\.\d %", row) == [f"{100 * value:.1f} %" for value in (*values, unseen)]


def test_it_hears_what_it_says_and_draws_it(folder):
    """Of what it says itself it understands nearly all."""
    pipe = VQDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    captions = ["watermelon", "banana", "pizza", "coconut", "popcorn", "bread", "chocolate bar", "doughnut"]
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(captions))]
    said = pipe(captions, output="speech", generator=seeds)
    assert said.sampling_rate == 11025
    assert all(0.3 < len(sound) / said.sampling_rate < 4 for sound in said.audios)
    sounds = [{"array": sound, "sampling_rate": said.sampling_rate} for sound in said.audios]
    texts = pipe(inputs={"audio": sounds}, output="text", generator=seeds).texts
    assert sum(text == caption for text, caption in zip(texts, captions, strict=True)) >= 7
    assert pipe(inputs={"audio": sounds[0]}, output="image").images[0].size == (32, 32)
