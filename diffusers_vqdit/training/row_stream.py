"""Rows that are read from a stream: what is small is listed once, files are read when they are encoded."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..pipelines.segment_base import MEASURED, ColumnReader
from ..utils.checks import shown
from ..utils.fingerprints import file_sha256
from ..utils.weight_files import replacing_file
from .data_identity import file_identity
from .parts import make_parts
from .table_files import (
    LOADERS,
    SPLIT_COLUMN,
    MissingSplitError,
    Splits,
    check_files,
    check_schema,
    compare_files,
    is_by_column,
    loading,
    split_of,
    stream_of,
    warn_of_unsaid,
)


# The column that says where a row's files are: in which of the source's shards, in the upper bits, and in which row.
POSITION = "position in the stream"
LISTED_FOLDER = "rows"  # in a run's folder, of what is listed
_ROW_BITS = 40
_FILE_ROWS, _PLAIN_ROWS = 100, 1000  # that are read at once, with files and without


class RowStream:
    """A split of parquet, Arrow or tar files, here or on the Hub, of which no copy is made but of what is small.

    Args:
        splits: streams, from [`~training.data.load_splits`].
        split: the split's name. Of one table with a ``split`` column, the rows that have it there.
        max_samples: take the first so many rows.

    Raises:
        ValueError: if there is no such split, or the files are of another kind.
    """

    def __init__(self, splits: Splits, split: str, max_samples: int | None = None) -> None:
        self.splits, self.dataset_name, self.builder = splits, splits.dataset_name, splits.builder
        if self.builder.name not in LOADERS.values():
            raise ValueError(
                f"streaming: dataset_name={shown(self.dataset_name)} is of the kind {self.builder.name!r}, which has "
                "no pictures or sounds but as files of their own; streams are of parquet, Arrow or webdataset's tars: "
                "leave streaming out"
            )
        first = str(next(iter(splits)))
        self.by_column = is_by_column(splits)
        if not self.by_column and split not in splits:
            raise MissingSplitError(f"split={split!r} is not in the data: it has {sorted(map(str, splits))}")
        self.split, self.max_samples = split, max_samples
        self.source = first if self.by_column else split
        self.num_shards = splits[self.source].num_shards
        self.features = {name: _plain(feature) for name, feature in splits[self.source].features.items()}
        self._streams: dict[tuple[str, ...], Any] = {}  # by columns

    @property
    def column_names(self) -> list[str]:
        return list(self.features)

    @property
    def identity(self) -> str:
        """What tells these rows from others: names, sizes and times of the files, or the revision of a repository."""
        files = {
            str(name): [[file_identity(path, times=True) for path in one], one.origin_metadata]
            for name, one in self.builder.config.data_files.items()
        }
        content = [self.builder.name, self.builder.config.name, files, self.source, self.split, self.max_samples]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def blank(self, column: str) -> Any:
        """A `datasets.Dataset` of no rows with a column."""
        from datasets import Dataset

        return Dataset(self._schema([column]).empty_table(), fingerprint="blank")

    def check(self, columns: Iterable[str]) -> None:
        """See that columns are in the data, and in each of its files that lies here.

        Raises:
            ValueError: if one isn't, or is in a later file of a type that can't be read as that of the first.
        """
        columns = list(columns)
        if missing := [name for name in columns if name not in self.features]:
            raise ValueError(f"column {missing[0]!r} is not in the data: it has {self.column_names}")
        check_files(self.splits, self.source, self.features, columns)

    def _schema(self, columns: Sequence[str], more: Mapping[str, str] | None = None) -> pa.Schema:
        """Of columns of the data, and `more` of these types."""
        from datasets import Features, Value

        kinds = {name: Value(kind) for name, kind in (more or {}).items()}
        return Features({name: self.features[name] for name in columns} | kinds).arrow_schema

    # -----------------------------------------------------------------------------------------------------------------
    # What is small

    def rows(self, folder: Path, columns: Iterable[str], files: Mapping[str, type[ColumnReader]]) -> Any:
        """The rows as a `datasets.Dataset` of files in a folder, with missing values in place of pictures and sounds.

        All processes must call it; they share the shards of the source. What was listed before a run was killed is
        taken.

        Args:
            columns: to be listed.
            files: columns of files, with what reads them: once now where it measures them, and later to encode them.

        Raises:
            ValueError: if there are no rows, or none of the split, or if processes find different files.
        """
        from datasets import Dataset, concatenate_datasets

        listed = [name for name in dict.fromkeys(columns) if name not in files]
        compare_files(self.splits, self.source)
        self.check([*listed, *files])
        measured = [name for name, reader in files.items() if reader.measure is not None]
        identity = hashlib.sha256(json.dumps([self.identity, listed, list(files), measured]).encode()).hexdigest()
        parts = make_parts(folder, identity, self.num_shards, partial(self._list, folder, listed, files))
        if self.by_column:
            found = sorted({name for part in parts for name in part["splits"]})
            if self.split not in found:
                raise MissingSplitError(f"split={self.split!r} is not in the data: it has {found}")
            if self.splits.names is None:  # else they were told with the names
                warn_of_unsaid(sum(part["unsaid"] for part in parts), sum(part["rows"] for part in parts))
        names = [name for part in parts for name in part["files"]]
        if not names:
            raise ValueError(f"split={self.split!r} has no rows")
        dataset = concatenate_datasets([Dataset.from_file(str(folder / name)) for name in names])
        return dataset if self.max_samples is None else dataset.select(range(min(self.max_samples, len(dataset))))

    def _list(
        self, folder: Path, columns: Sequence[str], files: Mapping[str, type[ColumnReader]], shards: list[int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """List the rows of some of the source's shards, each in a file of its own."""
        measures = {name: reader.measure for name, reader in files.items() if reader.measure is not None}
        own = {POSITION: "int64"} | {f"{name}{MEASURED}": "float64" for name in measures}
        schema = self._schema([*columns, *files], own)
        read = [*columns, *measures, *([SPLIT_COLUMN] if self.by_column and SPLIT_COLUMN not in columns else [])]
        taken, most = 0, self.max_samples
        for shard in shards:
            path, count, before = folder / f"rows-{shard:05d}.arrow", 0, taken
            splits: Counter[str | None] = Counter()
            with replacing_file(path) as unfinished, pa.ipc.new_stream(str(unfinished), schema) as writer:
                for table in self._tables(read, shard) if most is None or taken < most else ():
                    places = np.arange(count, count + len(table)) + (shard << _ROW_BITS)
                    if self.by_column:
                        said = [split_of(one, count + row) for row, one in enumerate(table[SPLIT_COLUMN].to_pylist())]
                        splits.update(said)
                        kept = np.array([one == self.split for one in said], dtype=bool)
                        table, places = table.filter(pa.array(kept)), places[kept]
                        count += len(said)
                    else:
                        count += len(table)
                    arrays: dict[str, Any] = {name: table[name] for name in columns}
                    arrays |= {name: pa.nulls(len(places), schema.field(name).type) for name in files}
                    for name, measure in measures.items():
                        found = [measure(row[name]) for row in _in_memory(table, {name: files[name]})]
                        arrays[f"{name}{MEASURED}"] = pa.array(found, pa.float64())
                    arrays[POSITION] = pa.array(places)
                    writer.write_table(pa.table([arrays[name] for name in schema.names], schema=schema))
                    taken += len(places)
                    if most is not None and taken >= most:
                        break
            if taken == before:
                path.unlink()
            made = {} if taken == before else {path.name: file_sha256(path)}
            unsaid = splits.pop(None, 0)
            yield shard, {"files": made, "rows": count, "unsaid": unsaid, "splits": sorted(map(str, splits))}

    # -----------------------------------------------------------------------------------------------------------------
    # Files

    def files(
        self, positions: Iterable[int], readers: Mapping[str, type[ColumnReader]]
    ) -> Iterator[dict[str, dict[str, Any]]]:
        """The undecoded values of columns of files at positions of a `POSITION` column, which must be in order; what
        lies between them is passed over, in whole shards of the source where it can be."""
        shard, start, count, rows = -1, 0, 0, None
        for position in positions:
            wanted, row = position >> _ROW_BITS, position & ((1 << _ROW_BITS) - 1)
            if wanted != shard:
                shard, start, count, tables = wanted, 0, 0, self._tables(list(readers), wanted)
            while row >= start + count:
                table = next(tables, None)
                if table is None:
                    raise ValueError(f"dataset_name={shown(self.dataset_name)}: files changed while they were read")
                start, count, rows = start + count, len(table), None
            rows = _in_memory(table, readers) if rows is None else rows
            yield rows[row - start]

    def _tables(self, columns: Sequence[str], shard: int) -> Iterator[pa.Table]:
        """The rows of one of the source's shards, some at a time; without columns tables of missing values."""
        from datasets import Features, Value
        from datasets.utils.file_utils import xopen

        path = self.builder.config.data_files[self.source][shard]
        problem = f"dataset_name={shown(self.dataset_name)} can't be read: columns {list(columns)} of {shown(path)}"
        with loading(problem):
            if not columns and self.builder.name == LOADERS[".parquet"]:  # which tells how many there are
                with xopen(path, "rb") as file:
                    count = pq.read_metadata(file).num_rows
                for start in range(0, count, _PLAIN_ROWS):
                    yield pa.table({POSITION: pa.nulls(min(_PLAIN_ROWS, count - start))})
                return
            values = {name: one.dtype for name, one in self.features.items() if isinstance(one, Value)}
            plain = [name for name, dtype in values.items() if "binary" not in dtype]
            columns = tuple(columns or [*plain, *self.features][:1])
            if columns not in self._streams:
                stream = stream_of(self.builder, self.source, columns).with_format("arrow")
                self._streams[columns] = stream.cast(Features({name: self.features[name] for name in columns}))
            stream = self._streams[columns].shard(num_shards=self.num_shards, index=shard)
            if Path(path).is_file():
                stream = stream.reshard()  # else Arrow reads ahead of what is asked for, row group by row group
            try:
                yield from stream.iter(_PLAIN_ROWS if set(columns) <= set(plain) else _FILE_ROWS)
            except (pa.ArrowException, KeyError, TypeError, ValueError):
                check_schema(self.builder, path, self.features, columns)  # of the Hub's files nothing has
                raise


def _plain(feature: Any) -> Any:
    """A feature of bytes of one length, or of views, as one of bytes or texts, which others can be cast from."""
    from datasets import Value

    dtype = feature.dtype if isinstance(feature, Value) else ""
    texts = {"string_view": "large_string"}
    return Value(texts.get(dtype, "large_binary")) if dtype.startswith(("fixed_size", *texts, "binary_v")) else feature


def _in_memory(table: pa.Table, readers: Mapping[str, type[ColumnReader]]) -> list[dict[str, dict[str, Any]]]:
    """Rows of columns of files, undecoded, as a dataset that lies on disk would give them."""
    from datasets import Dataset

    dataset = Dataset(table.select(list(readers)), fingerprint="rows")
    for name, reader in readers.items():
        dataset = reader.cast(dataset, name)
    return list(dataset)
