"""Columns of sounds to folders of codes."""

import pytest
import torch
from datasets import Audio, Dataset

from diffusers_vqdit.pipelines.audio_codecs import encode_waveform
from diffusers_vqdit.pipelines.segment_base import SegmentColumn
from diffusers_vqdit.training.codes import CodeDataset
from diffusers_vqdit.training.encoding import encode_dataset


def encode(dataset, folder, codec, extractor, **options):
    columns = {
        "sound": SegmentColumn("audio", "audio", codec, extractor, options=options),
        "kind": SegmentColumn("label", "label"),
    }
    return CodeDataset(encode_dataset(dataset, folder, segments=columns, shard_size=3))


@pytest.mark.parametrize("kind", ["dac", "encodec", "mimi", "spectrogram"])
def test_codes_are_the_codecs_and_then_the_end(audio_codecs, sound_table, tmp_path, kind):
    codec, extractor = audio_codecs.audio_codec(kind)
    codes = encode(sound_table(), tmp_path / "codes", codec, extractor)
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
    fewer = encode(sound_table(), tmp_path / "fewer", codec, extractor, audio_codebooks=2)
    assert fewer.segments["sound"]["shape"] == [19, 2]
    assert fewer.codes["sound"].equal(codes.codes["sound"][..., :2])
    with pytest.raises(ValueError, match="audio_codebooks=4, but the codec makes 3"):
        encode(sound_table(), tmp_path / "more", codec, extractor, audio_codebooks=4)


@pytest.mark.parametrize("frames", [None, 20, 12])
def test_columns_of_one_codec_share_their_embeddings(audio_codecs, sound_table, tmp_path, frames):
    """They have the longest's length, but where a pretrained model has set one."""
    codec, extractor = audio_codecs.audio_codec("encodec")
    rows = sound_table().cast_column("audio", Audio(decode=False))
    rows = rows.add_column("short", [rows[0]["audio"]] * 8, feature=rows.features["audio"])
    options = {} if frames is None else {"frames": frames}
    columns = {
        "answer": SegmentColumn("audio", "short"),  # the codec is the other's
        "sound": SegmentColumn("audio", "audio", codec, extractor, options=options),
    }
    codes = CodeDataset(encode_dataset(rows, tmp_path / "codes", segments=columns))
    assert [codes.segments[name]["shape"] for name in columns] == [[frames or 19, 3]] * 2
    assert codes.segments["sound"]["shared_with"] == "answer" and codes.entries["answer"]["tokenizer"] == "answer"
    assert codes.codes["answer"].equal(codes.codes["sound"][:1].expand(8, -1, -1))
    known = SegmentColumn("audio", "short", codec, extractor, options={"frames": 4})
    fewer = {"answer": SegmentColumn("audio", "audio"), "sound": known}
    codes = CodeDataset(encode_dataset(rows, tmp_path / "fewer", segments=fewer))
    assert [codes.segments[name]["shape"] for name in fewer] == [[4, 3]] * 2
    other = {**columns, "more": SegmentColumn("audio", "audio", audio_codecs.audio_codec("dac")[0], extractor)}
    with pytest.raises(ValueError, match=r"segments\['answer'\] needs a tokenizer that makes codes of its sounds"):
        encode_dataset(rows, tmp_path / "other", segments=other)


def test_long_sounds_are_cut_and_counted(audio_codecs, sound_table, tmp_path, caplog):
    codec, extractor = audio_codecs.audio_codec("encodec")
    whole = encode(sound_table(), tmp_path / "whole", codec, extractor)
    assert "are cut" not in caplog.text
    codes = encode(sound_table(), tmp_path / "codes", codec, extractor, max_audio_length=0.1)
    assert "column 'audio': 5 of 8 sounds are cut to 0.1 s" in caplog.text
    assert codes.segments["sound"]["shape"] == [10, 3]
    assert codes.codes["sound"].equal(whole.codes["sound"][:, :10]) and (codes.codes["sound"][-1] < 16).all()
    for value in (0, -1.0, float("nan"), "1"):
        with pytest.raises(ValueError, match="max_audio_length="):
            encode(sound_table(), tmp_path / "bad", codec, extractor, max_audio_length=value)


def test_broken_sounds_are_left_out(audio_codecs, sound_table, tmp_path, caplog):
    codec, extractor = audio_codecs.audio_codec("encodec")
    codes = encode(sound_table(broken=(2, 5)), tmp_path / "codes", codec, extractor)
    assert len(codes) == 6 and "skipped 2 of 8 sounds that could not be read" in caplog.text
    assert "skipped sound in row 2: ValueError: no sound that can be read" in caplog.text
    whole = encode(sound_table(), tmp_path / "whole", codec, extractor)
    assert codes.codes["sound"].equal(whole.codes["sound"][[0, 1, 3, 4, 6, 7]])
    assert codes.fingerprints["data"] != whole.fingerprints["data"]
    with pytest.raises(ValueError, match="none of the 8 sounds could be read"):
        encode(sound_table(broken=range(8)), tmp_path / "none", codec, extractor)


def test_paths_and_bytes_are_the_same_sounds(audio_codecs, sound_table, tmp_path):
    codec, extractor = audio_codecs.audio_codec("dac")
    folder = audio_codecs.sound_folder(tmp_path / "files", count=8)
    rows = sound_table()
    paths = [str(folder / f"{index}.flac") for index in range(8)]
    for column in (paths, [{"path": path, "bytes": None} for path in paths]):
        dataset = Dataset.from_dict({"audio": column, "label": rows["label"]})
        codes = encode(dataset, tmp_path / "codes", codec, extractor)
        whole = encode(rows, tmp_path / "whole", codec, extractor)
        assert codes.codes["sound"].equal(whole.codes["sound"])
    with pytest.raises(ValueError, match="column 'label': none of the 8 sounds could be read"):
        encode_dataset(rows, tmp_path / "x", segments={"sound": SegmentColumn("audio", "label", codec, extractor)})
