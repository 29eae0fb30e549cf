"""Tables of samples in files: single ones, and all that a pattern matches, as `datasets` loads them."""

import copy
import glob
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..utils.checks import shown
from ..utils.distributed import from_all_processes, from_main_process
from .data_identity import file_identity


logger = logging.getLogger(__name__)

# The loaders of `datasets` by the ending of a file. TEXT_LOADERS have paths of files, relative to their own folder.
LOADERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
TEXT_LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json"}


SPLIT_COLUMN = "split"  # of one table that has several splits
_SPLIT_ROWS = 10_000  # of that column, that are read at once


class MissingSplitError(ValueError):
    """The data has no split of the name asked for."""


class Splits(dict):
    """The splits of a source by name, and the folder that paths of files in their columns are relative to; of
    streams the source's name, and the builder of `datasets` that they are from."""

    folder: Path | None = None
    dataset_name = ""
    builder: Any = None
    names: list[str] | None = None  # once they are known, see [`split_names`]


def find_table_files(dataset_name: str) -> list[str]:
    """The files of tables that a name means: one that is there, or all that a pattern such as ``data/*.tar`` matches,
    in order. Empty where it is another kind of name.

    Raises:
        ValueError: for a file that isn't there, a pattern that matches none, or files of several kinds.
    """
    kinds = {**LOADERS, **TEXT_LOADERS}
    path = Path(dataset_name)
    if path.is_dir():
        return []
    if path.is_file() or (path.suffix.lower() in kinds and not glob.has_magic(dataset_name)):
        files = [dataset_name]
    elif glob.has_magic(dataset_name):
        files = sorted(name for name in glob.glob(dataset_name, recursive=True) if os.path.isfile(name))
        if not files:
            raise ValueError(f"dataset_name={shown(dataset_name)} matches no file")
    else:
        return []
    if not path.is_file() and files == [dataset_name]:
        raise ValueError(f"dataset_name={shown(dataset_name)}: there is no such file")
    found = sorted({Path(name).suffix.lower() for name in files})
    if len(found) > 1 or found[0] not in kinds:
        raise ValueError(
            f"dataset_name={shown(dataset_name)} has files that end in {', '.join(map(repr, found))}; give files of "
            f"one kind of {', '.join(kinds)}, or pictures as --train_data_dir"
        )
    return files


def kinds_of_tables(folder: Path) -> set[str]:
    """The endings of the files of tables below a folder."""
    return {path.suffix.lower() for path in folder.rglob("*")} & {*LOADERS, *TEXT_LOADERS}


def csv_as_text(files: Sequence[str]) -> dict[str, Any]:
    """The arguments with which `datasets` reads tables of texts as they stand, an empty field alone for a missing one:
    it would make ``01`` and ``1`` one number, and ``None`` no caption."""
    import pandas as pd
    from datasets import Features, Value

    names: dict[str, Any] = {}
    for file in files:
        try:
            columns = pd.read_csv(file, nrows=0, index_col=False).columns
            first = pd.read_csv(file, nrows=1, dtype=str)
        except (OSError, ValueError):
            return {}  # no table: `datasets` says why
        if not isinstance(first.index, pd.RangeIndex):  # it would take the first column for the rows' names
            raise ValueError(
                f"{shown(file)}: the first row has more fields than the header's {len(columns)}, "
                f"{', '.join(map(repr, columns))}; a text with commas stands between quotes"
            )
        names |= dict.fromkeys(columns)
    features = Features({name: Value("string") for name in names})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


def folder_of_paths(files: Sequence[str]) -> Path | None:
    """The folder that paths of files in tables are relative to: that of the files, if they are texts in one."""
    folders = {Path(os.path.abspath(name)).parent for name in files}
    texts = all(Path(name).suffix.lower() in TEXT_LOADERS for name in files)
    return folders.pop() if texts and len(folders) == 1 else None


def with_paths(dataset: Any, column: str, folder: Path) -> Any:
    """The dataset with a column's paths, if it has some, as they are from everywhere."""
    if getattr(dataset.features[column], "dtype", None) not in ("string", "large_string"):
        return dataset

    def joined(name: str | None) -> str | None:
        if name is None:
            return None
        path = os.path.join(folder, name)
        # Tables made on Windows have backslashes.
        return path if "\\" not in name or os.path.exists(path) else os.path.join(folder, name.replace("\\", "/"))

    def join(batch: dict[str, list]) -> dict[str, list]:
        return {column: [joined(name) for name in batch[column]]}

    return dataset.map(join, batched=True, desc="Paths")


def split_of(value: Any, row: int) -> str | None:
    """The name of a split in a column of them, which may be of numbers; None where nothing is said."""
    if isinstance(value, list | dict):
        raise ValueError(f"column 'split' has {shown(value, 40)} in row {row}; it must be the name of a split")
    return None if value is None or value == "" else str(value)


def is_by_column(splits: Splits) -> bool:
    """Whether splits are streamed, and one table whose column ``split`` says which row is of which."""
    if splits.builder is None or len(splits) != 1:
        return False
    return SPLIT_COLUMN in (next(iter(splits.values())).column_names or ())


def split_names(splits: Splits) -> list[str]:
    """The splits' names; of a streamed table with a column ``split`` those in it, which is read once for that, with a
    warning where rows are of none."""
    if splits.names is None:
        splits.names = sorted(map(str, splits))
        if is_by_column(splits):
            found: Counter[str | None] = Counter()
            with loading(f"dataset_name={shown(splits.dataset_name)} can't be read: column {SPLIT_COLUMN!r}"):
                stream = stream_of(splits.builder, splits.names[0], [SPLIT_COLUMN]).with_format("arrow")
                for table in stream.iter(_SPLIT_ROWS):
                    first = found.total()
                    found.update(split_of(one, first + n) for n, one in enumerate(table[SPLIT_COLUMN].to_pylist()))
            warn_of_unsaid(found[None], found.total())
            splits.names = sorted(name for name in found if name is not None)
    return splits.names


def warn_of_unsaid(unsaid: int, count: int) -> None:
    """One warning where so many of all rows are of no split."""
    if unsaid:
        logger.warning(f"{unsaid} of {count} rows have nothing in the column 'split' and are left out")


def check_schema(builder: Any, path: str, features: Mapping[str, Any], columns: Iterable[str]) -> None:
    """See by the schema of a parquet or Arrow file that it can be read as the first file is.

    Args:
        builder: of `datasets`, whose file it is, here or on the Hub.
        features: those of the first file.
        columns: that are asked for. Of Arrow files all are read.

    Raises:
        ValueError: if a column isn't there, is there twice, or is of a type that can't be cast; it names the file and
            the column.
    """
    from datasets import Features
    from datasets.table import table_cast
    from datasets.utils.file_utils import xopen

    parquet = builder.name == LOADERS[".parquet"]
    if not parquet and builder.name != LOADERS[".arrow"]:
        return
    try:
        with xopen(path, "rb") as file:
            schema = _parquet_schema(file) if parquet else _arrow_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{shown(path)}: {error}") from None
    if schema is None:
        return
    for name in columns if parquet else features:
        if schema.names.count(name) > 1:
            raise ValueError(f"{shown(path)} has several columns called {name!r}; they must have different names")
        if name not in schema.names:
            if parquet:  # of Arrow files `datasets` fills in missing values
                raise ValueError(f"column {name!r} is not in {shown(path)}, which has {schema.names}")
            continue
        wanted = Features({name: features[name]}).arrow_schema
        try:
            table_cast(schema.empty_table().select([name]), wanted)
        except (pa.ArrowException, TypeError, ValueError):
            raise ValueError(
                f"column {name!r} has the type {schema.field(name).type} in {shown(path)}, which can't be read as "
                f"that of the first file, {wanted.field(name).type}"
            ) from None
    if not parquet and (more := [name for name in schema.names if name not in features]):
        raise ValueError(f"column {more[0]!r} is in {shown(path)} and not in the first file")


def check_files(splits: Splits, split: str, features: Mapping[str, Any], columns: Sequence[str]) -> None:
    """[`check_schema`] of each file of a split of streams that lies here; the Hub's are opened when they are read."""
    for path in splits.builder.config.data_files[split]:
        if Path(path).is_file():
            with loading(f"dataset_name={shown(splits.dataset_name)} can't be read"):
                check_schema(splits.builder, path, features, columns)


def compare_files(splits: Splits, split: str) -> None:
    """See that all processes, which must call it, read the same files of a split of streams: by the names and sizes of
    those that lie here, which may be copies on several machines, and the revision of a repository.

    Raises:
        ValueError: on all processes, if one reads others than the first.
    """
    files = splits.builder.config.data_files[split]
    digest = hashlib.sha256(json.dumps(_files_identity(files, times=False)).encode()).hexdigest()
    found = from_all_processes((digest, len(files), files[0]))
    for rank, (other, count, first) in enumerate(found):
        if other != found[0][0]:
            raise ValueError(
                f"dataset_name={shown(splits.dataset_name)}: the processes read different files of the split "
                f"{split!r}: process 0 has {found[0][1]} from {found[0][2]!r} on, process {rank} has {count} from "
                f"{first!r} on, of other names, sizes or revisions; start them again once the data stay as they are"
            )


def stream_identity(splits: Splits, split: str, column: str) -> str:
    """What tells a column of a split of streams from others, on all processes, which must call it: names, sizes and
    times of the first one's files, or the revision of a repository."""
    by_column = is_by_column(splits)
    source = str(next(iter(splits))) if by_column else split
    content = [splits.builder.name, column, _files_identity(splits.builder.config.data_files[source], times=True)]
    content += [split] if by_column else []
    return from_main_process(hashlib.sha256(json.dumps(content).encode()).hexdigest())


def _files_identity(files: Any, *, times: bool) -> list[Any]:
    content = [file_identity(path, times=times) for path in files]
    return content if all(Path(path).is_file() for path in files) else [*content, files.origin_metadata]


def stream_of(builder: Any, split: str, columns: Sequence[str]) -> Any:
    """A `datasets.IterableDataset` of columns of a split, of which others aren't read where the files allow it."""
    builder = copy.deepcopy(builder)  # of the same files, whatever has been added meanwhile
    if hasattr(builder.config, "columns"):  # parquet files are read by the column
        builder.config.columns = list(columns)
    return builder.as_streaming_dataset()[split].select_columns(list(columns))


def _parquet_schema(file: Any) -> pa.Schema | None:
    """None of a file without row groups, of which nothing is read."""
    found = pq.ParquetFile(file)
    return found.schema_arrow if found.metadata.num_row_groups else None


def _arrow_schema(file: Any) -> pa.Schema:
    try:
        return pa.ipc.open_stream(file).schema
    except pa.ArrowInvalid:
        return pa.ipc.open_file(file).schema


@contextmanager
def loading(problem: str) -> Iterator[None]:
    """Say the problem before what Arrow, `datasets` and the Hub raise, wrapped in one another, to the first reason."""
    try:
        yield
    except Exception as error:
        told, cause = str(error), error.__cause__
        while cause is not None:
            told += "" if str(cause) in told else f": {cause}"
            cause = cause.__cause__
        raise ValueError(f"{problem}: {told}") from error
