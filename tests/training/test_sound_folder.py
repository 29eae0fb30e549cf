"""Folders of recordings as tables."""

import os
from collections import Counter

from diffusers_vqdit.training.audio_data import SoundDataset
from diffusers_vqdit.training.data import load_splits
from diffusers_vqdit.training.sound_folder import holds_sounds, list_sound_files


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
    assert holds_sounds(tmp_path / "files")
    (tmp_path / "files" / "data.parquet").write_bytes(b"")
    assert not holds_sounds(tmp_path / "files")
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
    assert load_splits(dataset_name=str(tmp_path / "classes"))["train"]["label"] == ["high", "low"]
    audio_codecs.sound_folder(tmp_path / "classes", count=1)  # not of one depth
    assert load_splits(dataset_name=str(tmp_path / "classes"))["train"].column_names == ["audio"]


def test_each_folder_is_read_once(tmp_path, monkeypatch):
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
    sounds, metadata = list_sound_files(tmp_path / "files", tmp_path / "cache")
    assert read == dict.fromkeys(map(str, places), 1)
    assert list(sounds) == sorted(str(place / name) for place in places for name in ("1.FLAC", "2.wav"))
    assert metadata == sorted(place / "metadata.csv" for place in places)
