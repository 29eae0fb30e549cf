"""Sounds in all the forms that they are passed in, and WAV files that say that they were generated."""

import io

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusers_vqdit.utils.provenance import COMPOSITE, GENERATED, digital_source_type, save_generated
from diffusers_vqdit.utils.sounds import read_part, read_sound, read_sounds, sound_bytes, sound_seconds


RATE = 800


def wave(count, seed=0):
    """(count,) float32 of 16-bit values, so that files lose nothing."""
    return np.random.default_rng(seed).integers(-32768, 32767, count).astype(np.float32) / 32768


def file_of(waveform, rate=RATE, kind="WAV"):
    out = io.BytesIO()
    soundfile.write(out, waveform, rate, format=kind, subtype="PCM_16")
    return out.getvalue()


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 60), seed=st.integers(0, 9))
def test_every_form_of_a_sound_is_the_same_waveform(count, seed):
    expected = wave(count, seed)

    class Decoder:  # torchcodec's, as far as it is used
        def get_all_samples(self):
            return type("Samples", (), {"data": torch.from_numpy(expected)[None], "sample_rate": RATE})

    forms = [
        expected,
        torch.from_numpy(expected),
        expected[None],
        np.stack([expected, expected]),
        (expected * 32768).astype(np.int16),
        (expected.astype(np.float64) * 2**31).astype(np.int32),
        {"array": expected.astype(np.float64), "sampling_rate": RATE, "path": None},
        {"array": expected.tolist(), "sampling_rate": RATE},
        {"bytes": file_of(expected), "path": "gone.wav"},
        {"bytes": file_of(expected, kind="FLAC"), "path": None},
        {"bytes": file_of(np.stack([expected, expected], 1)), "path": None},
        Decoder(),
    ]
    for form in forms:
        found = read_sound(form, RATE)
        assert found.dtype == np.float32 and found.shape == (count,) and np.allclose(found, expected, atol=1e-6)
    assert len(read_sounds(np.stack([expected[None]] * 3), RATE)) == len(read_sounds([*forms[:3]], RATE)) == 3


@settings(max_examples=20, deadline=None)
@given(rate=st.integers(400, 3200), seconds=st.floats(0.05, 0.4))
def test_a_sound_lasts_as_long_at_any_rate(rate, seconds):
    time = np.arange(int(seconds * rate)) / rate
    found = read_sound({"array": np.sin(2 * np.pi * 20 * time), "sampling_rate": rate}, RATE)
    assert abs(len(found) / RATE - len(time) / rate) <= 1 / RATE
    same = np.sin(2 * np.pi * 20 * np.arange(len(found)) / RATE)
    middle = slice(len(found) // 4, -len(found) // 4)
    assert np.abs(found[middle] - same[middle]).max() < 0.05


def test_a_file_is_read_by_its_path(tmp_path):
    path = tmp_path / "a.flac"
    path.write_bytes(file_of(wave(400), kind="FLAC"))
    for form in (path, str(path), {"path": str(path)}, {"path": str(path), "bytes": None}):
        assert np.array_equal(read_sound(form, RATE), wave(400))
        assert sound_bytes(form) == path.read_bytes() and sound_seconds(form) == 0.5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((2, 3, 4, 5)), "must be .T,. or .channels, T."),
        (np.zeros((200, 3)), "at most 32 channels"),
        (np.zeros(5, dtype=bool), "got bool"),
        (np.zeros(5, dtype=np.uint8), "got uint8"),
        ("nowhere.wav", "'nowhere.wav' must be a sound"),
        (".", "must be a sound"),
        ({"path": None, "bytes": None}, "must be a sound"),
        ({"bytes": b"no sound"}, "no sound that can be read"),
        ({"array": [0.1], "sampling_rate": None}, "sampling_rate=None must be an integer"),
        ({"array": [0.1], "sampling_rate": 0}, "sampling_rate=0 must be an integer"),
        (np.array([]), "must have samples"),
        (np.array([0.0, np.nan]), "must be finite"),
        (np.array([30000.0]), "about in .-1, 1., got up to 30000"),
        (None, "must be .T,."),
        ([[0.1, "x"]], "must be .T,."),
    ],
)
def test_what_is_no_sound_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        read_sounds(value, RATE)


@pytest.mark.parametrize("name", ["a.raw", "A.RAW"])
@pytest.mark.parametrize("read", [lambda p: read_sounds(p, RATE), sound_seconds, lambda p: read_part(p, RATE, 0.5, 9)])
def test_a_sound_without_a_header_is_refused(tmp_path, read, name):
    (tmp_path / name).write_bytes(bytes(800))
    for form in (str(tmp_path / name), {"path": str(tmp_path / name), "bytes": None}):
        with pytest.raises(ValueError, match="has no header, which would say its rate"):
            read(form)


@pytest.mark.parametrize("composite", [False, True])
def test_a_generated_sound_says_so(tmp_path, composite):
    waveform, path = np.append(wave(100), [2.0, -2.0]), tmp_path / "a.wav"
    save_generated(
        torch.from_numpy(waveform),
        path,
        model_id="a/b & c",
        description="ein Lied – 歌",
        composite=composite,
        sampling_rate=RATE,
    )
    assert digital_source_type(path) == (COMPOSITE if composite else GENERATED)
    with soundfile.SoundFile(path) as file:
        assert (file.samplerate, file.channels, file.subtype) == (RATE, 1, "PCM_16")
        assert "a/b & c" in file.software and "synthetic" in file.comment and file.title == "ein Lied – 歌"
        assert np.abs(file.read() - waveform.clip(-1, 1)).max() < 1e-4
    soundfile.write(tmp_path / "plain.wav", waveform, RATE)
    assert digital_source_type(tmp_path / "plain.wav") is None


def test_sounds_and_pictures_have_formats_of_their_own(tmp_path):
    for image, name, rate, message in (
        (wave(10), "a.png", RATE, "must end in .wav"),
        (Image.new("RGB", (4, 4)), "a.wav", RATE, "must end in .png"),
        (wave(10), "a.wav", None, "sampling_rate=None must be an integer"),
        (wave(10)[None], "a.wav", RATE, "must have shape .T,."),
    ):
        with pytest.raises(ValueError, match=message):
            save_generated(image, tmp_path / name, model_id="m", sampling_rate=rate)
    assert not list(tmp_path.iterdir())
