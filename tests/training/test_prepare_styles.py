"""The dataset of two styles and many people's words."""

import io
import json
import tarfile

import datasets
import pytest
from PIL import Image


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
        "joypixels": {"1F34E": ["red_apple", "fruit"], "1F680": ["rocket_ship", "space_craft"], "1F697": "fruit"},
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
    flat, solid, rocket = made
    assert flat["source"] == solid["image"] and solid["source"] == flat["image"]
    assert rocket["source"] == rocket["image"]  # there is no other style
    assert solid["text_zh"] == "红苹果，立体" and solid["wording_1"] == flat["wording_1"] + ", 3d"
    wordings = {flat[f"wording_{i}"] for i in range(1, 5)}
    assert wordings <= {
        f"{the}{word}{s}" for the in ("", "the ") for word in ("apple", "red apple") for s in ("", "s")
    }
    # JoyPixels' "fruit" is two emoji's, "red apple" and "rocket ship" are known.
    assert [row["unseen"] for row in made] == ["", "", "space craft"]
    with Image.open(io.BytesIO(solid["image"]["bytes"])) as picture:
        assert picture.size == (16, 16)
