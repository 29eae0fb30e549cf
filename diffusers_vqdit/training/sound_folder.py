"""Folders of recordings as tables. `datasets`' own reader of them needs torchcodec, which needs FFmpeg."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .file_lists import FileList, ending, sorted_paths
from .folder_metadata import METADATA_FILES, described_files, first_of
from .folder_tables import ClassFolders, Sample, folder_tables
from .image_folder import files_below, holds_pictures, is_hidden


AUDIO_COLUMN = "audio"  # as datasets' own folders call it
_TABLES = (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".arrow")


def _sounds(folder: Path, metadata: list[Path]) -> Iterator[str]:
    """The paths of sounds; those of metadata files that lie between them are added to `metadata`."""
    from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder

    for path in files_below(folder, is_hidden):
        if is_hidden(path):
            continue
        if os.path.basename(path) in METADATA_FILES:
            metadata.append(Path(path))
        elif ending(path) in AudioFolder.EXTENSIONS and os.path.isfile(path):
            yield path


def list_sound_files(folder: Path, cache_dir: str | os.PathLike | None = None) -> tuple[FileList[str], list[Path]]:
    """The files of sounds below a folder, and the metadata files, both sorted as paths are, without hidden ones."""
    metadata: list[Path] = []
    sounds = FileList(sorted_paths(_sounds(folder, metadata), cache_dir), cache_dir)
    return sounds, sorted(metadata)


def holds_sounds(folder: Path) -> bool:
    """Whether a folder is one for [`read_sound_folder`]: it has sounds, no pictures, and no tables but metadata."""
    if any(ending(path) in _TABLES and os.path.basename(path) not in METADATA_FILES for path in files_below(folder)):
        return False
    return next(_sounds(folder, []), None) is not None and not holds_pictures(folder)


def read_sound_folder(
    folder: str | Path, columns: Iterable[str] = (), cache_dir: str | os.PathLike | None = None
) -> dict[str, Any]:
    """The splits of a folder of recordings as datasets with an undecoded ``audio`` column.

    With ``metadata.jsonl``, ``.csv`` or ``.parquet``, in it or below, each row with a ``file_name`` is a sample, and
    its other fields are columns. Without, all sounds are, and where they lie in class folders of one depth these are
    the column ``label``. Folders called train, test or validation at the top are splits if all sounds lie in such
    folders; else there is one split, ``train``.

    Args:
        folder: the folder.
        columns: which columns must be usable.
        cache_dir: where the tables are, in files that have no names; by default the cache of `datasets`.

    Raises:
        ValueError: if no row names a sound, or one of `columns` mixes types.
    """
    from datasets import Audio

    folder = Path(os.path.abspath(folder))
    sounds, metadata = list_sound_files(folder, cache_dir)
    samples: Iterable[Sample]
    if metadata:
        samples = FileList(described_files(folder, sounds, metadata, AUDIO_COLUMN), cache_dir)
    else:
        samples = ClassFolders(folder, sounds)
    if next(iter(samples), None) is None:
        raise ValueError(f"none of the rows of {first_of(metadata)} names a sound: there is nothing to read")
    options: dict[str, Any] = {"columns": list(columns), "cache_dir": cache_dir}
    return folder_tables(folder, samples, AUDIO_COLUMN, Audio(decode=False), **options)
