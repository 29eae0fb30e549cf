"""Tables of samples in files: single ones, and all that a pattern matches, as `datasets` loads them."""

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..utils.checks import shown


logger = logging.getLogger(__name__)

# The loaders of `datasets` by the ending of a file. TEXT_LOADERS have paths of pictures, relative to their own folder.
LOADERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
TEXT_LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json"}


SPLIT_COLUMN = "split"  # of one table that has several splits


class MissingSplitError(ValueError):
    """The data has no split of the name asked for."""


class Splits(dict):
    """The splits of a source by name, and the folder that paths of pictures in their columns are relative to; of
    streams the source's name, and the builder of `datasets` that they are from."""

    folder: Path | None = None
    dataset_name = ""
    builder: Any = None


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


def picture_folder(files: Sequence[str]) -> Path | None:
    """The folder that paths of pictures in tables are relative to: that of the files, if they are texts in one."""
    folders = {Path(os.path.abspath(name)).parent for name in files}
    texts = all(Path(name).suffix.lower() in TEXT_LOADERS for name in files)
    return folders.pop() if texts and len(folders) == 1 else None


def with_paths(dataset: Any, column: str, folder: Path) -> Any:
    """The dataset with a column's paths, if it has some, as they are from everywhere."""
    if getattr(dataset.features[column], "dtype", None) not in ("string", "large_string"):
        return dataset

    def join(batch: dict[str, list]) -> dict[str, list]:
        return {column: [name if name is None else os.path.join(folder, name) for name in batch[column]]}

    return dataset.map(join, batched=True, desc="Paths")


def split_of(value: Any, row: int) -> str | None:
    """The name of a split in a column of them; None where nothing is said."""
    if isinstance(value, list | dict):
        raise ValueError(f"column 'split' has {shown(value, 40)} in row {row}; it must be the name of a split")
    return None if value == "" else value


def warn_of_unsaid(unsaid: int, count: int) -> None:
    """One warning where so many of all rows are of no split."""
    if unsaid:
        logger.warning(f"{unsaid} of {count} rows have nothing in the column 'split' and are left out")


@contextmanager
def loading(dataset_name: str, problem: str) -> Iterator[None]:
    """Name the data in what Arrow, `datasets` and the Hub raise, wrapped in one another, with the first reason."""
    try:
        yield
    except Exception as error:
        reasons: list[BaseException] = [error]
        while (cause := reasons[-1].__cause__) is not None:
            reasons.append(cause)
        told = ": ".join(dict.fromkeys(str(reason) for reason in reasons))
        raise ValueError(f"dataset_name={shown(dataset_name)} {problem}: {told}") from error
