"""Metadata of folders of files: which files rows name, what else they say, and which rows are left out and why."""

import codecs
import csv
import hashlib
import json
import logging
import os
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.checks import shown
from .file_lists import ROWS_TOGETHER, FileList


logger = logging.getLogger(__name__)

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def first_of(items: Iterable[Any], count: int = 5) -> str:
    """The first items as a message shows them."""
    items = [str(item).encode("utf-8", "backslashreplace").decode() for item in items]
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")


class FirstFew:
    """A count of things, of which the first few are kept for a message."""

    def __init__(self, most: int = 20) -> None:
        self.most, self.count, self.items = most, 0, list[Any]()

    def add(self, item: Any) -> None:
        self.count += 1
        if len(self.items) < self.most:
            self.items.append(item)


def read_metadata(path: Path, skipped: FirstFew) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a metadata file with their numbers, from 1; what is no row is told in `skipped`."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    with open(path, "rb") as file:
        wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    # Bytes that are no text become lone surrogates, which the check of each row finds.
    encoding, errors = ("utf-16", "replace") if wide else ("utf-8-sig", "surrogateescape")
    is_csv = path.suffix == ".csv"
    with open(path, encoding=encoding, errors=errors, newline="" if is_csv else "\n") as lines:
        yield from (_csv_rows if is_csv else _json_rows)(lines, skipped)


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_TOGETHER):
                yield from enumerate(batch.to_pylist(), count + 1)
                count += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} is no parquet file that can be read: {error}") from error


def _json_rows(lines: Iterable[str], skipped: FirstFew) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.removesuffix("\n"))
        except (ValueError, RecursionError) as error:
            skipped.add(f"row {number} is no JSON ({error})")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            skipped.add(f"row {number} is no JSON object but {shown(row, 40)}")


def _csv_rows(lines: Iterable[str], skipped: FirstFew) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # a text may be longer than 128 KB
    reader: csv.DictReader = csv.DictReader(lines, strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            skipped.add(f"row {reader.line_num} is no CSV ({error})")
            continue
        if None in row:
            skipped.add(f"row {reader.line_num} has more fields than the header")
        else:
            yield reader.line_num, {name: value if value != "" else None for name, value in row.items()}


def spelling(path: str) -> str:
    """A path under which both ways to write an accent are the same."""
    return unicodedata.normalize("NFC", path)


class Spellings:
    """Files by their paths, whichever way accents are written in these; 16 bytes a file are in memory, once one is
    asked for.

    Args:
        files: their paths. Of several that are spelled alike the last one is given.
    """

    def __init__(self, files: FileList[str]) -> None:
        self.files = files

    @cached_property
    def _digests(self) -> tuple[np.ndarray, np.ndarray]:
        """Of all files in order, and which files they are of."""
        digests = np.fromiter((_digest(spelling(path)) for path in self.files), np.uint64, len(self.files))
        order = digests.argsort(kind="stable")
        return digests[order], order

    def get(self, path: str) -> str | None:
        wanted = spelling(path)
        digests, order = self._digests
        digest = np.uint64(_digest(wanted))
        first, end = (int(np.searchsorted(digests, digest, side=side)) for side in ("left", "right"))
        found = (self.files[int(place)] for place in order[first:end][::-1])
        return next((file for file in found if spelling(file) == wanted), None)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def named_file(row: dict[str, Any], metadata: Path, folder: Path, known: Spellings) -> str:
    """The regular file that a metadata row names.

    Args:
        row: with ``file_name``, relative to the metadata file.
        metadata: the metadata file.
        folder: which the file must lie in.
        known: the listed files.

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
        path = os.path.normpath(os.path.join(metadata.parent, one))
        if path != str(folder) and not path.startswith(os.path.join(folder, "")):
            raise ValueError(f"names {shown(name, 60)}, which is outside {str(folder)!r}")
        if os.path.isfile(path):
            return path
        # File systems and archives spell accents in two ways.
        if (listed := known.get(path)) is not None:
            return listed
    raise ValueError(f"names {shown(name, 60)}, which is no regular file there")


def described_files(
    folder: Path, files: FileList[str], metadata: list[Path], column: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files of a folder that metadata rows name, and what else these say but for `column`, which the files will
    be; tells what was left out."""
    known = Spellings(files)
    for path in metadata:
        unread, unnamed = FirstFew(), FirstFew()
        for number, row in read_metadata(path, unread):
            try:
                file = named_file(row, path, folder, known)
            except ValueError as error:
                unnamed.add(f"row {number} {error}")
                continue
            yield file, {name: value for name, value in row.items() if name not in ("file_name", column)}
        if count := unread.count + unnamed.count:
            told = [*unread.items, *unnamed.items][: unread.most]
            logger.warning(f"{str(path)!r}: left out {count} rows: {'; '.join(told)}")
