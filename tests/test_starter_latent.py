"""The shipped checkpoint of flow matching over latents: it does what its card says."""

import importlib.util
import json
import math

import pytest
import torch

from diffusers_vqdit import VQDiTLatentPipeline


@pytest.fixture(scope="module")
def folder(root):
    return root / "model_cards" / "vqdit-emoji-latent"


@pytest.fixture(scope="module")
def starter(folder):
    pipe = VQDiTLatentPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "evaluation.json").read_text())


@pytest.mark.parametrize("name", ["evaluation.json", "comparison.json"])
def test_its_card_shows_the_figures_that_were_measured(folder, root, name):
    path = root / "benchmarks" / "kinds_of_diffusion.py"
    spec = importlib.util.spec_from_file_location("kinds_of_diffusion", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.as_table(json.loads((folder / name).read_text())) in (folder / "README.md").read_text()


@pytest.mark.slow
def test_it_draws_what_the_card_says(starter, root, script, report):
    evaluate = script("evaluate")
    options = ["--dataset_name", str(root / "training/data/emoji.parquet"), "--num_samples", "24", "--seed", "1"]
    args = evaluate.parse_args(["--pretrained_model_name_or_path", "x", *options])
    data = evaluate.EmojiData.load(starter.vae, 32, args)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(24)]
    scheduler = "flow-match Euler, stochastic"  # its own

    def agrees(hits, task, steps):
        wanted = ("vqdit-emoji-latent", scheduler, task, steps)
        (row,) = (r for r in report if (r["checkpoint"], r["scheduler"], r["task"], r["steps"]) == wanted)
        expected = row["share"]["value"]
        deviation = math.sqrt(expected * (1 - expected) / 24)
        return abs(sum(hits) / 24 - expected) <= 3.5 * deviation

    def draw(steps, **given):
        return starter(**given, num_inference_steps=steps, generator=seeds, output_type="pt").images

    assert agrees(data.nearest(draw(16, prompt=data.texts(data.train)), data.train), "text->image", 16)
    labels = (list(starter.labels) * 3)[:24]
    found = [data.columns["label"][row] for row in data.nearest_rows(draw(32, class_labels=labels))]
    assert agrees([a == b for a, b in zip(found, labels, strict=True)], "label->image", 32)


def test_its_goals_are_met(report):
    """Of training captions and of labels four in five, drawn with the scheduler that is shipped."""
    own = [row for row in report if row["checkpoint"] == "vqdit-emoji-latent" and "stochastic" in row["scheduler"]]
    for task in ("text->image", "label->image"):
        best = max((row for row in own if row["task"] == task), key=lambda row: row["steps"])
        assert best["share"]["value"] >= 0.8
