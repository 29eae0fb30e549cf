"""Folders of pictures as people have them: odd names, links, runs inside them, damaged metadata."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusers_vqdit.training.data import load_splits, load_training_dataset


ODD_FOLDERS = [
    *("pics [2024]", "[", "]", "[!a]", "a*b", "**", "what?", "{a,b}", "a b", " lead", "trail ", "50%", "%20", "%2F"),
    *("#1", "a#b", "a&b", "a;b", "a'b", 'a"b', "a\\b", "a:b", "a::b", "http:", "~", "~user", "$HOME", "$(x)", "-x"),
    *(
        "été",
        "e\u0301te\u0301",
        "日本",
        "😀",
        "שלום",
        "train",
        "test",
        "validation",
        "tab\there",
        "new\nline",
        "\u200b",
    ),
]
ODD_FILES = [
    *(
        "train.png",
        "test.png",
        "validation.png",
        "steam train.png",
        "test tube.png",
        "dev.png",
        "eval_1.png",
        "val.PNG",
    ),
    *("train-00000-of-00001.png", "[1].png", "a*.png", "?.png", "100%.png", "%41.png", "#.png", "a::b.png", "é.png"),
    *(
        "e\u0301.png",
        "猫.png",
        "🙂.png",
        "metadata.png",
        "checkpoint-1.png",
        "-rf.png",
        " .png",
        "a.b.c.png",
        "n\nl.png",
    ),
]


def draw(path, color=0, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (color % 256, 0, 0)).save(path, "PNG")


def paths(dataset):
    return [value["path"] for value in dataset["image"]]


def read(folder, **options):
    return load_training_dataset(train_data_dir=str(folder), image_column="image", **options)


@pytest.mark.parametrize("metadata", [False, True])
@pytest.mark.parametrize("name", ODD_FOLDERS)
def test_names_of_folders_mean_nothing(tmp_path, name, metadata):
    folder = tmp_path / name
    for index in range(3):
        draw(folder / f"{index}.png", index)
    if metadata:
        rows = [{"file_name": f"{index}.png", "text": f"t{index}"} for index in range(3)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = read(folder)
    assert paths(dataset) == [str(folder / f"{index}.png") for index in range(3)]
    assert ("text" in dataset.column_names) == metadata
    assert len(load_training_dataset(dataset_name=str(folder), image_column="image")) == 3


@pytest.mark.parametrize("suffix", ["jsonl", "csv", None])
def test_names_of_files_mean_nothing(tmp_path, suffix):
    for index, name in enumerate(ODD_FILES):
        draw(tmp_path / name, index)
    if suffix == "jsonl":
        rows = [json.dumps({"file_name": name, "text": name}) for name in ODD_FILES]
        (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    elif suffix == "csv":
        quoted = ['"' + name.replace('"', '""') + '"' for name in ODD_FILES]
        (tmp_path / "metadata.csv").write_text("file_name,text\n" + "\n".join(f"{x},{x}" for x in quoted))
    dataset = read(tmp_path)
    assert sorted(paths(dataset)) == sorted(str(tmp_path / name) for name in ODD_FILES)
    assert list(load_splits(train_data_dir=str(tmp_path))) == ["train"]
    if suffix:
        assert list(dataset["text"]) == ODD_FILES


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=20)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(folder=NAMES, names=st.sets(NAMES, min_size=1, max_size=4), texts=st.lists(NAMES, min_size=4, max_size=4))
def test_any_name_and_any_text_come_back(tmp_path_factory, folder, names, texts):
    folder = tmp_path_factory.mktemp("any") / f"x{folder}"
    files = [f"x{name}.png" for name in sorted(names)]
    # Two names that only spell an accent differently may be one file.
    files = list({unicodedata.normalize("NFC", name): name for name in files}.values())
    rows = [{"file_name": name, "text": text} for name, text in zip(files, texts, strict=False)]
    for index, name in enumerate(files):
        draw(folder / name, index)
    assert sorted(paths(read(folder))) == sorted(str(folder / name) for name in files)
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    dataset = read(folder)
    assert paths(dataset) == [str(folder / name) for name in files]
    assert list(dataset["text"]) == [row["text"] for row in rows]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200), suffix=st.sampled_from(["jsonl", "csv", "parquet"]), cut=st.integers(0, 60))
def test_no_metadata_makes_the_reading_fail_unnamed(tmp_path_factory, data, suffix, cut):
    folder = tmp_path_factory.mktemp("any")
    draw(folder / "1.png")
    good = b"file_name,text\n1.png,one\n" if suffix == "csv" else json.dumps(GOOD).encode() + b"\n"
    for content in (good + data, data + b"\n" + good, good[:cut] + data):
        (folder / f"metadata.{suffix}").write_bytes(content)
        try:
            assert set(paths(read(folder))) == {str(folder / "1.png")}
        except ValueError as error:
            assert "metadata." in str(error)


@pytest.mark.parametrize("name", ["a[1].parquet", "b::c.parquet", "{x}.parquet", "e*.PARQUET", "p #%20.parquet"])
def test_parquet_files_of_any_name(tmp_path, name):
    from datasets import Dataset

    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(str(tmp_path / "plain.parquet"))
    os.rename(tmp_path / "plain.parquet", tmp_path / name)
    options = {"dataset_name": str(tmp_path / name), "cache_dir": str(tmp_path / "cache")}
    assert list(load_training_dataset(**options)["text"]) == ["a", "b"]
    Dataset.from_dict({"text": ["c"]}).to_parquet(str(tmp_path / "plain.parquet"))
    os.replace(tmp_path / "plain.parquet", tmp_path / name)
    assert list(load_training_dataset(**options)["text"]) == ["c"]  # not what the cache has


def test_a_folder_of_tables_with_brackets_in_its_name(tmp_path):
    from datasets import Dataset

    (tmp_path / "set [2]").mkdir()
    Dataset.from_dict({"text": ["a", "b"]}).to_parquet(str(tmp_path / "plain.parquet"))
    os.rename(tmp_path / "plain.parquet", tmp_path / "set [2]" / "train.parquet")
    options = {"dataset_name": str(tmp_path / "set [2]"), "cache_dir": str(tmp_path / "cache")}
    assert list(load_training_dataset(**options)["text"]) == ["a", "b"]


def test_a_folder_of_pictures_by_its_name_as_a_dataset(tmp_path, caplog):
    draw(tmp_path / "1.png")
    draw(tmp_path / "run" / "samples" / "2.png")
    (tmp_path / "run" / "model_index.json").write_text("{}")
    (tmp_path / "run" / "codes.parquet").write_text("")
    assert paths(load_training_dataset(dataset_name=str(tmp_path), image_column="image")) == [str(tmp_path / "1.png")]
    assert len([r for r in caplog.records if "training runs wrote" in r.message]) == 1


STRAY = ["info.json", "list.csv", "names.jsonl", "a.jpg.json", "backup.zip", "load.py"]


@pytest.mark.parametrize("names", [[name] for name in STRAY] + [STRAY[:3]])
def test_a_file_beside_pictures_does_not_change_how_they_are_read(tmp_path, caplog, names):
    """Rows of metadata, runs in the folder, and the warnings are those of the folder without it."""
    for index in range(3):
        draw(tmp_path / f"{index}.png")
    draw(tmp_path / "run" / "samples" / "step-000001.png")
    (tmp_path / "run" / "model_index.json").write_text("{}")
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / "segments.json").write_text("{}")
    (tmp_path / "codes" / "codes-00000.arrow").write_text("")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": "a"}\n{"file_name": "2.png", "text": "b"}'
    )
    for name in names:
        (tmp_path / name).write_text('{"a": 1}')
    dataset = load_training_dataset(dataset_name=str(tmp_path), columns=["text"], image_column="image")
    assert list(dataset["text"]) == ["a", "b"]
    assert "left out 1 of 3 pictures" in caplog.text and "training runs wrote" in caplog.text
    assert f"left out {len(names)} files" in caplog.text and names[0] in caplog.text


@pytest.mark.parametrize("name", ["a.heic", "IMG_0001", "b.jpg~", "c.jpg_large", "d.svg"])
def test_files_without_a_pictures_ending_are_counted_and_named(tmp_path, caplog, name):
    draw(tmp_path / "1.png")
    draw(tmp_path / "more" / name)
    assert paths(read(tmp_path)) == [str(tmp_path / "1.png")]
    assert "left out 1 files" in caplog.text and name in caplog.text


def test_a_file_name_that_is_no_text_is_read(tmp_path):
    draw(tmp_path / "1.png")
    os.rename(tmp_path / "1.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    value = read(tmp_path)[0]["image"]
    assert value["bytes"].startswith(b"\x89PNG") and "caf" in value["path"]


def test_what_is_no_picture_file_is_left_out(tmp_path, caplog):
    draw(tmp_path / "1.png")
    draw(tmp_path / ".hidden.png")
    draw(tmp_path / ".cache" / "2.png")
    draw(tmp_path / "sub" / "3.JPG")
    (tmp_path / "notes.txt").write_text("no picture")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "nothing.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "linked.png").symlink_to(tmp_path / "1.png")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "again").symlink_to(tmp_path / "sub")
    names = [os.path.relpath(path, tmp_path) for path in paths(read(tmp_path))]
    assert names == ["1.png", "linked.png", "sub/3.JPG"]
    assert "left out 2 paths" in caplog.text and "pipe.png" in caplog.text and "nothing.png" in caplog.text


def test_class_folders_are_labels_as_in_imagefolder(tmp_path):
    from datasets import load_dataset

    for index, name in enumerate(["dog/1.png", "cat/1.png", "cat/2.png", "10/1.png"]):
        draw(tmp_path / name, index)
    dataset, stock = read(tmp_path), load_dataset("imagefolder", data_dir=str(tmp_path))["train"]
    assert dataset.features["label"] == stock.features["label"]
    assert sorted(dataset["label"]) == sorted(stock["label"])
    files = [Path(value["path"]) for value in dataset["image"]]
    assert dataset.features["label"].int2str(dataset["label"]) == [file.parent.name for file in files]
    draw(tmp_path / "loose.png")  # now they are at several depths
    assert read(tmp_path).column_names == ["image"]


def test_split_folders_are_splits_only_if_all_pictures_lie_in_them(tmp_path):
    for name in ["train/1.png", "train/2.png", "test/3.png", "val/4.png"]:
        draw(tmp_path / name)
    splits = load_splits(train_data_dir=str(tmp_path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 2, "test": 1, "validation": 1}
    assert splits["train"].column_names == ["image"]
    draw(tmp_path / "boat" / "5.png")
    splits = load_splits(train_data_dir=str(tmp_path))
    assert {name: len(split) for name, split in splits.items()} == {"train": 5}
    assert splits["train"].features["label"].names == ["boat", "test", "train", "val"]


@pytest.mark.parametrize(
    "marks",
    [
        {"model_index.json": "{}"},
        {"config.json": '{"_class_name": "ImageVQModel"}'},
        {"pytorch_lora_weights.safetensors": ""},
        {"checkpoint-5/model.safetensors": ""},
    ],
)
@pytest.mark.parametrize("inside", [True, False])
def test_what_training_runs_wrote_is_not_read(tmp_path, caplog, marks, inside):
    output = tmp_path / "runs" / "mine" if inside else tmp_path
    draw(tmp_path / "1.png")
    draw(output / "samples" / "step-000001.png")
    for name, text in marks.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(text)
    assert paths(read(tmp_path)) == [str(tmp_path / "1.png")]
    assert "that training runs wrote, with 1 pictures" in caplog.text


@pytest.mark.parametrize("name", ["out", "."])
def test_the_output_folder_of_a_first_run_is_not_read(tmp_path, name):
    draw(tmp_path / "1.png")
    draw(tmp_path / name / "samples" / "step-000001.png")
    assert len(read(tmp_path)) == 2
    assert len(read(tmp_path, output_dir=tmp_path / name)) == 1


GOOD = {"file_name": "1.png", "text": "one"}
# A line of metadata.jsonl, and what the warning says of it.
DAMAGED = [
    ("{", "row 2 is no JSON"),
    ('{"file_name": "2.png", "text": "cut', "row 2 is no JSON"),
    ("not json", "row 2 is no JSON"),
    ("\x00", "row 2 is no JSON"),
    ("[" * 100_000, "row 2 is no JSON"),
    ("[1, 2]", "row 2 is no JSON object but [1, 2]"),
    ('"2.png"', "row 2 is no JSON object but '2.png'"),
    ("null", "row 2 is no JSON object but None"),
    ("7", "row 2 is no JSON object but 7"),
    ("{}", "row 2 has no file_name"),
    ('{"text": "two"}', "row 2 has no file_name"),
    ('{"file_name": null}', "row 2 has no file_name"),
    ('{"file_name": ""}', "row 2 has no file_name"),
    ('{"file_name": 2}', "row 2 has file_name=2"),
    ('{"file_name": ["2.png"]}', "row 2 has file_name=['2.png']"),
    ('{"file_name": "gone.png"}', "row 2 names 'gone.png', which is no regular file there"),
    ('{"file_name": "sub"}', "row 2 names 'sub', which is no regular file there"),
    ('{"file_name": "pipe.png"}', "row 2 names 'pipe.png', which is no regular file there"),
    ('{"file_name": "2\\u0000.png"}', "which is no regular file there"),
    (json.dumps({"file_name": "x" * 5000}), "which is no regular file there"),
    ('{"file_name": "../outside.png"}', "row 2 names '../outside.png', which is outside"),
    ('{"file_name": "sub/../../outside.png"}', "which is outside"),
    ('{"file_name": "/etc/passwd"}', "row 2 names '/etc/passwd', which is outside"),
    ('{"file_name": "2.png", "text": "\\ud800"}', "row 2 has text that is not UTF-8"),
    (b'{"file_name": "2.png", "text": "caf\xe9"}', "row 2 has text that is not UTF-8"),
]


@pytest.mark.parametrize(("line", "message"), DAMAGED)
def test_damaged_rows_are_named_and_left_out(tmp_path, caplog, line, message):
    folder = tmp_path / "pictures"
    draw(folder / "1.png")
    draw(folder / "2.png")
    draw(folder / "sub" / "3.png")
    draw(tmp_path / "outside.png")
    os.mkfifo(folder / "pipe.png")
    line = line if isinstance(line, bytes) else line.encode()
    (folder / "metadata.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    assert paths(read(folder)) == [str(folder / "1.png")]
    assert "left out 1 rows: " in caplog.text and message in caplog.text
    assert "left out 2 of 3 pictures" in caplog.text and "2.png, sub/3.png" in caplog.text
    (folder / "metadata.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match="none of the rows"):
        read(folder)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_metadata_in_all_spellings(tmp_path, suffix, end, encoding):
    draw(tmp_path / "a" / "café.png")
    draw(tmp_path / "a" / "2.png")
    rows = [["café.png", "été"], ["2.png", "deux"], ["2.png", "zwei"]]
    lines = [json.dumps({"file_name": n, "text": t}, ensure_ascii=False) for n, t in rows]
    if suffix == "csv":
        lines = ["file_name,text", *(f"{name},{text}" for name, text in rows)]
    (tmp_path / "a" / f"metadata.{suffix}").write_bytes((end.join(lines) + end).encode(encoding))
    dataset = read(tmp_path, columns=["text"])
    assert list(dataset["text"]) == ["été", "deux", "zwei"]
    assert [os.path.basename(path) for path in paths(dataset)] == ["café.png", "2.png", "2.png"]


def test_file_names_written_in_other_ways_are_found(tmp_path):
    draw(tmp_path / "sub" / unicodedata.normalize("NFD", "é.png"))
    draw(tmp_path / "sub" / "1.png")
    rows = [{"file_name": "sub/é.png"}, {"file_name": "sub\\1.png"}, {"file_name": "./sub//1.png"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(read(tmp_path)) == 3


def test_mixed_columns_are_refused_where_they_are_needed(tmp_path, caplog):
    for index in range(2):
        draw(tmp_path / f"{index}.png")
    rows = [{"file_name": "0.png", "text": "a", "n": 1}, {"file_name": "1.png", "text": ["b", "c"], "n": "x"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = read(tmp_path, columns=["text"])
    assert list(dataset["text"]) == [["a"], ["b", "c"]] and "n" not in dataset.column_names
    assert "column 'n' has values of several types" in caplog.text
    with pytest.raises(ValueError, match=r"column 'n' has .* int \(first in row 0\), str \(first in row 1\)"):
        read(tmp_path, columns=["n"])


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there are no pictures"):
        read(tmp_path)
    (tmp_path / "photos.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"unpack photos\.zip"):
        read(tmp_path)
    for suffix in ("csv", "jsonl"):
        (tmp_path / f"metadata.{suffix}").write_text("")
    with pytest.raises(ValueError, match="keep one of them"):
        read(tmp_path)


def test_a_text_of_metadata_may_be_long(picture_folder):
    text = "a long one, with commas, " * 10_000
    (picture_folder / "metadata.jsonl").unlink(missing_ok=True)
    names = sorted(path.name for path in picture_folder.iterdir() if path.suffix == ".png")
    (picture_folder / "metadata.csv").write_text(f'file_name,text\n{names[0]},"{text}"\n{names[1]},short\n')
    dataset = load_training_dataset(train_data_dir=str(picture_folder), image_column="image", columns=["text"])
    assert dataset["text"] == [text, "short"]
