"""Rows with several texts as several rows with one: token ids have lengths of their own, and a row has one length."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from .columns import CaptionColumn


def one_text_a_row(dataset: Any, columns: Iterable[str]) -> tuple[Any, dict[str, list[int]]]:
    """A dataset in which a row stands for each of the texts that it has in some columns, and for each text of one with
    each of another; nothing is copied.

    Args:
        dataset: a `datasets.Dataset`.
        columns: of texts, or of lists of them.

    Returns:
        the dataset, and which text of its list a row is for, by column; none where all rows have one.
    """
    names = list(dict.fromkeys(columns))
    counts = {name: np.fromiter(map(len, CaptionColumn(dataset, name)), np.int64) for name in names}
    several = {name: sizes for name, sizes in counts.items() if sizes.max() > 1}
    if not several:
        return dataset, {}
    turns = np.prod(list(several.values()), axis=0)  # (N,) rows for each
    rows = np.arange(len(turns)).repeat(turns)
    turn = np.arange(len(rows)) - (turns.cumsum() - turns)[rows]
    places = {}
    for name, sizes in reversed(several.items()):  # the last column's texts change first
        turn, places[name] = np.divmod(turn, sizes[rows])
    return dataset.select(rows), {name: places[name].tolist() for name in several}
