"""Datasets for training: where they come from, and their pictures as tensors."""

import glob
import hashlib
import logging
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pyarrow.dataset import ParquetFragmentScanOptions

from ..utils.checks import shown
from ..utils.decoding import as_picture_column, decode_image, place, to_bytes
from .folder_files import kind_of_folder
from .image_folder import PICTURES, read_image_folder
from .row_stream import RowStream
from .sound_folder import SOUNDS, read_sound_folder
from .table_files import (
    LOADERS,
    SPLIT_COLUMN,
    TEXT_LOADERS,
    MissingSplitError,
    Splits,
    csv_as_text,
    find_table_files,
    folder_of_paths,
    kinds_of_tables,
    loading,
    split_names,
    split_of,
    warn_of_unsaid,
    with_paths,
)


logger = logging.getLogger(__name__)

# Else each file is read whole before its first rows are there, and one without rows can't be read.
_PARQUET = {"fragment_scan_options": ParquetFragmentScanOptions(pre_buffer=False), "batch_size": 1000}
MAX_NAMED = 20  # skipped pictures that are named one by one
MAX_TRIED = 1000  # pictures or sounds in a row that can't be read


def load_splits(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    columns: Iterable[str] = (),
    cache_dir: str | None = None,
    output_dir: str | os.PathLike | None = None,
    streaming: bool = False,
) -> Splits:
    """All splits of a source, each a `datasets.Dataset`; the arguments are those of [`load_training_dataset`].

    Where the data comes as one table with a ``split`` column, its values are the splits.

    Args:
        streaming: read nothing before it is asked for: each split is a `datasets.IterableDataset`.
    """
    from datasets import load_dataset, load_dataset_builder

    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError(
            f"give either dataset_name or train_data_dir, got dataset_name={dataset_name!r} and "
            f"train_data_dir={train_data_dir!r}"
        )
    own, folder, builder = None if output_dir is None else Path(output_dir), None, None
    loaded: tuple[str | None, ...] = ()  # by `datasets`: its loader or the data's name, and the configuration
    place = Path(dataset_name or train_data_dir or "")
    columns = list(columns)
    kind = kind_of_folder(place, (PICTURES, SOUNDS), columns, own) if place.is_dir() else None
    if streaming and (dataset_name is None or kind is not None):
        raise ValueError(
            f"streaming needs dataset_name: a dataset of the Hub, or files of tables or tars; {shown(str(place))} has "
            "files of its own, which are read from where they are: leave streaming out"
        )
    table: dict
    if kind is SOUNDS:
        table = read_sound_folder(place, columns, output_dir=own, cache_dir=cache_dir)
    elif dataset_name is None:
        assert train_data_dir is not None
        if not Path(train_data_dir).is_dir():
            raise ValueError(f"train_data_dir={train_data_dir!r} is not a folder")
        table = read_image_folder(train_data_dir, columns, output_dir=own, cache_dir=cache_dir)
    elif kind is PICTURES:
        table = read_image_folder(dataset_name, columns, output_dir=own, cache_dir=cache_dir)
    elif files := find_table_files(dataset_name):
        suffix = Path(files[0]).suffix.lower()
        features = check_parquet(files, columns) if suffix == ".parquet" else None
        options: dict[str, Any] = {} if features is None else {"features": features, "columns": list(features)}
        options |= _PARQUET if suffix == ".parquet" else csv_as_text(files) if suffix == ".csv" else {}
        paths = [glob.escape(_without_magic(file, cache_dir)) for file in files]
        options["data_files"], loaded = paths, ({**LOADERS, **TEXT_LOADERS}[suffix],)
        problem, folder = f"is no {suffix} file that can be read", folder_of_paths(files)
    else:
        local = Path(dataset_name).is_dir()
        source = _without_magic(dataset_name, cache_dir) if local else dataset_name
        problem = f"is no {'folder' if local else 'dataset of the Hub'} that can be loaded"
        options = _PARQUET if local and kinds_of_tables(Path(dataset_name)) == {".parquet"} else {}
        loaded = (source, dataset_config_name)
    if loaded:
        with loading(f"dataset_name={shown(str(dataset_name))} {problem}"):
            if streaming:
                builder = load_dataset_builder(*loaded, cache_dir=cache_dir, **options)
                table = builder.as_streaming_dataset()
            else:
                table = load_dataset(*loaded, cache_dir=cache_dir, **options)

    splits = Splits(table if streaming else _by_column(table))
    splits.folder, splits.builder, splits.dataset_name = folder, builder, str(dataset_name)
    return splits


def _by_column(table: dict) -> dict:
    """The splits of one table with a column ``split``, or those that there are already."""
    everything = next(iter(table.values()))
    if SPLIT_COLUMN not in everything.column_names or len(table) > 1:  # several tables are splits already
        return dict(table)
    rows: dict[str | None, array[int]] = {}  # 8 bytes a row
    for row, value in enumerate(everything[SPLIT_COLUMN]):
        rows.setdefault(split_of(value, row), array("q")).append(row)
    warn_of_unsaid(len(rows.pop(None, ())), len(everything))
    return {value: everything.select(rows[value]) for value in rows}


def load_training_dataset(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    columns: Iterable[str] = (),
    image_column: str | Sequence[str] | None = None,
    audio_column: str | Sequence[str] | None = None,
    max_samples: int | None = None,
    cache_dir: str | None = None,
    output_dir: str | os.PathLike | None = None,
    streaming: bool = False,
):
    """Load a `datasets.Dataset` from a Hub name, local files of tables, or a folder of pictures.

    Args:
        dataset_name: a Hub dataset; a folder of pictures, or one that `datasets` can load, of parquet files or of
            webdataset's tars; the path of a ``.parquet``, ``.arrow``, ``.tar``, ``.csv``, ``.json`` or ``.jsonl``
            file, or a pattern of several, such as ``data/*.tar``. Paths of pictures and sounds in the last three
            are relative to their folder.
        dataset_config_name: the dataset's configuration, if it has several.
        train_data_dir: a folder of pictures, with metadata or class folders for captions and labels
            ([`~training.image_folder.read_image_folder`]).
        split: the split to take. Where the data comes as one table with a ``split`` column, its rows are selected; a
            source without the split asked for is refused.
        columns: the columns that must be there.
        image_column: the column that holds pictures, or several. It is read undecoded: decode it with
            [`decode_images`], which skips broken files.
        audio_column: the column that holds sounds, or several.
        max_samples: keep the first so many rows.
        cache_dir: where `datasets` keeps its cache.
        output_dir: the folder that the run writes; pictures in it are not read.
        streaming: a [`~training.row_stream.RowStream`] for [`~training.encoding.encode_dataset`] instead, which reads
            a dataset of the Hub, or files of parquet, Arrow or webdataset, as they are encoded, without a copy.

    Raises:
        ValueError: if neither or both sources are given, or if a column or the split is missing; the message lists
            the ones there are.
    """
    splits = load_splits(
        dataset_name=dataset_name,
        dataset_config_name=dataset_config_name,
        train_data_dir=train_data_dir,
        columns=[*columns, *_listed(image_column), *_listed(audio_column)],
        cache_dir=cache_dir,
        output_dir=output_dir,
        streaming=streaming,
    )
    files: dict[str, Any] = {"image_column": image_column, "audio_column": audio_column}
    return take_split(splits, split, columns=columns, **files, max_samples=max_samples)


def take_split(
    splits: Any,
    split: str,
    *,
    columns: Iterable[str] = (),
    image_column: str | Sequence[str] | None = None,
    audio_column: str | Sequence[str] | None = None,
    max_samples: int | None = None,
):
    """One of the splits that [`load_splits`] gives, with the columns that must be there checked."""
    image_columns, audio_columns = _listed(image_column), _listed(audio_column)
    if getattr(splits, "builder", None) is not None:
        stream = RowStream(splits, split, max_samples)
        stream.check([*columns, *image_columns, *audio_columns])
        for column in image_columns:
            as_picture_column(stream.blank(column), column)
        return stream
    if split not in splits:
        raise MissingSplitError(f"split={split!r} is not in the data: it has {sorted(map(str, splits))}")
    dataset = splits[split]
    if not len(dataset):
        raise ValueError(f"split={split!r} has no rows")
    _check_columns([*columns, *image_columns, *audio_columns], dataset.column_names)
    if (folder := getattr(splits, "folder", None)) is not None:
        for column in (*image_columns, *audio_columns):
            dataset = with_paths(dataset, column, folder)
    for column in image_columns:
        dataset = as_picture_column(dataset, column)
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    return dataset


def _check_columns(columns: Iterable[str], there: list[str]) -> None:
    for column in columns:
        if column not in there:
            raise ValueError(f"column {column!r} is not in the data: it has {there}")


def choose_validation_split(splits: Splits, validation_split: str | None) -> str:
    """The split to measure on, ``"none"`` for the training data: ``test`` by default, where there is one.

    Raises:
        MissingSplitError: if the one asked for is not there.
    """
    names = split_names(splits)
    if validation_split is None:
        if "test" in names:
            return "test"
        logger.warning(f"the data has no test split, only {names}: measuring on training data")
        return "none"
    if validation_split != "none" and validation_split not in names:
        raise MissingSplitError(
            f"validation_split={validation_split!r} is not in the data: it has {names}; 'none' "
            "measures on training data"
        )
    return validation_split


def check_parquet(files: Sequence[str], columns: Iterable[str] = ()):
    """The `datasets.Features` of the first parquet file's columns, where some can't be loaded and are left out.

    Raises:
        ValueError: if it is none or has several columns of one name, if none of the files has rows, or if one of
            `columns` is of a type that can't be loaded; it names the file, the column and the type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features

    named = f"dataset_name={shown(files[0])}"
    try:
        schema, rows = pq.read_schema(files[0]), any(pq.read_metadata(path).num_rows for path in files)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{named} is no parquet file that can be read: {error}") from error
    if not rows:
        raise ValueError(f"{named} has no rows")
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise ValueError(f"{named} has several columns called {twice[0]!r}; they must have different names")
    odd = {}
    for field in schema:
        try:
            Features.from_arrow_schema(pa.schema([field]))
        except ValueError:
            odd[field.name] = str(field.type)
    for name, kind in odd.items():
        message = f"{named}: column {name!r} has the type {kind}, which can't be read"
        if name in columns:
            raise ValueError(f"{message}; give it as strings, numbers, bytes, or lists or structs of them")
        logger.warning(f"{message}; it is left out")
    fields = [field for field in schema if field.name not in odd]
    return Features.from_arrow_schema(pa.schema(fields, schema.metadata)) if odd else None


def _listed(columns: str | Sequence[str] | None) -> list[str]:
    return [columns] if isinstance(columns, str) else list(columns or [])


def _without_magic(source: str, cache_dir: str | None) -> str:
    """A path of the same file or folder that `datasets` doesn't take for a pattern or a chain of URLs."""
    from datasets import config

    path = Path(os.path.abspath(source))
    if not glob.has_magic(str(path)) and "::" not in str(path) and "{" not in str(path):
        return str(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    # Times and sizes stand in the name, as the cache of what is read goes by the path.
    state = [f"{file} {file.stat().st_mtime_ns} {file.stat().st_size}" for file in files]
    name = hashlib.sha256("\n".join(state).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    link = Path(cache_dir or config.HF_DATASETS_CACHE) / "links" / (name + path.suffix)
    for file in files:  # a folder's link would be resolved
        here = link / file.relative_to(path) if path.is_dir() else link
        here.parent.mkdir(parents=True, exist_ok=True)
        try:
            here.symlink_to(file)
        except FileExistsError:
            pass  # made by an earlier run, or by another process
    return str(link)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def decode_images(
    dataset,
    image_column: str,
    resolution: int | tuple[int, int],
    *,
    resize_mode: str = "crop",
    interpolation: str = "lanczos",
    channels: int = 3,
) -> tuple[torch.Tensor, list[int]]:
    """Every picture of a dataset at once: those of [`decoded_batches`] as one tensor (N, C, height, width) uint8, and
    the row numbers it holds."""
    options: dict[str, Any] = {"resize_mode": resize_mode, "interpolation": interpolation, "channels": channels}
    pictures, rows = zip(*decoded_batches(dataset, image_column, resolution, **options), strict=True)
    return torch.cat(pictures), [row for own in rows for row in own]


def decoded_batches(
    dataset,
    image_column: str,
    resolution: int | tuple[int, int],
    *,
    batch_size: int = 64,
    resize_mode: str = "crop",
    interpolation: str = "lanczos",
    channels: int = 3,
) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Decode every picture of a dataset once, leaving out the broken ones with warnings that name them.

    Args:
        dataset: with an undecoded picture column.
        image_column: the column's name.
        resolution: height and width of the pictures in pixels; one number for both.
        batch_size: pictures that are read at once.
        resize_mode, interpolation, channels: as in [`decode_image`].

    Yields:
        uint8 tensors (B, C, height, width) and the row numbers they hold.

    Raises:
        ValueError: if no picture could be read.
    """
    column = dataset.select_columns(image_column)  # the others need not be read, or decoded

    def read(row: int) -> torch.Tensor:
        value = column[row][image_column]
        return to_bytes(decode_image(value, resolution, resize_mode, channels, interpolation))

    skipped = 0
    for batch in torch.arange(len(dataset)).split(batch_size):
        pictures, rows, problems = try_rows(read, lambda row: place(column[row][image_column], row), batch.tolist())
        for problem in problems[: max(0, MAX_NAMED - skipped)]:
            logger.warning(f"skipped picture {problem}")
        skipped += len(problems)
        if pictures:
            yield torch.stack(pictures), rows
    if skipped == len(dataset):
        raise ValueError(f"column {image_column!r}: none of the {len(dataset)} pictures could be read")
    if skipped:
        logger.warning(f"skipped {skipped} of {len(dataset)} pictures that could not be read")


def try_rows(
    read: Callable[[int], Any], placed: Callable[[int], str], rows: Iterable[int]
) -> tuple[list, list[int], list[str]]:
    """What `read` gives for each row, these rows, and where and why it raised for the others."""
    values, kept, problems = [], [], []
    for row in rows:
        try:
            value = read(row)
        except Exception as error:  # whatever a value raises: it is one of many
            problems.append(f"{_placed(placed, row)}: {type(error).__name__}: {error}")
            continue
        values.append(value)
        kept.append(row)
    return values, kept, problems


def _placed(placed: Callable[[int], str], row: int) -> str:
    try:
        return placed(row)
    except Exception:  # what can't be read may not tell its path either
        return f"in row {row}"
