"""The dataset of two styles and many people's words, and what is measured on such data."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

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
    with names_of_codes(codes) as names:
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


def names_of_codes(sets):
    """An archive of shortcodes, none but for what `sets` has."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("github", "iamcal", "cldr", "emojibase", "joypixels"):
            data = json.dumps(sets.get(name, {})).encode()
            info = tarfile.TarInfo(f"package/en/shortcodes/{name}.json")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    file.seek(0)
    return tarfile.open(fileobj=file)


def test_no_training_row_has_a_held_out_picture(prepare):
    """Neither as its picture nor as its source."""
    count, columns = 64, {name: [] for name in ("image", "text", "text_zh", "phrase", "split", "held_out")}
    codes = [f"{0x1F400 + row:x}" for row in range(count)]
    for row, code in enumerate(codes):
        data = io.BytesIO()
        Image.new("RGB", (8, 8), (row + 1, 0, 0)).save(data, format="PNG")
        columns["image"].append({"bytes": data.getvalue(), "path": f"{code}.png"})
        for name in ("text", "text_zh", "phrase"):
            columns[name].append(f"thing {row}")
        columns["split"].append("test" if row % 8 == 0 else "train")
        columns["held_out"].append("composition" if row % 8 == 0 else "")
    columns |= {name: [value] * count for name, value in {"keywords": "x", "label": "y", "skin_tone": ""}.items()}
    columns["emoji"] = codes
    features = {name: datasets.Value("string") for name in columns} | {"image": datasets.Image()}
    emoji = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    round_ones = {code.upper(): Image.new("RGB", (8, 8), (0, row + 1, 0)) for row, code in enumerate(codes)}
    with names_of_codes({}) as names:
        made = prepare.rows(emoji, round_ones, names, 8)
    held = {row["image"]["bytes"] for row in made if row["split"] == "test"}
    assert len(made) == 2 * count and any(row["held_out"] == "style" for row in made)
    for row in made:
        assert row["split"] == "test" or (row["image"]["bytes"] not in held and row["source"]["bytes"] not in held)
        if row["held_out"]:  # what is judged still has the other style as its source
            assert row["source"]["bytes"] != row["image"]["bytes"]


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


def test_a_judge_of_another_size_is_refused_before_the_work(styles, image_vq, script, monkeypatch):
    evaluate = script("evaluate")
    args = evaluate.parse_args(f"--pretrained_model_name_or_path x --dataset_name {styles}".split())
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    backbone = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16))
    evaluate.EmojiData.load(image_vq, 16, args, BackboneFeatures(backbone, image_size=32))
    monkeypatch.setattr("diffusers_vqdit.training.evaluation.reconstruct", None)
    with pytest.raises(ValueError, match="features_image_size=None: ViTModel doesn't take pictures of 16 px"):
        evaluate.EmojiData.load(image_vq, 16, args, BackboneFeatures(backbone))


@pytest.mark.parametrize("missing", ["unseen", "held_out"])
@pytest.mark.parametrize("empty", [True, False])
def test_columns_of_these_sets_may_be_empty_or_missing(styles, image_vq, script, missing, empty, tmp_path):
    data = datasets.load_dataset("parquet", data_files=str(styles), split="train", cache_dir=str(tmp_path / "cache"))
    data = data.remove_columns(missing)
    if empty:
        data = data.add_column(missing, [None] * len(data), feature=datasets.Value("string"))
    path = tmp_path / "other.parquet"
    data.to_parquet(str(path))
    evaluate = script("evaluate")
    args = evaluate.parse_args(f"--pretrained_model_name_or_path x --dataset_name {path}".split())
    data = evaluate.EmojiData.load(image_vq, 16, args)
    if missing == "unseen":
        assert data.unseen == [] and data.composition == [6] and sorted(data.styles) == [7, 8]
    else:
        assert data.styles == [] and sorted(data.composition) == [6, 7, 8, 9] and sorted(data.unseen) == [0, 2]
