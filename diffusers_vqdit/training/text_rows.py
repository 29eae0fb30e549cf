"""Rows with several texts as several rows with one: token ids have lengths of their own, and a row has one length."""

import itertools
from collections.abc import Iterable
from typing import Any

from ..utils.texts import caption_lists


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
    counts = [[len(texts) for texts in caption_lists(dataset[name], name)] for name in names]
    several = [index for index, sizes in enumerate(counts) if max(sizes) > 1]
    if not several:
        return dataset, {}
    turns = [
        (row, *places)
        for row in range(len(dataset))
        for places in itertools.product(*(range(counts[index][row]) for index in several))
    ]
    rows, *places = map(list, zip(*turns, strict=True))
    return dataset.select(rows), {names[index]: own for index, own in zip(several, places, strict=True)}
