"""Labels of a dataset's column as numbers."""

from collections.abc import Iterable
from typing import Any

import torch

from .checks import shown
from .texts import visible


def label_names(values: Iterable[Any], column: str, feature: Any = None) -> tuple[list[str], list[str]]:
    """The name of each row's label, and all names in the order of their numbers.

    Args:
        values: strings or integers; with a `ClassLabel`, its integers.
        column: the column's name, for messages.
        feature: the column's feature. A `ClassLabel`'s names keep their order; others are sorted, integers as numbers.

    Raises:
        ValueError: for labels that are missing, of another type, or have white space around them; it names the rows.
    """
    known = list(feature.names) if hasattr(feature, "int2str") else None
    same: dict[str, str] = {}  # of many equal names one, as each takes memory
    names, wrong = [], []
    for row, value in enumerate(values):
        if known is not None and isinstance(value, int) and 0 <= value < len(known):
            value = known[value]
        elif known is not None or (isinstance(value, float) and not value.is_integer()):
            wrong.append((row, value))
            continue
        elif isinstance(value, float):  # integers beside a missing one
            value = int(value)
        if isinstance(value, int) or (isinstance(value, str) and value and value == visible(value)):
            names.append(same.setdefault(str(value), str(value)))
        else:
            wrong.append((row, value))
    if wrong:
        raise ValueError(
            f"column {column!r}: {len(wrong)} rows have no label that can be used, the first are "
            f"{', '.join(f'row {row} with {shown(value, 40)}' for row, value in wrong[:5])}; labels are strings "
            "without white space around them and invisible characters, composed (NFC), or integers"
        )
    if known is not None:
        return names, known
    found = set(names)
    numbers = all(name.removeprefix("-").isdecimal() for name in found)
    return names, sorted(found, key=(lambda name: (int(name), name)) if numbers else None)


def encode_labels(
    values: Iterable[Any],
    column: str,
    feature: Any = None,
    id2label: dict[int, str] | None = None,
    *,
    size: int = 0,
    comma_names: bool = False,
) -> tuple[torch.Tensor, dict[int, str]]:
    """Labels as numbers (N,) int64, and the names of all numbers.

    Args:
        values, column, feature: as in [`label_names`].
        id2label: the known numbers and names, such as a pretrained pipeline's. Names that it lacks are added.
        size: how many numbers are taken, where more are than have names. Without any name, labels that are such
            numbers are taken as they are.
        comma_names: whether a known name with commas is several, as in DiT's pipelines. Whole names come first.
    """
    names, order = label_names(values, column, feature)
    id2label = dict(id2label or {})
    if not id2label and size > 1 and all(name.isdecimal() and int(name) < size for name in order):
        id2label = {int(name): name for name in order}
    numbers = {}
    if comma_names:
        numbers = {part.strip(): number for number, name in id2label.items() for part in name.split(",")}
    numbers |= {name: number for number, name in id2label.items()}
    first = max([size - 1, *id2label]) + 1 if id2label else 0
    there = set(names)
    for name in order if not id2label else [name for name in order if name in there]:
        if name not in numbers:
            numbers[name], id2label[first] = first, name
            first += 1
    return torch.tensor([numbers[name] for name in names]), id2label
