"""The shipped checkpoint: it does what its card says."""

import json
import math

import pytest
import torch
from PIL import Image

from diffusers_vqdit import TextVQModel, VQDiTPipeline, __main__
from diffusers_vqdit.training.data import load_training_dataset


@pytest.fixture(scope="module")
def folder(root):
    return root / "model_cards" / "vqdit-emoji-32"


@pytest.fixture(scope="module")
def starter(folder):
    pipe = VQDiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_its_card_shows_the_figures_that_were_measured(folder, script):
    report = json.loads((folder / "evaluation.json").read_text())
    table = script("evaluate").as_table(report)
    assert table == (folder / "evaluation.md").read_text().strip()
    assert table in (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def measured(starter, root, script):
    """The evaluation script, its options for a few samples, and the data."""
    evaluate = script("evaluate")
    options = ["--dataset_name", str(root / "training/data/emoji.parquet"), "--num_samples", "24", "--seed", "1"]
    args = evaluate.parse_args(["--pretrained_model_name_or_path", "x", *options])
    return evaluate, args, evaluate.EmojiData.load(starter.image_vq, 32, args)


@pytest.mark.slow  # all pictures are read and coded
def test_its_tokenizers_keep_what_the_card_says(starter, folder, measured):
    evaluate, args, data = measured
    report = json.loads((folder / "evaluation.json").read_text())["tokenizers"]
    figures = evaluate.measure_tokenizers(starter, data, args)
    assert figures.keys() == report.keys()
    for name, figure in figures.items():
        assert figure["value"] == pytest.approx(report[name]["value"], rel=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize(("task", "figures"), [("text->image", 4), ("image->text", 4), ("inpainting", 3)])
def test_its_transformer_does_what_the_card_says(starter, folder, measured, task, figures):
    evaluate, args, data = measured
    report = json.loads((folder / "evaluation.json").read_text())[task]
    again = evaluate.MEASURES[task](starter, data, args)
    assert again.keys() == report.keys() and len(report) == figures
    for name, figure in report.items():
        deviation = math.sqrt(figure["value"] * (1 - figure["value"]) / args.num_samples)
        assert abs(again[name]["value"] - figure["value"]) <= 3.5 * deviation, name


def test_a_prompt_gets_the_same_codes_in_any_batch_and_precision(starter, folder, root):
    data = load_training_dataset(dataset_name=str(root / "training/data/emoji.parquet"), split="test")
    prompts = [*(prompt for prompt, _ in __main__.PROMPTS), *data["text"][:64], *data["text_zh"][:64]]
    codes = starter.encode_prompt(prompts)
    for size in (1, 3, 64):
        parts = [starter.encode_prompt(prompts[start : start + size]) for start in range(0, len(prompts), size)]
        assert torch.equal(torch.cat(parts), codes)
    half = TextVQModel.from_pretrained(folder / "text_vq", torch_dtype=torch.float16)
    tokens = starter.tokenizer(prompts, padding="max_length", max_length=24, return_tensors="pt")
    assert torch.equal(half.encode_codes(tokens.input_ids, tokens.attention_mask), codes)


def test_one_prompt_is_drawn_as_in_a_batch(starter):
    seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
    batch = starter(["sailboat", "a red apple", "雪人"], generator=seeds, output_type="pt").images
    alone = starter("a red apple", generator=torch.Generator().manual_seed(1), output_type="pt").images[0]
    torch.testing.assert_close(alone, batch[1], atol=1e-4, rtol=0)
    red, green, blue = alone[:, 12:24, 10:22].mean((1, 2))  # the middle of the apple
    assert red > green + 0.2 and red > blue + 0.2


def test_the_demo_draws_and_captions(tmp_path, capsys, folder):
    arguments = ["--output_file", str(tmp_path / "grid.png"), "--num_inference_steps", "2"]
    __main__.main(__main__.parse_args(arguments))
    printed = capsys.readouterr().out
    examples = json.loads((folder / "examples" / "captions.json").read_text(encoding="utf-8"))
    count = len(__main__.PROMPTS) + len(examples)
    assert f"grid.png: {count} pictures" in printed and "Captions of pictures" in printed
    assert Image.open(tmp_path / "grid.png").width == 6 * __main__.CELL
    __main__.main(__main__.parse_args([*arguments, "--prompt", "sailboat", "雪人"]))
    assert "grid.png: 2 pictures" in capsys.readouterr().out


def test_prompts_decide_what_is_drawn(starter):
    # The same noise, other words: the face in the middle of the picture is darker or lighter as asked.
    prompts = ["an astronaut with dark skin tone", "an astronaut with light skin tone"]
    seeds = [torch.Generator().manual_seed(seed) for _ in prompts for seed in range(4)]
    pictures = starter(prompts, num_images_per_prompt=4, generator=seeds, output_type="pt").images
    dark, light = pictures[:, :, 12:20, 12:20].mean((1, 2, 3)).split(4)
    assert light.mean() > dark.mean() + 0.1
