"""Folders of pictures as tables: which files are read, what their metadata says, and what is left out and why."""

import codecs
import csv
import io
import json
import logging
import os
import re
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..utils.checks import shown


logger = logging.getLogger(__name__)

IMAGE_COLUMN, LABEL_COLUMN = "image", "label"  # as datasets' own image folders call them
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# What a folder that a script wrote has in it: a pipeline, a LoRA, codes.
_RUN_FILES = ("model_index.json", "pytorch_lora_weights.safetensors", "segments.json")
# Tables of samples, pictures among them; and what may be one, or stand beside pictures and say something else.
_TABLES = {".parquet", ".arrow", ".tar", ".lance"}
_TEXT_TABLES = {".csv", ".tsv", ".json", ".jsonl", ".py", ".zip", ".h5"}
# Nobody takes these for pictures.
_NOTES = {".md", ".txt", ".ini", ".db"}
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def first_of(items: Iterable[Any], count: int = 5) -> str:
    """The first items as a message shows them."""
    items = [str(item).encode("utf-8", "backslashreplace").decode() for item in items]
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")


def list_image_files(folder: Path, output_dir: Path | None = None) -> tuple[list[Path], list[Path]]:
    """The picture files below a folder, by their endings, and the metadata files, both sorted.

    Hidden files and folders are left out, and each folder is read once, however many links lead to it. Folders that a
    training run wrote, `output_dir` among them, and files of other endings are left out with a warning.
    """
    extensions = _picture_extensions()
    pictures: list[Path] = []
    metadata: list[Path] = []
    own: list[Path] = []
    odd: list[Path] = []
    others: list[Path] = []
    output = output_dir.resolve() if output_dir is not None else None
    seen: set[tuple[int, int]] = set()
    folders, links = [folder], list[Path]()
    while folders or links:
        # Links last, so that a folder is read under its own name where it has one here.
        here = folders.pop() if folders else links.pop(0)
        identity = os.stat(here).st_dev, os.stat(here).st_ino
        if identity in seen:
            continue
        seen.add(identity)
        is_run = _is_run(here)
        if here != folder and (is_run or here.resolve() == output):
            own.append(here)
            continue
        try:
            with os.scandir(here) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except PermissionError:
            odd.append(here)
            continue
        for entry in entries:
            path = here / entry.name
            if entry.name.startswith("."):
                continue
            try:
                mode = entry.stat().st_mode
            except OSError:  # a link to nothing, or to itself
                mode = 0
            if stat.S_ISDIR(mode):
                # The samples of a run whose output folder is the data folder.
                if (is_run or here.resolve() == output) and _is_written(path):
                    own.append(path)
                elif entry.is_symlink():
                    links.append(path)
                else:
                    folders.append(path)
            elif path.suffix.lower() in extensions:
                (pictures if stat.S_ISREG(mode) else odd).append(path)
            elif entry.name in METADATA_FILES and stat.S_ISREG(mode):
                metadata.append(path)
            elif path.suffix.lower() not in _NOTES and not is_run:
                others.append(path)
    if others:
        logger.warning(
            f"left out {len(others)} files in {str(folder)!r} that don't end as pictures' names do: {first_of(others)}"
        )
    if odd:
        logger.warning(f"left out {len(odd)} paths that are no regular files or folders to read: {first_of(odd)}")
    if own:
        count = sum(Path(name).suffix.lower() in extensions for path in own for name in _below(path))
        logger.warning(
            f"left out {len(own)} folders in {str(folder)!r} that training runs wrote, with {count} pictures: "
            f"{first_of(own)}"
        )
    return sorted(pictures), sorted(metadata)


def holds_pictures(folder: Path) -> bool:
    """Whether a folder is one for [`read_image_folder`]: it has pictures, and neither tables with some in them nor
    more tables of texts than pictures, but for their metadata and what scripts wrote."""
    pictures = texts = 0
    for place, folders, names in os.walk(folder):
        if Path(place) != folder and _is_run(Path(place)):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in map(Path, names):
            ending = path.suffix.lower()
            if path.name in METADATA_FILES or path.name in _RUN_FILES:
                continue
            if ending in _TABLES and not _is_run(Path(place)):
                return False
            pictures += ending in _picture_extensions()
            texts += ending in _TEXT_TABLES
    return pictures > 0 and pictures >= texts


def _picture_extensions() -> set[str]:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return {*ImageFolder.EXTENSIONS, ".avif"}


def _is_run(folder: Path) -> bool:
    """Whether a training run of this package, or diffusers' `save_pretrained`, wrote the folder."""
    if any((folder / name).is_file() for name in _RUN_FILES):
        return True
    try:
        if "_class_name" in json.loads((folder / "config.json").read_bytes()):
            return True
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    return any(
        re.fullmatch(r"checkpoint-\d+", path.name) and any(path.glob("*.safetensors"))
        for path in folder.glob("checkpoint-*")
    )


def _is_written(folder: Path) -> bool:
    return folder.name in ("samples", "logs", "codes") or _is_run(folder) or folder.name.startswith("checkpoint-")


def _below(folder: Path) -> list[str]:
    return [name for _, _, names in os.walk(folder) for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# Metadata


def read_metadata(path: Path, skipped: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a metadata file with their numbers, from 1; what is no row is told in `skipped`."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return list(enumerate(pq.read_table(path).to_pylist(), 1))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{str(path)!r} is no parquet file that can be read: {error}") from error
    data = path.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    # Bytes that are no text become lone surrogates, which the check of each row finds.
    text = data.decode("utf-16", "replace") if wide else data.decode("utf-8-sig", "surrogateescape")
    return _csv_rows(text, skipped) if path.suffix == ".csv" else _json_rows(text, skipped)


def _json_rows(text: str, skipped: list[str]) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            skipped.append(f"row {number} is no JSON ({error})")
            continue
        if isinstance(row, dict):
            rows.append((number, row))
        else:
            skipped.append(f"row {number} is no JSON object but {shown(row, 40)}")
    return rows


def _csv_rows(text: str, skipped: list[str]) -> list[tuple[int, dict[str, Any]]]:
    rows: list[tuple[int, dict[str, Any]]] = []
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return rows
        except csv.Error as error:
            skipped.append(f"row {reader.line_num} is no CSV ({error})")
            continue
        if None in row:
            skipped.append(f"row {reader.line_num} has more fields than the header")
        else:
            rows.append((reader.line_num, {name: value if value != "" else None for name, value in row.items()}))


def named_file(row: dict[str, Any], metadata: Path, folder: Path, known: dict[str, Path]) -> Path:
    """The regular file that a metadata row names.

    Args:
        row: with ``file_name``, relative to the metadata file.
        metadata: the metadata file.
        folder: which the file must lie in.
        known: the listed pictures by [`spelling`].

    Raises:
        ValueError: that says what is wrong with the row.
    """
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError("has no file_name" if name is None or name == "" else f"has file_name={shown(name, 60)}")
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ValueError("has text that is not UTF-8") from None
    # Tables made on Windows have backslashes.
    for one in dict.fromkeys([name, name.replace("\\", "/")]):
        path = Path(os.path.normpath(metadata.parent / one))
        if not path.is_relative_to(folder):
            raise ValueError(f"names {shown(name, 60)}, which is outside {str(folder)!r}")
        if os.path.isfile(path):
            return path
        # File systems and archives spell accents in two ways.
        if (listed := known.get(spelling(path))) is not None:
            return listed
    raise ValueError(f"names {shown(name, 60)}, which is no regular file there")


def described_files(
    folder: Path, files: list[Path], metadata: list[Path], column: str
) -> list[tuple[Path, dict[str, Any]]]:
    """The files of a folder that metadata rows name, and what else these say but for `column`, which the files will
    be; tells what was left out."""
    known = {spelling(path): path for path in files}
    found = []
    for path in metadata:
        skipped: list[str] = []
        for number, row in read_metadata(path, skipped):
            try:
                file = named_file(row, path, folder, known)
            except ValueError as error:
                skipped.append(f"row {number} {error}")
                continue
            found.append((file, {name: value for name, value in row.items() if name not in ("file_name", column)}))
        if skipped:
            logger.warning(f"{str(path)!r}: left out {len(skipped)} rows: {'; '.join(skipped[:20])}")
    return found


def spelling(path: Path) -> str:
    """A path under which both ways to write an accent are the same."""
    return unicodedata.normalize("NFC", str(path))


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def read_image_folder(
    folder: str | Path, columns: Iterable[str] = (), output_dir: str | Path | None = None
) -> dict[str, Any]:
    """The splits of a picture folder as datasets with an undecoded ``image`` column.

    With ``metadata.jsonl``, ``.csv`` or ``.parquet``, in it or below, each row with a ``file_name`` is a sample, and
    its other fields are columns. Without, all pictures are, and where they lie in class folders of one depth these
    are the column ``label``. Folders called train, test or validation at the top are splits if all pictures lie in
    such folders; else there is one split, ``train``. Names of files mean nothing.

    Args:
        folder: the folder.
        columns: which columns must be usable.
        output_dir: the folder that the run will write, which is left out.

    Raises:
        ValueError: if there is no picture, no row with a picture, or one of `columns` mixes types.
    """
    folder = Path(os.path.abspath(folder))
    pictures, metadata = list_image_files(folder, Path(output_dir) if output_dir is not None else None)
    if not pictures and not metadata:
        raise ValueError(f"there are no pictures in {str(folder)!r}{_archives(folder)}")
    if metadata:
        files, rows = _described(folder, pictures, metadata)
    else:
        files, rows = pictures, class_rows(folder, pictures)
    tops = [path.relative_to(folder).parts for path in files]
    in_splits = all(len(parts) > 1 and parts[0] in SPLIT_FOLDERS for parts in tops)
    splits: dict[str, list[int]] = {}
    for index, parts in enumerate(tops):
        splits.setdefault(SPLIT_FOLDERS[parts[0]] if in_splits else "train", []).append(index)
    labels = None if metadata else sorted({row[LABEL_COLUMN] for row in rows if row})
    return {
        name: _table([files[i] for i in taken], [rows[i] for i in taken], labels, columns)
        for name, taken in splits.items()
    }


def class_rows(folder: Path, files: list[Path]) -> list[dict[str, Any]]:
    """For each file its class folder as ``label``; nothing where files don't lie in class folders of one depth, or
    where these are splits and nothing else."""
    places = [path.relative_to(folder).parts for path in files]
    classes = [_utf8(path.parent.name) for path in files]
    depths = {len(place) for place in places}
    only_splits = depths == {2} and all(place[0] in SPLIT_FOLDERS for place in places)
    if len(set(classes)) < 2 or len(depths) > 1 or only_splits:
        return [{} for _ in files]
    return [{LABEL_COLUMN: name} for name in classes]


def _described(folder: Path, pictures: list[Path], metadata: list[Path]) -> tuple[list[Path], list[dict[str, Any]]]:
    """The files that metadata rows name, and the rows; tells what was left out."""
    for path in metadata:
        if beside := [other.name for other in metadata if other.parent == path.parent and other != path]:
            raise ValueError(f"{str(path.parent)!r} has both {path.name} and {beside[0]}; keep one of them")
    described = described_files(folder, pictures, metadata, IMAGE_COLUMN)
    files, rows = [file for file, _ in described], [row for _, row in described]
    if not files:
        raise ValueError(f"none of the rows of {first_of(metadata)} names a picture: there is nothing to read")
    named = set(files)
    if unnamed := [path.relative_to(folder) for path in pictures if path not in named]:
        logger.warning(
            f"left out {len(unnamed)} of {len(pictures)} pictures in {str(folder)!r} that no metadata row names: "
            f"{first_of(unnamed)}"
        )
    return files, rows


def _table(files: list[Path], rows: list[dict[str, Any]], classes: list[str] | None, columns: Iterable[str]):
    """A `datasets.Dataset` of files and their rows."""
    import pyarrow as pa
    from datasets import ClassLabel, Dataset, Image

    arrays = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if classes is None and any(isinstance(v, list) for v in values) and any(isinstance(v, str) for v in values):
            values = [[value] if isinstance(value, str) else value for value in values]  # one caption, or several
        try:
            arrays[_utf8(name)] = pa.array(values)
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            kinds: dict[str, int] = {}
            for row, value in enumerate(values):
                kinds.setdefault(type(value).__name__, row)
            message = f"column {name!r} has values of several types, or of one that a table can't have: " + ", ".join(
                f"{kind} (first in row {row})" for kind, row in kinds.items()
            )
            if name in columns:
                raise ValueError(message) from error
            logger.warning(f"{message}; it is left out")
    image = [_source(path) for path in files]
    dataset = Dataset(
        pa.table({IMAGE_COLUMN: pa.array(image, pa.struct({"bytes": pa.binary(), "path": pa.string()}))} | arrays)
    )
    dataset = dataset.cast_column(IMAGE_COLUMN, Image(decode=False))
    return dataset.cast_column(LABEL_COLUMN, ClassLabel(names=classes)) if classes else dataset


def _source(path: Path) -> dict[str, bytes | str | None]:
    try:
        str(path).encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8 can't stand in a table
        return {"bytes": path.read_bytes(), "path": _utf8(str(path))}
    return {"bytes": None, "path": str(path)}


def _utf8(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _archives(folder: Path) -> str:
    archives = [
        name for name in _below(folder) if name.lower().endswith((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"))
    ]
    return f"; unpack {first_of(sorted(archives))}" if archives else ""
