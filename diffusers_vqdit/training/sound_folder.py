"""Folders of recordings as tables. `datasets`' own reader of them needs torchcodec, which needs FFmpeg."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .folder_files import FileKind, read_folder


def _extensions() -> set[str]:
    from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder

    return {*AudioFolder.EXTENSIONS, ".aif", ".oga"}


SOUNDS = FileKind("sound", "audio", _extensions)  # the column as datasets' own audio folders call it


def read_sound_folder(
    folder: str | Path,
    columns: Iterable[str] = (),
    *,
    output_dir: str | Path | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """The splits of a folder of recordings as datasets with an undecoded ``audio`` column; arguments and errors as of
    [`~training.folder_files.read_folder`]."""
    from datasets import Audio

    return read_folder(folder, SOUNDS, Audio(decode=False), columns, output_dir=output_dir, cache_dir=cache_dir)
