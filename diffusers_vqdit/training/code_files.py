"""The files of a folder of codes: shards, and an index that says what must be in them.

New shards are Arrow files, which are mapped into memory: rows are read from where they lie on disk. Those of older
versions are parquet files, which are read whole.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ..models.config_checks import SEGMENT_KEYS
from ..models.segment_layers import check_centered, check_patch
from ..pipelines.segment_base import LABEL, bucket_shape
from ..pipelines.segment_processors import check_segment_entries
from ..tasks import SEGMENT_NAME
from ..utils.checks import check_integer, shown
from ..utils.fingerprints import file_sha256
from ..utils.weight_files import replacing_file
from .folder_metadata import first_of
from .mapped_codes import CodeChunk
from .verified_files import changed_files


logger = logging.getLogger(__name__)

INDEX_FILE = "segments.json"
FILES = ("codes-*.arrow", "codes-*.parquet", "states-*.arrow")  # of the shards; parquet is of older versions
ROWS_TOGETHER = 4096  # of a record batch
# Beside a segment's codes: several variants a row, for use where it is given and where it is generated.
SUFFIXES = ("", "_prompts", "_variants")


def code_type(vocab_size: int | None) -> pa.DataType:
    """The smallest type of Arrow that holds codes in [0, vocab_size)."""
    if vocab_size is None:
        return pa.int32()
    return next((kind for bits, kind in ((8, pa.uint8()), (16, pa.uint16())) if vocab_size <= 2**bits), pa.int32())


class ShardWriter:
    """Writes the rows of a shard as they come, `ROWS_TOGETHER` at once.

    Args:
        sink: the file.
        vocab_sizes: by column; their codes take the smallest type that holds them.
    """

    def __init__(self, sink: pa.OSFile, vocab_sizes: Mapping[str, int]) -> None:
        self.sink, self.vocab_sizes, self.rows = sink, vocab_sizes, 0
        self.writer: Any = None
        self.waiting: dict[str, list[np.ndarray]] = {}

    def write(self, columns: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Some rows of each column, of codes of any shape."""
        for name, rows in columns.items():
            kind = code_type(self.vocab_sizes.get(name)).to_pandas_dtype()
            self.waiting.setdefault(name, []).extend(row.flatten().numpy().astype(kind) for row in rows)
        self.rows += len(next(iter(columns.values())))
        while len(next(iter(self.waiting.values()))) >= ROWS_TOGETHER:
            self._write(ROWS_TOGETHER)

    def _write(self, count: int) -> None:
        arrays = {}
        for name, rows in self.waiting.items():
            offsets = np.cumsum([0, *(len(row) for row in rows[:count])])
            values = pa.array(np.concatenate(rows[:count]))
            arrays[name] = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values)
            self.waiting[name] = rows[count:]
        batch = pa.record_batch(arrays)
        if self.writer is None:
            self.writer = pa.ipc.new_file(self.sink, batch.schema)
        self.writer.write_batch(batch)

    def close(self) -> None:
        """Write what is left."""
        if left := len(next(iter(self.waiting.values()))):
            self._write(left)
        self.writer.close()


@contextmanager
def shard_writer(path: Path, vocab_sizes: Mapping[str, int]) -> Iterator[ShardWriter]:
    """A writer of one or more rows for a ``with`` block, at whose end the file is there."""
    with replacing_file(path) as unfinished, pa.OSFile(str(unfinished), "wb") as sink:
        writer = ShardWriter(sink, vocab_sizes)
        yield writer
        writer.close()


def write_shard(
    path: Path, columns: Mapping[str, Sequence[torch.Tensor]], vocab_sizes: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Write each column's rows of codes, of any shape, and return the shard's entry in the index."""
    with shard_writer(path, vocab_sizes or {}) as writer:
        writer.write(columns)
    return {"file": path.name, "rows": writer.rows, "sha256": file_sha256(path)}


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write the index, which makes the folder complete."""
    with replacing_file(folder / INDEX_FILE) as unfinished:
        unfinished.write_text(json.dumps(index, indent=2, ensure_ascii=False), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of codes, after checks of all it says but for the shards' codes.

    What it says of a segment stands in two: its geometry in ``"segments"``, and what it is in ``"entries"``.

    Raises:
        ValueError: if it is missing, or something in it can't be; the message names the file and the entry.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} is no complete folder of codes: there is no {INDEX_FILE} in it")
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON file: {error}") from error

    def need(holds: bool, entry: str, value: Any, kind: str) -> None:
        if not holds:
            raise ValueError(f"{str(path)!r}: {entry}={shown(value, 60)} must be {kind}")

    need(isinstance(index, dict), "the index", index, "a JSON object")
    segments, labels = index.get("segments"), index.get("labels")
    need(isinstance(segments, dict) and len(segments) > 0, "segments", segments, "an object of one or more segments")
    for name, segment in segments.items():
        entry = f"segments[{name!r}]"
        need(SEGMENT_NAME.fullmatch(name) is not None, "segments", name, "named with letters, digits and underscores")
        need(isinstance(segment, dict), entry, segment, "an object with vocab_size and shape")
        shape, size = segment.get("shape"), segment.get("vocab_size", segment.get("channels"))
        need(isinstance(shape, list) and len(shape) in (1, 2, 3), f"{entry}.shape", shape, "[n], [h, w] or [t, h, w]")
        for number in (size, *shape):
            need(type(number) is int and 0 < number < 2**31, entry, segment, "of positive integers")
        if "shared_with" in segment:
            other = segments.get(segment["shared_with"]) if isinstance(segment["shared_with"], str) else None
            fits = isinstance(other, dict) and "shared_with" not in other and other.get("vocab_size") == size
            need(fits, f"{entry}.shared_with", segment["shared_with"], f"a segment with vocab_size={size} of its own")
    need(isinstance(labels, list) and all(type(x) is str for x in labels), "labels", labels, "a list of strings")
    need(len(set(labels)) == len(labels), "labels", labels, "different names")
    if LABEL in segments and ("names" in segments[LABEL] or "modality" not in segments[LABEL]):
        size = segments[LABEL]["vocab_size"]
        need(len(labels) == size, "labels", labels, f"the names of the {size} codes of the segment {LABEL!r}")
    entries = {n: {k: v for k, v in one.items() if k not in SEGMENT_KEYS} for n, one in segments.items()}
    segments = {n: {k: v for k, v in one.items() if k in SEGMENT_KEYS} for n, one in segments.items()}
    try:
        for name in segments:
            check_patch(segments, name)
            check_centered(segments, name)
        entries = check_segment_entries({n: entry for n, entry in entries.items() if entry}, segments)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error
    index |= {"segments": segments, "entries": entries}
    factor = index.get("lowres_factor")
    need(factor is None or (type(factor) is int and factor >= 2), "lowres_factor", factor, "null or at least 2")

    if "shards" not in index and "fingerprints" not in index:
        logger.warning(
            f"{str(folder)!r} was written by an older version: that its files are whole, and of these tokenizers, "
            "can't be checked"
        )
        return {**index, "fingerprints": {}, "settings": {}, "shards": None, "source": "", "notes": []}
    notes = index.setdefault("notes", [])
    need(isinstance(notes, list) and all(type(x) is str for x in notes), "notes", notes, "a list of strings")
    prints, settings, shards = index.get("fingerprints"), index.get("settings"), index.get("shards")
    need(
        isinstance(prints, dict) and all(type(x) is str for x in prints.values()),
        "fingerprints",
        prints,
        "an object of strings",
    )
    need(isinstance(settings, dict), "settings", settings, "an object")
    need(isinstance(index.setdefault("source", ""), str), "source", index["source"], "a string")
    need(isinstance(shards, list) and len(shards) > 0, "shards", shards, "a list of one or more shards")
    states = any("channels" in segment for segment in segments.values())
    for shard in shards:
        whole = isinstance(shard, dict) and type(shard.get("rows")) is int and shard["rows"] > 0
        need(whole and ("states" in shard) == states, "shards", shard, "file, rows and sha256")
        for file in _files_of(shard):
            whole = isinstance(file, dict) and type(file.get("file")) is str and type(file.get("sha256")) is str
            need(whole and Path(file["file"]).name == file["file"], "shards", shard, "files in this folder")
    names = [file["file"] for shard in shards for file in _files_of(shard)]
    need(len(set(names)) == len(names), "shards", shards, "different files")
    counts = {len(entry["buckets"]) for entry in entries.values() if "buckets" in entry}
    need(len(counts) < 2, "segments", index["entries"], "of one number of buckets")
    for shard in shards if counts else []:
        bucket = shard.get("bucket")
        need(
            type(bucket) is int and 0 <= bucket < max(counts), "shards", shard, f"with a bucket in [0, {max(counts)})"
        )
    return index


def _files_of(shard: Mapping[str, Any]) -> list[Any]:
    """What an index says of a shard's files: of codes, and of states where there are some."""
    return [shard, *([shard["states"]] if "states" in shard else [])]


def bucket_segments(index: Mapping[str, Any], bucket: int) -> dict[str, dict[str, Any]]:
    """The segments of an index, with the shapes of the codes of one bucket."""
    entries = index["entries"]
    return {
        name: {**segment, "shape": bucket_shape(segment["shape"], entries.get(name, {}), bucket)}
        for name, segment in index["segments"].items()
    }


def check_shards(folder: Path, shards: list[dict[str, Any]] | None) -> list[Path]:
    """The paths of the shards' codes, which must be the listed ones, whole, as must be their states; None lists those
    of an older version.

    Raises:
        ValueError: that names the shards that are missing, not listed, or changed.
    """
    there = sorted(path.name for kind in FILES for path in folder.glob(kind))
    if shards is None:
        if not there:
            raise ValueError(f"{str(folder)!r} is no complete folder of codes: there is no shard in it")
        return [folder / name for name in there]
    files = [file for shard in shards for file in _files_of(shard)]
    listed = [file["file"] for file in files]
    if missing := [name for name in listed if not (folder / name).is_file()]:
        raise ValueError(f"{str(folder)!r}: the shards {first_of(missing)} are missing, which {INDEX_FILE} lists")
    if extra := sorted(set(there) - set(listed)):
        raise ValueError(f"{str(folder)!r}: the shards {first_of(extra)} are not listed in {INDEX_FILE}")
    changed = [shard["file"] for shard in shards if file_sha256(folder / shard["file"]) != shard["sha256"]]
    states = {shard["states"]["file"]: shard["states"]["sha256"] for shard in shards if "states" in shard}
    changed += changed_files(folder, states)  # which may be larger than memory
    if changed:
        raise ValueError(
            f"{str(folder)!r}: the shards {first_of(changed)} are damaged or were changed: their SHA-256 is not the "
            f"one in {INDEX_FILE}; encode the data again"
        )
    return [folder / shard["file"] for shard in shards]


def read_shard(path: Path, segments: dict[str, dict], rows: int | None) -> dict[str, list[CodeChunk]]:
    """Each column's codes, checked; `segments` are those of codes.

    Raises:
        ValueError: that names the file and the column, if codes are missing, no integers or out of range.
    """
    names, batches = _record_batches(path)
    known = {f"{name}{suffix}": name for name in segments for suffix in SUFFIXES}
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{str(path)!r} is no file of codes that can be read: it has two columns {twice[0]!r}")
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"{str(path)!r} has the columns {unknown}, which are no segments: it has {sorted(segments)}")
    if missing := sorted(set(segments) - set(names)):
        raise ValueError(f"{str(path)!r} lacks the columns of the segments {missing}")
    found: dict[str, list[CodeChunk]] = {name: [] for name in names}
    count = 0
    for batch in batches:
        for column in names:
            segment, named = segments[known[column]], f"{str(path)!r}: segment {column!r}"
            chunk = _check_codes(batch.column(column), named, segment["vocab_size"])
            _check_sizes(np.diff(chunk.offsets), named, segment, count, several=column not in segments)
            if path.suffix != ".arrow":  # which is mapped below, and only checked here
                found[column].append(chunk)
        count += batch.num_rows
    if rows is not None:
        check_integer(f"rows of {str(path)!r}", count, rows, rows)
    if not count:
        raise ValueError(f"{str(path)!r} has no rows")
    if path.suffix != ".arrow":
        return found
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    every = [reader.get_batch(index) for index in range(reader.num_record_batches)]
    return {
        name: [CodeChunk(one.column(name).values.to_numpy(), one.column(name).offsets.to_numpy()) for one in every]
        for name in names
    }


def _record_batches(path: Path) -> tuple[list[str], Iterator[pa.RecordBatch]]:
    """The columns of a shard, and its record batches, read one at a time where that can be."""
    try:
        if path.suffix == ".arrow":
            reader = pa.ipc.open_file(pa.OSFile(str(path)))
            return reader.schema.names, map(reader.get_batch, range(reader.num_record_batches))
        table = pq.read_table(path)
        return table.column_names, iter(table.to_batches())
    except (pa.ArrowException, OSError) as error:
        kind = "Arrow" if path.suffix == ".arrow" else "parquet"
        raise ValueError(f"{str(path)!r} is no {kind} file that can be read: {error}") from error


def _check_sizes(sizes: np.ndarray, named: str, segment: Mapping[str, Any], first: int, *, several: bool) -> None:
    """Raise a ValueError unless rows have as many codes as a segment's shape says, or `several` times so many."""
    length = int(np.prod(segment["shape"]))
    if "block_length" in segment:
        block = segment["block_length"]
        if (odd := np.flatnonzero((sizes < block) | (sizes > length) | (sizes % block > 0))).size:
            raise ValueError(
                f"{named} has {sizes[odd[0]]} codes in row {first + odd[0]}, not whole blocks of {block} up to "
                f"{length}"
            )
        return
    fits = (sizes > 0) & (sizes % length == 0) if several else sizes == length
    if not fits.all():
        row = int(np.flatnonzero(~fits)[0])
        multiple = "a multiple of " if several else ""
        raise ValueError(f"{named} has {sizes[row]} codes in row {first + row}, not {multiple}{length}")


def _check_codes(column: pa.Array, named: str, vocab_size: int) -> CodeChunk:
    """The codes of a column, after checks, and where each row's begin."""
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not pa.types.is_integer(kind.value_type):
        raise ValueError(f"{named} has {kind}; codes must be lists of integers")
    values = column.flatten()
    if column.null_count or values.null_count:
        raise ValueError(f"{named} has missing codes")
    span = pc.min_max(values).as_py() if len(values) else {"min": 0, "max": 0}
    if span["min"] < 0 or span["max"] >= vocab_size:
        raise ValueError(f"{named} has codes from {span['min']} to {span['max']}; they must be in [0, {vocab_size})")
    sizes = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
    codes = values.to_numpy().astype(code_type(vocab_size).to_pandas_dtype())
    return CodeChunk(codes, np.concatenate([[0], np.cumsum(sizes)]))
