"""WAV files with what is said of them in their chunks, by the RIFF format."""

import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np


XMP_CHUNK = b"_PMX"  # where Adobe's XMP specification, part 3, puts the packet


def write_wav(
    path: str | os.PathLike,
    waveform: np.ndarray,
    sampling_rate: int,
    info: Mapping[str, str] | None = None,
    xmp: str | None = None,
) -> None:
    """Write a waveform (T,) of floats as 16-bit PCM; what is beyond [-1, 1] is clipped.

    Args:
        info: texts by the four letters of a field of the INFO list: ``INAM`` the title, ``ICMT`` a comment, ``ISFT``
            the software.
        xmp: an XMP packet.
    """
    samples = (np.clip(np.asarray(waveform, dtype=np.float64), -1, 1) * 32767).round().astype("<i2").tobytes()
    form = struct.pack("<HHIIHH", 1, 1, sampling_rate, 2 * sampling_rate, 2, 16)
    chunks = _chunk(b"fmt ", form) + _chunk(b"data", samples)
    if info:
        fields = (_chunk(name.encode("ascii"), text.encode() + b"\0") for name, text in info.items())
        chunks += _chunk(b"LIST", b"INFO" + b"".join(fields))
    if xmp is not None:
        chunks += _chunk(XMP_CHUNK, xmp.encode())
    Path(path).write_bytes(_chunk(b"RIFF", b"WAVE" + chunks))


def read_xmp(path: str | os.PathLike) -> str | None:
    """The XMP packet of a WAV file; None for a file without one."""
    data = Path(path).read_bytes()
    start = 12
    while start + 8 <= len(data):
        size = int.from_bytes(data[start + 4 : start + 8], "little")
        if data[start : start + 4] == XMP_CHUNK:
            return data[start + 8 : start + 8 + size].decode()
        start += 8 + size + size % 2
    return None


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + len(content).to_bytes(4, "little") + content + b"\0" * (len(content) % 2)
