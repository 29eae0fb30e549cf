"""Columns of codes on disk, of which rows are read when they are asked for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch


class CodeChunk(NamedTuple):
    """Some rows of a column: all their codes, and where each row's begin, with the end of the last."""

    values: np.ndarray
    offsets: np.ndarray


class CodeColumn:
    """One column of all shards, whose rows have some codes each, in memory or mapped into it.

    Args:
        chunks: in the order of the rows.

    Attributes:
        renamed (`np.ndarray`, *optional*): what each code is read as, int64.
    """

    renamed: np.ndarray | None = None

    def __init__(self, chunks: Sequence[CodeChunk]) -> None:
        self.chunks = list(chunks)
        self.ends = np.cumsum([len(chunk.offsets) - 1 for chunk in self.chunks])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _found(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, CodeChunk, np.ndarray]]:
        """Which of `rows` a chunk has, the chunk, and their numbers in it."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows={rows.tolist()} must be in [0, {len(self)})")
        owners = np.searchsorted(self.ends, rows, side="right")
        for owner in np.unique(owners).tolist():
            places = np.flatnonzero(owners == owner)
            yield places, self.chunks[owner], rows[places] - (self.ends[owner - 1] if owner else 0)

    def sizes(self, rows: np.ndarray | None = None) -> np.ndarray:
        """How many codes each of `rows` has, (B,) int64; by default each of all."""
        if rows is None:
            return np.concatenate([np.diff(chunk.offsets) for chunk in self.chunks])
        found = np.empty(len(rows), np.int64)
        for places, chunk, local in self._found(rows):
            found[places] = chunk.offsets[local + 1] - chunk.offsets[local]
        return found

    def read(self, rows: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        """Codes (B, length) int64 of `rows`, from each row's `starts` (B,) on."""
        found = np.empty((len(rows), length), np.int64)
        for places, chunk, local in self._found(rows):
            first = chunk.offsets[local] + starts[places]
            found[places] = chunk.values[first[:, None] + np.arange(length)]
        return found if self.renamed is None else self.renamed[found]


class LoadedCodes(Mapping[str, torch.Tensor]):
    """Whole columns by segment, as tensors; each is read into memory when it is asked for."""

    def __init__(self, names: Sequence[str], load: Callable[[str, str], torch.Tensor], suffix: str) -> None:
        self.names, self.load, self.suffix = list(names), load, suffix

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.load(name, self.suffix)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
