"""Folders of recordings as tables."""

from diffusers_vqdit.training.audio_data import SoundDataset
from diffusers_vqdit.training.data import load_splits
from diffusers_vqdit.training.sound_folder import holds_sounds


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
