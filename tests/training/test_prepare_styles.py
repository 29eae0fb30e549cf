"""The dataset of two styles and many people's words, and what is measured on such data."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetModel

from diffusers_vqdit.training.image_losses import BackboneFeatures


@pytest.fixture
def prepare(script, root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "training"))
    return script("prepare_styles")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the_Red_apple", "red apple"),
        ("Côte d’Ivoire", "cote d ivoire"),
        ("an  astronaut, dark skin tone", "astronaut dark skin tone"),
        ("+1", "1"),
        ("Bosnia & Herzegovina", "bosnia and herzegovina"),
        ("红", ""),
    ],
)
def test_plain_words(prepare, text, words):
    assert prepare.plain(text) == words == prepare.plain(words)


def test_each_order_has_all_words_and_the_tone(prepare):
    for tone in ("dark", "light+medium-dark"):
        made = [prepare.toned("red apple", tone, order) for order in range(4)]
        assert len(set(made)) == 4
        assert all("red apple" in one and all(part in one for part in tone.split("+")) for one in made)
    assert {prepare.toned("cats", "", order) for order in range(4)} == {"cats", "the cats"}


def test_rows_of_both_styles(prepare):
    codes = {
        "github": {"1F34E": ["apple", "+1"], "1F680": "rocket_ship"},
        "iamcal": {"1F34E": "apple"},
        "cldr": {"1F34E": "red_apple"},
        "emojibase": {},
        "joypixels": {"1F34E": ["red_apple", "fruit"], "1F680": "rocket_ship", "1F697": "fruit"},
    }
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, found in codes.items():
            data = json.dumps(found).encode()
            info = tarfile.TarInfo(f"package/en/shortcodes/{name}.json")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    common = {"keywords": "x", "label": "food", "skin_tone": "", "split": "train", "held_out": ""}
    rows = [
        {"path": "1f34e.png", "text": "red apple", "text_zh": "红苹果", "phrase": "a red apple", "emoji": "🍎"},
        {"path": "1f680.png", "text": "rocket", "text_zh": "火箭", "phrase": "a rocket", "emoji": "🚀"},
    ]
    pictures = []
    for row, colour in zip(rows, ("red", "blue"), strict=True):
        data = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(data, format="PNG")
        pictures.append({"bytes": data.getvalue(), "path": row.pop("path")})
    columns = {"image": pictures} | {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {name: [value] * 2 for name, value in common.items()}
    features = {name: datasets.Value("string") for name in columns} | {"image": datasets.Image()}
    emoji = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    file.seek(0)
    with tarfile.open(fileobj=file) as names:
        made = prepare.rows(emoji, {"1F34E": Image.new("RGB", (16, 16), "pink")}, names, 16)

    assert [(row["style"], row["text"]) for row in made] == [
        ("flat", "red apple"),
        ("3d", "red apple, 3d"),
        ("flat", "rocket"),
    ]
    flat, round_one, rocket = made
    assert flat["source"] == round_one["image"] and round_one["source"] == flat["image"]
    assert rocket["source"] == rocket["image"]  # there is no other style
    assert round_one["text_zh"] == "红苹果，立体" and round_one["wording_1"] == flat["wording_1"] + ", 3d"
    wordings = {flat[f"wording_{i}"] for i in range(1, 5)}
    assert wordings <= {
        f"{the}{word}{s}" for the in ("", "the ") for word in ("apple", "red apple") for s in ("", "s")
    }
    # JoyPixels' "fruit" is two emoji's, "red apple" and "rocket ship" are known.
    assert [row["unseen"] for row in made] == ["", "", ""]
    with Image.open(io.BytesIO(round_one["image"]["bytes"])) as picture:
        assert picture.size == (16, 16)


@pytest.fixture
def styles(tmp_path):
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(10)]
    rows = {
        "image": pictures,
        "text": [f"thing {i}" for i in range(10)],
        "unseen": ["gadget", "", "gizmo", *[""] * 7],
        "split": ["train"] * 6 + ["test"] * 4,
        "held_out": [""] * 6 + ["composition", "style", "style", "picture"],
    }
    features = {name: datasets.Value("string") for name in rows} | {"image": datasets.Image()}
    path = tmp_path / "styles.parquet"
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(str(path))
    return path


def test_the_sets_that_are_measured_and_both_judges(styles, image_vq, script):
    evaluate = script("evaluate")
    args = evaluate.parse_args(f"--pretrained_model_name_or_path x --dataset_name {styles}".split())
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    data = evaluate.EmojiData.load(image_vq, 16, args, BackboneFeatures(ResNetModel(config)))
    assert data.composition == [6] and sorted(data.styles) == [7, 8] and sorted(data.unseen) == [0, 2]
    own = data.decoded / 2 + 0.5
    rows = [0, 4, 9]
    right = data.judged(own[rows], rows, 2)
    assert {how: figure["value"] for how, figure in right.items()} == {"": 1.0, " by features": 1.0}
    wrong = data.judged(own[rows], [1, 2, 3], 2)
    assert {how: figure["value"] for how, figure in wrong.items()} == {"": 0.0, " by features": 0.0}
    without = evaluate.EmojiData.load(image_vq, 16, args)
    assert without.judged(own[rows], rows, 2).keys() == {""}
