"""Columns of sounds: to folders of codes, and to parts in memory for training an audio tokenizer."""

import io

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset, load_dataset

from diffusers_vqdit.pipelines.audio_codecs import encode_waveform
from diffusers_vqdit.pipelines.segment_base import SegmentColumn
from diffusers_vqdit.training.audio_data import crop_sounds, decode_sounds
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.data import load_splits
from diffusers_vqdit.training.encoding import encode_dataset
from diffusers_vqdit.training.sound_folder import holds_sounds


@pytest.fixture
def table(audio_codecs, tmp_path):
    def table(**options):
        path = audio_codecs.sound_table(tmp_path / "sounds.parquet", **options)
        return load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))

    return table


def encode(dataset, folder, codec, extractor, **options):
    columns = {
        "sound": SegmentColumn("audio", "audio", codec, extractor, options=options),
        "kind": SegmentColumn("label", "label"),
    }
    return CodeDataset(encode_dataset(dataset, folder, segments=columns, shard_size=3))


@pytest.mark.parametrize("kind", ["dac", "encodec", "mimi", "spectrogram"])
def test_codes_are_the_codecs_and_then_the_end(audio_codecs, table, tmp_path, kind):
    codec, extractor = audio_codecs.audio_codec(kind)
    codes = encode(table(), tmp_path / "codes", codec, extractor)
    shape = {"vocab_size": 17, "shape": [19, 3], "patch": [1, 3], "separate_codebooks": True}
    assert codes.segments["sound"] == shape
    assert codes.entries["sound"] == {"modality": "audio", "tokenizer": "sound"}
    for row in range(8):
        waveform = audio_codecs.tone(0.05 + 0.02 * row, 100 + 40 * (row % 4))
        expected = encode_waveform(codec, extractor, waveform, torch.device("cpu"))
        size = -(-len(waveform) // 16)
        assert len(expected) == size and (codes.codes["sound"][row, size:] == 16).all()
        # The file has 16 bits, and a code may lie at the border of two.
        assert (codes.codes["sound"][row, :size] != expected).float().mean() < 0.1
    fewer = encode(table(), tmp_path / "fewer", codec, extractor, audio_codebooks=2)
    assert fewer.segments["sound"]["shape"] == [19, 2]
    assert fewer.codes["sound"].equal(codes.codes["sound"][..., :2])
    with pytest.raises(ValueError, match="audio_codebooks=4, but the codec makes 3"):
        encode(table(), tmp_path / "more", codec, extractor, audio_codebooks=4)


def test_long_sounds_are_cut_and_counted(audio_codecs, table, tmp_path, caplog):
    codec, extractor = audio_codecs.audio_codec("encodec")
    whole = encode(table(), tmp_path / "whole", codec, extractor)
    assert "are cut" not in caplog.text
    codes = encode(table(), tmp_path / "codes", codec, extractor, max_audio_length=0.1)
    assert "column 'audio': 5 of 8 sounds are cut to 0.1 s" in caplog.text
    assert codes.segments["sound"]["shape"] == [10, 3]
    assert codes.codes["sound"].equal(whole.codes["sound"][:, :10]) and (codes.codes["sound"][-1] < 16).all()
    for value in (0, -1.0, float("nan"), "1"):
        with pytest.raises(ValueError, match="max_audio_length="):
            encode(table(), tmp_path / "bad", codec, extractor, max_audio_length=value)


def test_broken_sounds_are_left_out(audio_codecs, table, tmp_path, caplog):
    codec, extractor = audio_codecs.audio_codec("encodec")
    codes = encode(table(broken=(2, 5)), tmp_path / "codes", codec, extractor)
    assert len(codes) == 6 and "skipped 2 of 8 sounds that could not be read" in caplog.text
    assert "skipped sound in row 2: ValueError: no sound that can be read" in caplog.text
    whole = encode(table(), tmp_path / "whole", codec, extractor)
    assert codes.codes["sound"].equal(whole.codes["sound"][[0, 1, 3, 4, 6, 7]])
    assert codes.fingerprints["data"] != whole.fingerprints["data"]
    with pytest.raises(ValueError, match="none of the 8 sounds could be read"):
        encode(table(broken=range(8)), tmp_path / "none", codec, extractor)


def test_paths_and_bytes_are_the_same_sounds(audio_codecs, table, tmp_path):
    codec, extractor = audio_codecs.audio_codec("dac")
    folder = audio_codecs.sound_folder(tmp_path / "files", count=8)
    rows = table()
    paths = [str(folder / f"{index}.flac") for index in range(8)]
    for column in (paths, [{"path": path, "bytes": None} for path in paths]):
        dataset = Dataset.from_dict({"audio": column, "label": rows["label"]})
        codes = encode(dataset, tmp_path / "codes", codec, extractor)
        whole = encode(rows, tmp_path / "whole", codec, extractor)
        assert codes.codes["sound"].equal(whole.codes["sound"])
    with pytest.raises(ValueError, match="column 'label' of .* can't be one of Audio|none of the 8"):
        encode_dataset(rows, tmp_path / "x", segments={"sound": SegmentColumn("audio", "label", codec, extractor)})


def test_sounds_are_decoded_once_and_cut_at_random(table):
    sounds = decode_sounds(table(broken=(1,)), "audio", 800)
    assert len(sounds) == 7 and all(one.dtype == torch.int16 for one in sounds)
    assert [len(one) for one in sounds] == [40 + 16 * row for row in (0, 2, 3, 4, 5, 6, 7)]
    rows = torch.tensor([6, 0, 6, 3])
    parts = crop_sounds(sounds, rows, 64, seed=1, step=5)
    assert parts.shape == (4, 64) and parts.abs().max() <= 1 and (parts[1, 40:] == 0).all()
    assert not parts[0].equal(parts[2])
    for row, part in zip(rows.tolist(), parts, strict=True):
        whole = sounds[row].float() / 32767
        places = whole.unfold(0, min(64, len(whole)), 1)
        assert (places == part[: len(whole)]).all(1).any()
    # By seed, step and row alone, on however many processes.
    assert crop_sounds(sounds, rows, 64, seed=1, step=5).equal(parts)
    assert crop_sounds(sounds, rows[2:], 64, seed=1, step=5, rank=1).equal(parts[2:])
    assert not crop_sounds(sounds, rows, 64, seed=1, step=6).equal(parts)


def test_a_column_of_something_else_is_refused():
    with pytest.raises(ValueError, match="column 'audio' of .* can't be one of sounds"):
        decode_sounds(Dataset.from_dict({"audio": [1.5, 2.5]}), "audio", 800)
    with pytest.raises(ValueError, match="none of the 2 sounds could be read"):
        decode_sounds(Dataset.from_dict({"audio": ["no.wav", "path.wav"]}), "audio", 800)


def test_a_decoded_column_needs_no_decoder(tmp_path):
    """Nor does a file of another rate, which is resampled."""
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(400) / 10), 1600, format="WAV")
    dataset = Dataset.from_dict({"audio": [{"bytes": file.getvalue(), "path": None}]})
    (sound,) = decode_sounds(dataset.cast_column("audio", Audio(decode=False)), "audio", 800)
    assert len(sound) == 200


def test_a_folder_of_recordings_is_a_table(audio_codecs, tmp_path, caplog):
    audio_codecs.sound_folder(tmp_path / "files", count=4)
    splits = load_splits(dataset_name=str(tmp_path / "files"))
    assert list(splits) == ["train"] and splits["train"].column_names == ["audio"]
    assert len(decode_sounds(splits["train"], "audio", 1600)) == 4
    lines = ["file_name,text", "2.flac,two", "0.flac,zero", "9.flac,gone", "../files/1.flac,one"]
    (tmp_path / "files" / "metadata.csv").write_text("\n".join(lines))
    for source in ({"dataset_name": str(tmp_path / "files")}, {"train_data_dir": str(tmp_path / "files")}):
        (table,) = load_splits(**source).values()
        assert table["text"] == ["two", "zero", "one"]
        assert [len(one) for one in decode_sounds(table, "audio", 1600)] == [144, 80, 112]
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
