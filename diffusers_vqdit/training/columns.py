"""Columns of captions on disk: their texts, numbered, and how many are cut. What they may hold stands in ``utils``."""

import copy
import hashlib
import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..utils.texts import check_captions, cut_texts, texts_of


logger = logging.getLogger(__name__)

READ_ROWS = 1000  # of captions at a time


class CaptionColumn(Sequence[list[str]]):
    """A column of captions, one or several a row, read from the Arrow files of `datasets` each time.

    Raises:
        ValueError: if a row has none ([`~utils.texts.check_captions`]).
    """

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset.select_columns(column).with_format("arrow"), column
        check_captions(self._values(), column)

    def _values(self) -> Iterator[Any]:
        for batch in self.dataset.iter(READ_ROWS):
            yield from batch[self.column].to_pylist()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: Any) -> Any:
        return texts_of(self.dataset[row][self.column][0].as_py())

    def __iter__(self) -> Iterator[list[str]]:
        return map(texts_of, self._values())

    def take(self, rows: Sequence[int]) -> "CaptionColumn":
        """That of some rows (N,)."""
        if len(rows) == len(self):
            return self
        taken = copy.copy(self)
        taken.dataset = self.dataset.select(rows)
        return taken


class Texts(Iterable[str]):
    """All texts of columns of captions, one column after the other, read anew each time."""

    def __init__(self, columns: Sequence[Iterable[list[str]]]) -> None:
        self.columns = columns
        self.count = sum(len(texts) for column in columns for texts in column)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        return texts_in_order(self.columns)


def texts_in_order(columns: Iterable[Iterable[list[str]]]) -> Iterator[str]:
    """All texts of columns, one column after the other."""
    return (text for column in columns for texts in column for text in texts)


def number_texts(columns: Sequence[Iterable[list[str]]]) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Number the texts of columns, equal ones alike and in the order in which they come first, without keeping them.

    Returns:
        for each column the numbers of its texts, one row's after the other's, and (N + 1,) where each row's begin and
        end there; and of all texts, in this order, whether one is there for the first time.
    """
    digests, sizes = bytearray(), []
    for column in columns:
        sizes.append(array("q", [0]))
        for texts in column:
            sizes[-1].append(len(texts))
            for text in texts:
                digests += hashlib.blake2b(text.encode(), digest_size=16).digest()
    # Those of 128 bits tell texts apart, however many.
    keys = np.frombuffer(digests, "<u8").reshape(-1, 2)
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    numbers = np.empty(len(first), np.int64)
    numbers[first.argsort()] = np.arange(len(first))
    is_first = np.zeros(len(keys), bool)
    is_first[first] = True
    bounds = [np.cumsum(np.frombuffer(own, np.int64)) for own in sizes]
    parts = np.split(numbers[inverse.reshape(-1)], np.cumsum([own[-1] for own in bounds])[:-1])
    return list(zip(parts, bounds, strict=True)), is_first


def warn_of_cut(texts: Iterable[str], tokenizer, length: int, argument: str = "max_length") -> None:
    """One warning, with the count, where texts have more than `length` tokens; `argument` is what says it."""
    if warning := cut_texts(texts, tokenizer, length, argument):
        logger.warning(warning)
