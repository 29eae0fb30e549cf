"""The dataset of two styles and many people's words."""

import io
import itertools
import json
import random
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
    with names_of_codes(codes, {"1F34E": ["Crisp", "fall fruit"], "1F697": ["wheel"]}) as names:
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
    words = {word for index in range(1, 17) for word in flat[f"words_{index}"].split()}
    assert words >= {"crisp", "fall", "fruit"} and "wheel" not in words
    assert all("space" not in rocket[f"words_{index}"] for index in range(1, 17))  # a word of the judged alone
    assert solid["words_3"] == flat["words_3"] + ", 3d"
    # JoyPixels' "fruit" is two emoji's, "red apple" and "rocket ship" are known.
    assert [row["unseen"] for row in made] == ["", "", "space craft"]
    with Image.open(io.BytesIO(solid["image"]["bytes"])) as picture:
        assert picture.size == (16, 16)


def names_of_codes(sets, tags=None):
    """An archive of shortcodes and tags, none but for what `sets` and `tags` have."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        sources = ("github", "iamcal", "cldr", "emojibase", "joypixels")
        files = {f"shortcodes/{name}": sets.get(name, {}) for name in sources}
        files["data"] = [{"hexcode": code, "tags": told} for code, told in (tags or {}).items()]
        for name, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/en/{name}.json")
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


def test_selections_are_words_that_mean_the_emoji_alone(prepare, monkeypatch):
    said = {"A": {"red", "apple", "fruit"}, "B": {"red", "car"}, "C": {"apple", "pie", "fruit", "red"}}
    means = {word: {name for name, words in said.items() if word in words} for word in set().union(*said.values())}
    refused = {frozenset({"car"}), frozenset({"pie", "red"})}
    for name in "BC":
        made = prepare.selections(said[name], means, refused, name)
        assert made == prepare.selections(said[name], means, refused, name) and len(made) == prepare.NUM_SELECTIONS
        assert not {frozenset(one.split()) for one in made} & refused
        for one in made:
            assert any(word[:3] in one for word in ("car", "pie"))  # all others are said of several
    monkeypatch.setattr(prepare, "reworded", lambda word, generator: word)
    for one in prepare.selections(said["A"], means, set(), "A"):  # all of its words are C's, too
        assert one.replace(" ", "") in {"".join(order) for order in itertools.permutations(said["A"])}
    many = {f"w{index}" for index in range(20)}
    made = prepare.selections(many, dict.fromkeys(many, {"A", "B"}), set(), "A")
    assert all(one.count("w") == prepare.MOST_WORDS for one in made)


def test_some_words_get_other_endings(prepare):
    generator = random.Random(0)
    made = [prepare.reworded("racing", generator) for _ in range(2000)]
    changed = [one for one in made if one != "racing"]
    assert 0.05 < len(changed) / len(made) < 0.11 and set(changed) == {"rac", "racs", "raced", "racer"}
    assert {prepare.reworded("as", generator) for _ in range(200)} == {"as"}
