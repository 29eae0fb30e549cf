"""Folders of recordings as tables."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from diffusers_vqdit.training.audio_data import SoundDataset
from diffusers_vqdit.training.data import load_splits, load_training_dataset
from diffusers_vqdit.training.folder_files import kind_of_folder, list_files
from diffusers_vqdit.training.image_folder import PICTURES
from diffusers_vqdit.training.sound_folder import SOUNDS


def test_a_folder_of_recordings_is_a_table(audio_codecs, tmp_path, caplog):
    audio_codecs.sound_folder(tmp_path / "files", count=4)
    splits = load_splits(dataset_name=str(tmp_path / "files"))
    assert list(splits) == ["train"] and splits["train"].column_names == ["audio"]
    assert len(SoundDataset(splits["train"], "audio", 1600)) == 4
    lines = ["file_name,text", "2.flac,two", "0.flac,zero", "9.flac,gone", "../files/1.flac,one"]
    (tmp_path / "files" / "metadata.csv").write_text("\n".join(lines))
    for source in ({"dataset_name": str(tmp_path / "files")}, {"train_data_dir": str(tmp_path / "files")}):
        (table,) = load_splits(**source).values()
        assert table["text"] == ["two", "zero", "one"]
        assert [len(one) for one in SoundDataset(table, "audio", 1600)] == [144, 80, 112]
    assert "row 4 names '9.flac', which is no regular file there" in caplog.text
    assert kind_of_folder(tmp_path / "files", (PICTURES, SOUNDS)) is SOUNDS
    (tmp_path / "files" / "data.parquet").write_bytes(b"")
    assert kind_of_folder(tmp_path / "files", (PICTURES, SOUNDS)) is None
    for name in ("train", "test"):
        audio_codecs.sound_folder(tmp_path / "splits" / name, count=2)
    assert {name: len(one) for name, one in load_splits(dataset_name=str(tmp_path / "splits")).items()} == {
        "train": 2,
        "test": 2,
    }


def test_class_folders_are_labels_as_those_of_pictures_are(audio_codecs, tmp_path):
    for split, name in (("train", "low"), ("train", "high"), ("test", "low"), ("test", "high")):
        audio_codecs.sound_folder(tmp_path / "both" / split / name, count=2)
        audio_codecs.sound_folder(tmp_path / "classes" / name, count=1)
    splits = load_splits(dataset_name=str(tmp_path / "both"))
    assert {name: one["label"] for name, one in splits.items()} == dict.fromkeys(splits, ["high"] * 2 + ["low"] * 2)
    table = load_splits(dataset_name=str(tmp_path / "classes"))["train"]
    assert table["label"] == ["high", "low"]
    assert [Path(value["path"]).parent.name for value in table["audio"]] == table["label"][:]
    audio_codecs.sound_folder(tmp_path / "classes", count=1)  # not of one depth
    assert load_splits(dataset_name=str(tmp_path / "classes"))["train"].column_names == ["audio"]


def test_each_folder_is_listed_once(tmp_path, monkeypatch):
    places = [tmp_path / "files", tmp_path / "files" / "b", tmp_path / "files" / "b" / "c"]
    hidden = tmp_path / "files" / ".hidden"
    for place in (*places, hidden):
        place.mkdir(parents=True)
        for name in ("2.wav", "1.FLAC", "notes.txt", ".3.wav", "metadata.csv"):
            (place / name).touch()
    real, read = os.scandir, Counter()

    def scandir(place):
        read[str(place)] += 1
        return real(place)

    monkeypatch.setattr(os, "scandir", scandir)
    sounds, metadata = list_files(tmp_path / "files", SOUNDS, cache_dir=tmp_path / "cache")
    assert read == dict.fromkeys(map(str, places), 2)  # once for its files, once to know folders that runs wrote
    assert list(sounds) == sorted(str(place / name) for place in places for name in ("1.FLAC", "2.wav"))
    assert metadata == sorted(place / "metadata.csv" for place in places)


def test_a_run_may_write_into_its_data(audio_codecs, tmp_path, caplog):
    """What it wrote is no data, and the folder is one of recordings still."""
    folder, out = tmp_path / "files", tmp_path / "files" / "out"
    for name in ("low", "high"):
        audio_codecs.sound_folder(folder / name, count=2)
    audio_codecs.sound_folder(out / "samples", count=3)
    (folder / ".vscode").mkdir()
    (folder / ".vscode/settings.json").write_text("{}")
    for name in ("segments.json", *(f"checkpoint-{step}/state.json" for step in range(9))):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
    for source in ({"dataset_name": str(folder)}, {"train_data_dir": str(folder)}):
        table = load_splits(**source, output_dir=out)["train"]
        assert table["label"] == ["high", "high", "low", "low"]
    assert "left out 1 folders" in caplog.text and "training runs wrote, with 3 sounds" in caplog.text


def test_what_is_left_out_is_told_as_of_pictures(audio_codecs, tmp_path, caplog):
    folder = audio_codecs.sound_folder(tmp_path / "files", count=3)
    (folder / "0.flac").rename(folder / "0.xyz")
    (folder / "metadata.csv").write_text("file_name,text\n1.flac,one\n")
    assert load_splits(dataset_name=str(folder))["train"]["text"] == ["one"]
    assert "left out 1 of 2 sounds" in caplog.text and "that no metadata row names: 2.flac" in caplog.text
    assert "don't end as sounds' names do: " in caplog.text and "0.xyz" in caplog.text
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "1.flac", "text": "one"}))
    with pytest.raises(ValueError, match="has both metadata.csv and metadata.jsonl; keep one of them"):
        load_splits(dataset_name=str(folder))


@pytest.mark.parametrize(
    ("pictures", "named", "asked", "column"),
    [
        (1, "", "", "audio"),
        (4, "", "", "image"),
        (3, "", "", "image"),
        (4, "0.flac", "", "audio"),
        (1, "0.png", "", "image"),
        (1, "", "image", "image"),
        (4, "", "audio", "audio"),
        (1, "0.flac", "image", None),
    ],
)
def test_a_folder_with_both_is_of_what_is_asked_for_or_its_metadata_name_or_of_the_more(
    audio_codecs, tmp_path, pictures, named, asked, column
):
    folder = audio_codecs.sound_folder(tmp_path / "files", count=3)
    for number in range(pictures):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
    if named:
        (folder / "metadata.csv").write_text(f"file_name,text\n{named},one\n")
    audio_codecs.sound_folder(folder / "clips", count=1)
    (folder / "clips/metadata.csv").write_text("file_name,text\n0.flac,one\n" if named else "file_name,text\n")
    if not named:
        (folder / "clips/metadata.csv").unlink()
        (folder / "clips/0.flac").unlink()
    splits = load_splits(dataset_name=str(folder), columns=[asked] * bool(asked))
    assert splits["train"].column_names[0] == (column or "image")


def test_recordings_may_lie_behind_links(audio_codecs, tmp_path):
    audio_codecs.sound_folder(tmp_path / "elsewhere", count=2)
    (tmp_path / "files").mkdir()
    (tmp_path / "files/train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "files/again").symlink_to(tmp_path / "files")  # without an end
    assert len(load_splits(dataset_name=str(tmp_path / "files"))["train"]) == 2


@pytest.mark.parametrize("name", ["clips/0.flac", ".\\clips\\0.flac"])
def test_paths_in_tables_are_relative_to_the_table(audio_codecs, tmp_path, monkeypatch, name):
    audio_codecs.sound_folder(tmp_path / "clips", count=1)
    (tmp_path / "data.jsonl").write_text(json.dumps({"audio": name}))
    monkeypatch.chdir("/")
    table = load_training_dataset(dataset_name=str(tmp_path / "data.jsonl"), audio_column="audio")
    assert len(SoundDataset(table, "audio", 1600)) == 1
