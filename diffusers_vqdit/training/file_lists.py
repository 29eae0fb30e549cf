"""Lists, tables and tensors of any length in temporary files: mapped into memory, gone when nobody reads them."""

import heapq
import math
import mmap
import operator
import os
import pickle
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch


T = TypeVar("T")

ROWS_TOGETHER = 1000  # that are written and read at once
SORTED_TOGETHER = 20_000  # texts that are sorted in memory


def in_batches(items: Iterable[T], size: int | None = None) -> Iterator[list[T]]:
    """Lists of `size` of them, by default `ROWS_TOGETHER`."""
    items = iter(items)
    while batch := list(islice(items, size or ROWS_TOGETHER)):
        yield batch


class FileList(Sequence[T]):
    """A list of what can be pickled, in a file that has no name.

    Args:
        items: what is in it.
        cache_dir: where the file is, by default the cache of `datasets`; where that can't be written, the folder of
            temporary files.

    Raises:
        OSError: if there is no room for it.
    """

    def __init__(self, items: Iterable[T], cache_dir: str | os.PathLike | None = None) -> None:
        self.length, self.starts = 0, [0]
        with _temporary_file(cache_dir) as file:
            for batch in in_batches(items):
                with _saying_where(cache_dir):
                    pickle.dump(batch, file)
                self.length += len(batch)
                self.starts.append(file.tell())
            self._data = _mapped(file, cache_dir) if self.length else b""

    def _batch(self, number: int) -> list[T]:
        # Of this process's own, nobody else has the file.
        return pickle.loads(self._data[self.starts[number] : self.starts[number + 1]])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        batch, place = divmod(range(self.length)[operator.index(index)], ROWS_TOGETHER)  # no slices
        return self._batch(batch)[place]

    def __iter__(self) -> Iterator[T]:
        return self.part(0, self.length)

    def part(self, first: int, end: int) -> Iterator[T]:
        """The items from `first` to before `end`."""
        for number in range(first // ROWS_TOGETHER, -(-end // ROWS_TOGETHER)):
            before = number * ROWS_TOGETHER
            yield from self._batch(number)[max(first - before, 0) : end - before]


def sorted_texts(texts: Iterable[str], cache_dir: str | os.PathLike | None = None) -> Iterator[str]:
    """Texts in order, of which a few are in memory at a time. All are read before it returns."""
    runs, ends = map(sorted, in_batches(texts, SORTED_TOGETHER)), [0]
    first = next(runs, [])
    if len(first) < SORTED_TOGETHER:
        return iter(first)

    def one_after_the_other() -> Iterator[str]:
        for run in chain([first], runs):
            ends.append(ends[-1] + len(run))
            yield from run

    together = FileList(one_after_the_other(), cache_dir)  # a file for each would be more than may be open
    return heapq.merge(*(together.part(*span) for span in pairwise(ends)))


def sorted_paths(paths: Iterable[str], cache_dir: str | os.PathLike | None = None) -> Iterator[str]:
    """[`sorted_texts`] of paths, in the order of `Path`: folder by folder."""
    keys = (path_key(path) for path in paths)
    return (key.replace("\0", os.sep) for key in sorted_texts(keys, cache_dir))


def ending(path: str) -> str:
    """As `Path(path).suffix`, which keeps some memory for each name that it is asked for, in lower case."""
    name = os.path.basename(path)
    dot = name.rfind(".")
    return name[dot:].lower() if 0 < dot < len(name) - 1 else ""


def path_key(path: str) -> str:
    """A text for each path, in the order of which paths are sorted. No name has the character that is before all."""
    return path.replace(os.sep, "\0")


def mapped_table(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, cache_dir: str | os.PathLike | None = None
) -> pa.Table:
    """A table of record batches, whose values are in a file that has no name.

    Raises:
        OSError: if there is no room for it.
    """
    with _temporary_file(cache_dir) as file:
        writer = pa.ipc.new_stream(file, schema)
        for batch in batches:
            with _saying_where(cache_dir):
                writer.write_batch(batch)
        with _saying_where(cache_dir):
            writer.close()
        return pa.ipc.open_stream(pa.py_buffer(_mapped(file, cache_dir))).read_all()


def in_file(shape: Sequence[int], dtype: type[np.generic]) -> torch.Tensor:
    """A tensor in a temporary file that goes with it, so that its pages need not stay in memory.

    Raises:
        OSError: if there is no room for it.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with tempfile.TemporaryFile() as file:
        try:
            if hasattr(os, "posix_fallocate"):  # else a full disk would end the process when a page is written
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_numpy(np.memmap(file, dtype, "w+", shape=tuple(shape)))
        except OSError as error:
            raise OSError(
                f"a temporary file of {size / 1e6:,.0f} MB could not be written to {tempfile.gettempdir()!r} "
                f"({error}); TMPDIR says where"
            ) from error


def _cache(cache_dir: str | os.PathLike | None) -> Path:
    from datasets import config

    return Path(cache_dir or config.HF_DATASETS_CACHE)


def _temporary_file(cache_dir: str | os.PathLike | None) -> Any:
    try:
        _cache(cache_dir).mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=_cache(cache_dir))
    except OSError:
        return tempfile.TemporaryFile()


def _mapped(file: Any, cache_dir: str | os.PathLike | None) -> mmap.mmap:
    with _saying_where(cache_dir):
        file.flush()
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@contextmanager
def _saying_where(cache_dir: str | os.PathLike | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"a temporary file of what is read could not be written to {str(_cache(cache_dir))!r}, or to "
            f"{tempfile.gettempdir()!r} where that can't be written ({error}); cache_dir and TMPDIR say where"
        ) from error
