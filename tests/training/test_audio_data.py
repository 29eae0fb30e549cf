"""Sounds for training an audio tokenizer: kept or decoded when needed, the same parts by seed and step."""

import io

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset
from safetensors.torch import load_file

from diffusers_vqdit.training import audio_data
from diffusers_vqdit.training.audio_data import SoundDataset, crop_sounds, load_crops
from diffusers_vqdit.utils import sounds as reading


@pytest.fixture
def nothing_is_kept(monkeypatch):
    monkeypatch.setattr(audio_data, "CACHED_BYTES", 0)


def test_sounds_are_decoded_once_and_cut_at_random(sound_table):
    sounds = SoundDataset(sound_table(broken=(1,)), "audio", 800)
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
        SoundDataset(Dataset.from_dict({"audio": [1.5, 2.5]}), "audio", 800)
    with pytest.raises(ValueError, match="none of the 2 sounds could be read"):
        SoundDataset(Dataset.from_dict({"audio": ["no.wav", "path.wav"]}), "audio", 800)


def test_a_decoded_column_needs_no_decoder(tmp_path):
    """Nor does a file of another rate, which is resampled."""
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(400) / 10), 1600, format="WAV")
    dataset = Dataset.from_dict({"audio": [{"bytes": file.getvalue(), "path": None}]})
    (sound,) = SoundDataset(dataset.cast_column("audio", Audio(decode=False)), "audio", 800)
    assert len(sound) == 200


def test_parts_are_the_same_whether_sounds_are_kept_or_not(sound_table, monkeypatch, caplog):
    data = sound_table(broken=(1, 5))
    whole = sound_table()
    kept = SoundDataset(whole, "audio", 800)
    monkeypatch.setattr(audio_data, "CACHED_BYTES", 2 * sum(map(len, kept.sounds)) - 2)  # of which one sample is over
    lazy, rows = SoundDataset(whole, "audio", 800), torch.arange(8)
    assert kept.sounds is not None and lazy.sounds is None and len(lazy) == 8
    for step in range(5):
        expected = crop_sounds(kept, rows, 64, seed=1, step=step)
        assert crop_sounds(lazy, rows, 64, seed=1, step=step).equal(expected)
    assert all(lazy[row].equal(kept[row]) for row in range(8))
    monkeypatch.setattr(audio_data, "CACHED_BYTES", 0)
    broken = SoundDataset(data, "audio", 800)
    caplog.clear()
    for _ in range(2):
        parts = crop_sounds(broken, rows, 64, seed=1, step=0)
    stand_in = torch.tensor([0, 2, 2, 3, 4, 6, 6, 7])  # the next one, from the same share of it
    assert parts.equal(crop_sounds(kept, stand_in, 64, seed=1, step=0))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and told[0].startswith("skipped sound in row 1: ValueError: no sound that can be read")
    monkeypatch.setattr(audio_data, "CACHED_BYTES", 2 * sum(map(len, kept.sounds)))
    assert SoundDataset(whole, "audio", 800).sounds is not None


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_that_read_ahead_give_the_same_parts(sound_table, monkeypatch, kept, workers):
    if not kept:
        monkeypatch.setattr(audio_data, "CACHED_BYTES", 0)
    sounds = SoundDataset(sound_table(broken=() if kept else (5,)), "audio", 800)
    batches = [torch.tensor([5, 0, 3]), torch.tensor([7, 1, 2]), torch.tensor([4, 6, 6])]
    state = torch.get_rng_state()
    found = load_crops(sounds, iter(batches), 64, seed=1, step=7, rank=1, num_workers=workers)
    for number, (parts, rows) in enumerate(zip(found, batches, strict=True)):
        assert parts.equal(crop_sounds(sounds, rows, 64, seed=1, step=7 + number, rank=1))
    assert torch.get_rng_state().equal(state)


def test_no_more_is_decoded_than_a_part(nothing_is_kept, monkeypatch, tmp_path):
    """Of a long recording at another rate: nearly what the whole of it, resampled, has there."""
    path, length = tmp_path / "long.flac", 500
    noise = np.random.default_rng(0).standard_normal(200_000).clip(-2, 2) / 4
    soundfile.write(path, np.convolve(noise, np.ones(8) / 8, "same"), 16000)
    whole = reading.read_sound(str(path), 11025)
    decoded = []
    original = reading.read_sound
    monkeypatch.setattr(
        reading, "read_sound", lambda value, rate: decoded.append(value["array"].shape[-1]) or original(value, rate)
    )
    for share in (0, 0.123, 0.5, 0.999999):
        part = reading.read_part({"path": str(path), "bytes": None}, 11025, share, length)
        start = int(share * (len(whole) - length + 1))
        assert len(part) == length
        assert min(np.abs(part - whole[s : s + length]).max() for s in (start - 1, start) if s >= 0) < 1e-4
    assert len(decoded) == 4 and max(decoded) < 10_000


@pytest.mark.parametrize("rate", [8000, 4000])
def test_of_a_file_that_is_shorter_than_its_header_says_what_is_there_is_read(rate):
    data = io.BytesIO()
    soundfile.write(data, np.sin(np.arange(40_000) / 10), 8000, format="MP3")
    cut = {"bytes": data.getvalue()[: len(data.getvalue()) // 2]}
    whole = reading.read_sound(cut, rate)
    assert len(whole) < 0.6 * reading.sound_seconds(cut) * rate
    for share in (0.7, 0.99):
        start = int(share * (len(whole) - 500 + 1))
        assert np.array_equal(reading.read_part(cut, rate, share, 500), whole[start : start + 500])


def test_the_identity_reads_no_sound(nothing_is_kept, sound_table, monkeypatch):
    lazy, rows = SoundDataset(sound_table(), "audio", 800), sound_table().to_list()
    for name in ("read_sound", "read_part", "sound_seconds"):
        monkeypatch.setattr(audio_data, name, None)
    found = lazy.identity()
    for change in (rows[:7], [*rows[1:], rows[0]], [*rows[:7], {**rows[7], "audio": {"bytes": b"x", "path": None}}]):
        lazy.column = Dataset.from_list(change).select_columns("audio")
        assert lazy.identity() != found
    lazy.column = Dataset.from_list(rows).select_columns("audio")
    assert lazy.identity() == found and set(found) == {"sounds"}


def test_data_of_which_nothing_can_be_read_are_refused(nothing_is_kept, sound_table):
    with pytest.raises(ValueError, match="column 'audio': none of the 8 sounds could be read"):
        SoundDataset(sound_table(broken=range(8)), "audio", 800)
    lazy = SoundDataset(sound_table(), "audio", 800)
    lazy.column = sound_table(broken=range(8)).select_columns("audio")
    with pytest.raises(ValueError, match="column 'audio': none of 8 sounds from row 3 on could be read"):
        lazy[3]


def test_a_run_over_sounds_that_are_not_kept_is_the_same_and_resumes(run, audio_codecs, tmp_path, monkeypatch):
    path = audio_codecs.sound_table(tmp_path / "sounds.parquet")
    arguments = (
        f"--dataset_name {path} --cache_dir {tmp_path / 'cache'} --validation_split none --sampling_rate 800 "
        "--n_fft 64 --hop_length 16 --num_mel_bins 16 --min_frequency 0 --block_out_channels 8 8 --norm_num_groups 4 "
        "--latent_channels 4 --num_vq_embeddings 16 --crop_length 0.1 --train_batch_size 3 --lr_scheduler constant "
        "--report_to none --checkpointing_steps 2"
    )
    run("train_audio_vq", f"{arguments} --max_train_steps 4 --output_dir {tmp_path / 'kept'}")
    monkeypatch.setattr(audio_data, "CACHED_BYTES", 0)
    run("train_audio_vq", f"{arguments} --max_train_steps 2 --output_dir {tmp_path / 'lazy'}")
    more = f"--max_train_steps 4 --resume_from_checkpoint latest --output_dir {tmp_path / 'lazy'}"
    run("train_audio_vq", f"{arguments} {more}")
    kept, lazy = (load_file(tmp_path / n / "diffusion_pytorch_model.safetensors") for n in ("kept", "lazy"))
    assert all(torch.equal(value, lazy[name]) for name, value in kept.items())


def test_of_many_broken_sounds_all_are_counted(audio_codecs, tmp_path, caplog):
    table = audio_codecs.sound_table(tmp_path / "sounds.parquet", count=30, broken=range(25))
    dataset = Dataset.from_parquet(str(table), cache_dir=str(tmp_path / "cache"))
    assert len(SoundDataset(dataset, "audio", 1600)) == 5
    assert caplog.text.count("skipped sound in row") == 20
    assert "skipped 25 of 30 sounds that could not be read" in caplog.text
