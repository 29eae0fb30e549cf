"""Sounds as they are passed or stored, to waveforms."""

import io
import math
import mimetypes
import os
from importlib import import_module
from typing import Any

import numpy as np
import torch

from .checks import check_integer, shown


MAX_SAMPLING_RATE = 2**20  # Hz
MAX_CHANNELS = 32
MAX_LEVEL = 4.0  # of floats, whose full scale is 1: more are integers' values


def audio_library(name: str) -> Any:
    """A library of the extra ``audio``, which only those need who pass sounds at other rates, or as files."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is needed to read sounds: pip install 'diffusers_vqdit[audio]'") from error


def is_sound_file(name: str) -> bool:
    """Whether a file is called as one of a sound."""
    return (mimetypes.guess_type(name)[0] or "").startswith("audio/")


def read_sound(value: Any, sampling_rate: int) -> np.ndarray:
    """A sound as a waveform (T,), float32, its channels' mean, at `sampling_rate`.

    Args:
        value: an array or tensor (T,) or (channels, T) that is at `sampling_rate`, of floats in about [-1, 1] or of
            int16 or int32; a dict with such an ``"array"`` and its ``"sampling_rate"``, as `datasets` decodes sounds
            to, or what torchcodec does; or the path of a file, or a dict of its ``"bytes"`` or its ``"path"``, as
            `datasets` has sounds that are not decoded.

    Raises:
        ValueError: if it is none of these, has no samples, or some that are not finite or out of range.
        ImportError: if it must be decoded or resampled, and the library for that is missing.
    """
    rate: Any = sampling_rate
    if hasattr(value, "get_all_samples"):  # torchcodec's decoder, of datasets
        decoded = value.get_all_samples()
        samples, rate = decoded.data, decoded.sample_rate
    elif isinstance(value, dict) and value.get("array") is not None:
        samples, rate = value["array"], value.get("sampling_rate")
    elif isinstance(value, str | os.PathLike | dict):
        samples, rate = _decode(value)
    else:
        samples = value
    rate = check_integer("sampling_rate", rate, 1, MAX_SAMPLING_RATE)
    waveform = _mono(samples)
    if rate != sampling_rate:
        waveform = audio_library("soxr").resample(waveform, rate, sampling_rate)
        if not len(waveform):
            raise ValueError(f"a sound of {rate} Hz is too short for {sampling_rate} Hz")
    return waveform


def read_sounds(value: Any, sampling_rate: int) -> list[np.ndarray]:
    """One sound or several, in a list or as (B, channels, T), as waveforms ([`read_sound`]).

    Raises:
        ValueError: as [`read_sound`].
    """
    batch = isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 3
    return [read_sound(one, sampling_rate) for one in (value if batch or isinstance(value, list) else [value])]


def sound_seconds(value: Any) -> float:
    """The length of an undecoded sound, by its file's header.

    Raises:
        ValueError: if it is no sound that can be read.
    """
    soundfile = audio_library("soundfile")
    try:
        header = soundfile.info(_file_of(value))
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(f"no sound that can be read: {error}") from error
    return header.frames / header.samplerate


def read_part(value: Any, sampling_rate: int, share: float, length: int) -> np.ndarray:
    """A part of an undecoded sound, as [`read_sound`] reads it, of which little more than that part is decoded.

    Args:
        value: the path of a file, or a dict of its ``"bytes"`` or its ``"path"``.
        share: where it begins, in [0, 1), of all places where one of this length can.
        length: samples at `sampling_rate`; a shorter sound is read whole.

    Raises:
        ValueError, ImportError: as [`read_sound`].
    """
    soundfile = audio_library("soundfile")
    try:
        with soundfile.SoundFile(_file_of(value)) as file:
            rate, step = file.samplerate, file.samplerate // math.gcd(file.samplerate, sampling_rate)
            start = part_start(file.frames * sampling_rate // rate, share, length)
            around = 0 if rate == sampling_rate else rate // 10  # that the resampler sees, at either end
            first = max(0, start * rate // sampling_rate - around) // step * step
            wanted = min(-(-(start + length) * rate // sampling_rate) + around, file.frames) - first
            file.seek(first)
            samples = file.read(wanted, dtype="float32", always_2d=True).T
    except (soundfile.SoundFileError, OSError):
        samples, wanted = np.empty((1, 0)), 1
    if samples.shape[1] < wanted:  # a file that is shorter than its header says, or none
        whole = read_sound(value, sampling_rate)
        start = part_start(len(whole), share, length)
        return whole[start : start + length]
    offset = start - first * sampling_rate // rate
    return read_sound({"array": samples, "sampling_rate": rate}, sampling_rate)[offset : offset + length]


def part_start(total: int, share: float, length: int) -> int:
    """Where a part of `length` samples begins in `total`, at a `share` in [0, 1) of all places."""
    return int(share * (max(total - length, 0) + 1))


def sound_bytes(value: Any) -> bytes:
    """The file of an undecoded sound."""
    file = _file_of(value)
    if isinstance(file, io.BytesIO):
        return file.getvalue()
    with open(file, "rb") as opened:
        return opened.read()


def _decode(value: Any) -> tuple[np.ndarray, int]:
    soundfile = audio_library("soundfile")
    try:
        samples, rate = soundfile.read(_file_of(value), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise ValueError(f"no sound that can be read: {error}") from error
    return samples.T, rate


def _file_of(value: Any) -> Any:
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
    if data is not None:
        return io.BytesIO(data)
    # A pipe would block.
    if not isinstance(path, str | os.PathLike) or not os.path.isfile(path):
        raise ValueError(f"{shown(value)} must be a sound: an array, the path of a file, or a dict as datasets has")
    if os.fspath(path).lower().endswith(".raw"):
        raise ValueError(f"{shown(value)} has no header, which would say its rate: give a WAV or FLAC file of it")
    return path


def _mono(samples: Any) -> np.ndarray:
    """Samples as floats (T,), checked."""
    try:
        samples = np.asarray(samples.detach().cpu() if isinstance(samples, torch.Tensor) else samples)
    except (TypeError, ValueError):
        samples = np.empty((0, 0, 0))
    numbers = samples.dtype in (np.int16, np.int32) or np.issubdtype(samples.dtype, np.floating)
    if samples.ndim not in (1, 2) or not numbers or samples.ndim == 2 and len(samples) > MAX_CHANNELS:
        raise ValueError(
            f"a sound must be (T,) or (channels, T), at most {MAX_CHANNELS} channels, of floats in [-1, 1], int16 or "
            f"int32, got {samples.dtype} of shape {samples.shape}"
        )
    if not samples.size:
        raise ValueError("a sound must have samples, got none")
    if not np.issubdtype(samples.dtype, np.floating):
        samples = samples / -float(np.iinfo(samples.dtype).min)
    waveform = samples.astype(np.float32)
    waveform = waveform if waveform.ndim == 1 else waveform.mean(0)
    if not np.isfinite(waveform).all() or np.abs(waveform).max() > MAX_LEVEL:
        raise ValueError(f"a sound's floats must be finite and about in [-1, 1], got up to {np.abs(waveform).max()}")
    return waveform
