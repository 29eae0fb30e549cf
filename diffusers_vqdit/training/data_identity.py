"""What tells whether a dataset is still the same one, without decoding or reading all of it."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


def rows_fingerprint(dataset: Any, columns: Sequence[str], *, times: bool = False) -> str:
    """SHA-256 of columns of a `datasets.Dataset`: of all values, but of files and of bytes the names and sizes alone.

    Args:
        times: count a file that was written again as another one, too, whatever its size. The fingerprint is then one
            of this machine: that of a copy of the data is another.
    """
    digest = hashlib.sha256(json.dumps([len(dataset), list(columns)]).encode())
    if times:
        digest.update(json.dumps(sorted(file["filename"] for file in dataset.cache_files)).encode())
    for batch in dataset.select_columns(list(columns)).with_format("arrow").iter(100):
        for name in columns:
            digest.update(json.dumps(_plain(batch[name], times, in_memory=not dataset.cache_files)).encode())
    return digest.hexdigest()


def _plain(column: pa.ChunkedArray, times: bool, in_memory: bool) -> list[Any]:
    """A column's values as JSON has them."""
    kind = column.type
    if pa.types.is_struct(kind) and {"bytes", "path"} >= {field.name for field in kind}:
        fields = {field.name: _field(column, field.name) for field in kind}
        sizes = _plain(fields["bytes"], times, in_memory) if "bytes" in fields else [None] * len(column)
        paths = fields["path"].to_pylist() if "path" in fields else [None] * len(column)
        return [
            [size, file_identity(path, times) if size is None else path]
            for size, path in zip(sizes, paths, strict=True)
        ]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        if in_memory and times:  # no file's name tells of them
            return [value if value is None else hashlib.sha256(value).hexdigest() for value in column.to_pylist()]
        return pc.binary_length(column).to_pylist()
    return [repr(value) for value in column.to_pylist()]


def _field(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    return pc.struct_field(column, name)


def file_identity(path: str | None, times: bool) -> list[Any]:
    """Name and size of a file, and when it was written; of what is none here its path."""
    try:
        found = os.stat(path or "")
    except (OSError, ValueError):
        return [path]
    return [Path(str(path)).name, found.st_size, *([found.st_mtime_ns] if times else [])]
