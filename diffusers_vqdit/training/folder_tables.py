"""Files and what is known of them as tables of `datasets`, split by split, which are never whole in memory."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from .file_lists import FileList, in_batches, mapped_table


logger = logging.getLogger(__name__)

LABEL_COLUMN = "label"  # as datasets' own folders call it
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_READ_ROWS = 100  # at once, of files that stand in the table themselves
_MAX_FIELDS = 1000  # of a table, and of a column's dictionaries: each has a place in every row
_NO_TYPE = (pa.ArrowException, OverflowError, TypeError, ValueError)

Sample = tuple[str, dict[str, Any]]  # a file's path, and what is known of it by column
_Field = tuple[tuple[str | None, ...], pa.DataType]  # its place in a column's values, and its type


class ClassFolders(Iterable[Sample]):
    """Files with their class folders as ``label``; with nothing where they don't lie in class folders of one depth, or
    where these are splits and nothing else.

    Attributes:
        classes: their names in order, if files have them.
    """

    def __init__(self, folder: Path, files: FileList[str]) -> None:
        self.files = files
        names, depths, tops = set(), set(), set()
        for path in files:
            place = _place(folder, path)
            names.add(_class_of(path))
            depths.add(len(place))
            tops.update(place[:-1][:1])  # no names of files, as many as they are
        only_splits = depths == {2} and tops <= SPLIT_FOLDERS.keys()
        self.classes = [] if len(names) < 2 or len(depths) > 1 or only_splits else sorted(names)

    def __iter__(self) -> Iterator[Sample]:
        return ((path, {LABEL_COLUMN: _class_of(path)} if self.classes else {}) for path in self.files)


def folder_tables(
    folder: Path,
    samples: Iterable[Sample],
    column: str,
    feature: Any,
    *,
    classes: Sequence[str] = (),
    columns: Iterable[str] = (),
    cache_dir: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """The splits of a folder as datasets: folders called train, test or validation at its top if all files lie in such
    ones, else all files as ``train``.

    Args:
        folder: which the files lie in.
        samples: files in order, which are gone through several times.
        column: of the files, beside those that `samples` have.
        feature: the column's.
        classes: the names of the classes, if ``label`` is one.
        columns: which must be usable; others are left out with a warning if they mix types.
        cache_dir: where the tables are, in files that have no names.

    Raises:
        ValueError: if one of `columns` mixes types.
    """
    tops = (_place(folder, path) for path, _ in samples)
    found = dict.fromkeys(SPLIT_FOLDERS.get(place[0]) if len(place) > 1 else None for place in tops)
    names = ["train"] if None in found else [str(name) for name in found]
    tables = {}
    for name in names:
        own = samples if None in found else _Split(folder, samples, name)
        types = {LABEL_COLUMN: (pa.int64(), False)} if classes else _column_types(own, columns)
        tables[name] = _table(own, types, column, feature, classes, cache_dir)
    return tables


class _Split(Iterable[Sample]):
    """The samples of a split's folders."""

    def __init__(self, folder: Path, samples: Iterable[Sample], name: str) -> None:
        self.folder, self.samples, self.name = folder, samples, name

    def __iter__(self) -> Iterator[Sample]:
        return (one for one in self.samples if SPLIT_FOLDERS[_place(self.folder, one[0])[0]] == self.name)


def _place(folder: Path, path: str) -> list[str]:
    return path.removeprefix(os.path.join(folder, "")).split(os.sep)


def _class_of(path: str) -> str:
    return _utf8(os.path.basename(os.path.dirname(path)))


# ---------------------------------------------------------------------------------------------------------------------
# Types of columns


class _ColumnType:
    """The type that a column's values have together, found batch by batch.

    Args:
        row: the first that has a value; those before have none.

    Attributes:
        kinds: which row has the first value of each of Python's types.
    """

    def __init__(self, row: int) -> None:
        self.kinds = {type(None).__name__: 0} if row else {}
        # Of batches that told more than those before; None is that of batches which have none.
        self.types: set[pa.DataType | None] = set()
        self.examples: list[Any] = []  # whose type is that of all, were they all there
        self.fields: set[_Field] = set()  # of these
        self.has_too_many = False  # fields for a table

    def add(self, values: list[Any], row: int) -> None:
        for index, value in enumerate(values, row):
            self.kinds.setdefault(type(value).__name__, index)
        if self.has_too_many:
            return
        values = _listed(values)
        try:
            fields = set(_fields(pa.infer_type(values)))
            if len({place for place, _ in self.fields | fields}) > _MAX_FIELDS:  # an array has them all in every row
                self.has_too_many = True
                return
            kind = pa.array(values).type
        except _NO_TYPE:
            self.examples += [] if None in self.types else values
            self.types.add(None)
            return
        if fields <= self.fields:
            return
        self.types.add(kind)
        for value in values:
            if not self.fields.issuperset(own := set(_fields(pa.infer_type([value])))):
                self.fields |= own
                self.examples.append(value)
        self.fields |= fields

    @property
    def is_one(self) -> bool:
        """Whether all batches have one type, or no values."""
        return len(self.types - {pa.null()}) < 2 and None not in self.types

    @property
    def has_lists(self) -> bool:
        """Whether some rows have one text, and others several."""
        return {"list", "str"} <= self.kinds.keys()

    @property
    def problem(self) -> str:
        """Why there is no type."""
        if self.has_too_many:
            return f"has dictionaries with more than {_MAX_FIELDS} different fields"
        kinds: dict[str, int] = {}
        for kind, row in self.kinds.items():
            kinds.setdefault("list" if self.has_lists and kind == "str" else kind, row)
        told = ", ".join(f"{kind} (first in row {row})" for kind, row in kinds.items())
        return f"has values of several types, or of one that a table can't have: {told}"

    def find(self) -> pa.DataType:
        """Raises one of `_NO_TYPE` where there is none."""
        if self.has_too_many:
            raise ValueError(self.problem)
        if self.is_one:
            return next(iter(self.types - {pa.null()}), pa.null())
        return pa.array(_listed(self.examples)).type


def _fields(kind: pa.DataType, place: tuple[str | None, ...] = ()) -> Iterator[_Field]:
    """What dictionaries and lists have in them, at any depth, and of which types; None is the place in a list."""
    if pa.types.is_list(kind):
        yield from _fields(kind.value_type, (*place, None))
    elif pa.types.is_struct(kind) and kind.num_fields:
        for field in kind:
            yield from _fields(field.type, (*place, field.name))
    else:
        yield place, kind


def _listed(values: list[Any], always: bool = False) -> list[Any]:
    """Texts as lists of one where others are lists."""
    if always or (any(isinstance(one, list) for one in values) and any(isinstance(one, str) for one in values)):
        return [[value] if isinstance(value, str) else value for value in values]
    return values


def _column_types(samples: Iterable[Sample], columns: Iterable[str]) -> dict[str, tuple[pa.DataType, bool]]:
    """The type of each column, and whether its texts are lists; tells which are left out as they have none."""
    found: dict[str, _ColumnType] = {}
    columns, start, more = list(columns), 0, None
    for batch in in_batches(samples):
        for name in dict.fromkeys(name for _, row in batch for name in row):
            if name in found or name in columns or len(found) < _MAX_FIELDS:
                found.setdefault(name, _ColumnType(start))
            else:
                more = more or name
        for name, column in found.items():
            column.add([row.get(name) for _, row in batch], start)
        start += len(batch)
    if more is not None:
        logger.warning(
            f"there are more than {_MAX_FIELDS} columns: {more!r} and other new ones from it on are left out"
        )
    types = {}
    for name, column in found.items():
        try:
            types[name] = column.find(), column.has_lists
            if not column.is_one:  # a value may not fit the type of all
                for batch in in_batches(samples):
                    pa.array(_listed([row.get(name) for _, row in batch], column.has_lists), types[name][0])
        except _NO_TYPE as error:
            types.pop(name, None)
            message = f"column {name!r} {column.problem}"
            if name in columns:
                raise ValueError(message) from error
            logger.warning(f"{message}; it is left out")
    return types


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def _table(
    samples: Iterable[Sample],
    types: dict[str, tuple[pa.DataType, bool]],
    column: str,
    feature: Any,
    classes: Sequence[str],
    cache_dir: str | os.PathLike | None,
) -> Any:
    """A `datasets.Dataset` of files and what is known of them."""
    from datasets import ClassLabel, Dataset, Features
    from datasets.fingerprint import generate_random_fingerprint

    kinds = {column: pa.struct({"bytes": pa.binary(), "path": pa.string()})}
    kinds |= {_utf8(name): kind for name, (kind, _) in types.items()}
    features = Features.from_arrow_schema(pa.schema(kinds))
    features[column] = feature
    if classes:
        features[LABEL_COLUMN] = ClassLabel(names=list(classes))
    schema = pa.schema(kinds).with_metadata(features.arrow_schema.metadata)
    places = {name: place for place, name in enumerate(classes)}

    def arrays(batch: list[Sample]) -> Iterator[pa.Array]:
        yield pa.array([_source(path) for path, _ in batch], kinds[column])
        for name, (kind, has_lists) in types.items():
            if classes:
                yield pa.array([places[row[name]] for _, row in batch], pa.int64())
            else:
                yield pa.array(_listed([row.get(name) for _, row in batch], has_lists), kind)

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in in_batches(samples):
            for some in in_batches(batch, len(batch) if all(_is_utf8(path) for path, _ in batch) else _READ_ROWS):
                yield pa.record_batch(list(arrays(some)), schema=schema)

    # Of the table itself it would be read whole.
    return Dataset(mapped_table(batches(), schema, cache_dir), fingerprint=generate_random_fingerprint())


def _source(path: str) -> dict[str, bytes | str | None]:
    if not _is_utf8(path):  # it can't stand in a table
        return {"bytes": Path(path).read_bytes(), "path": _utf8(path)}
    return {"bytes": None, "path": path}


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _utf8(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
