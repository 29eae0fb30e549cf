"""Folders of recordings as tables. `datasets`' own reader of them needs torchcodec, which needs FFmpeg."""

import logging
import os
from pathlib import Path
from typing import Any

from .image_folder import (
    METADATA_FILES,
    SPLIT_FOLDERS,
    class_rows,
    described_files,
    first_of,
    holds_pictures,
)


logger = logging.getLogger(__name__)

AUDIO_COLUMN = "audio"  # as datasets' own folders call it


def list_sound_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of sounds below a folder, and the metadata files, both sorted, without hidden ones."""
    from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder

    found = [
        Path(place) / name
        for place, folders, names in os.walk(folder)
        for name in names
        if not any(part.startswith(".") for part in (*Path(place).relative_to(folder).parts, name))
    ]
    sounds = sorted(path for path in found if path.suffix.lower() in AudioFolder.EXTENSIONS and path.is_file())
    return sounds, sorted(path for path in found if path.name in METADATA_FILES)


def holds_sounds(folder: Path) -> bool:
    """Whether a folder is one for [`read_sound_folder`]: it has sounds, no pictures, and no tables but metadata."""
    names = [Path(name) for _, _, found in os.walk(folder) for name in found if name not in METADATA_FILES]
    tables = any(name.suffix.lower() in (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".arrow") for name in names)
    return not tables and bool(list_sound_files(folder)[0]) and not holds_pictures(folder)


def read_sound_folder(folder: str | Path) -> dict[str, Any]:
    """The splits of a folder of recordings as datasets with an undecoded ``audio`` column.

    With ``metadata.jsonl``, ``.csv`` or ``.parquet``, in it or below, each row with a ``file_name`` is a sample, and
    its other fields are columns. Without, all sounds are, and where they lie in class folders of one depth these are
    the column ``label``. Folders called train, test or validation at the top are splits if all sounds lie in such
    folders; else there is one split, ``train``.

    Raises:
        ValueError: if no row names a sound.
    """
    folder = Path(os.path.abspath(folder))
    sounds, metadata = list_sound_files(folder)
    if metadata:
        rows = described_files(folder, sounds, metadata, AUDIO_COLUMN)
    else:
        rows = list(zip(sounds, class_rows(folder, sounds), strict=True))
    if not rows:
        raise ValueError(f"none of the rows of {first_of(metadata)} names a sound: there is nothing to read")
    tops = [path.relative_to(folder).parts for path, _ in rows]
    in_splits = all(len(parts) > 1 and parts[0] in SPLIT_FOLDERS for parts in tops)
    splits: dict[str, list] = {}
    for sample, parts in zip(rows, tops, strict=True):
        splits.setdefault(SPLIT_FOLDERS[parts[0]] if in_splits else "train", []).append(sample)
    return {name: _table(taken) for name, taken in splits.items()}


def _table(rows: list[tuple[Path, dict[str, Any]]]) -> Any:
    from datasets import Audio, Dataset

    names = dict.fromkeys(name for _, row in rows for name in row)
    columns = {name: [row.get(name) for _, row in rows] for name in names}
    dataset = Dataset.from_dict({AUDIO_COLUMN: [str(path) for path, _ in rows], **columns})
    return dataset.cast_column(AUDIO_COLUMN, Audio(decode=False))
