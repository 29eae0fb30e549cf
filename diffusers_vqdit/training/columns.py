"""Columns of pictures, captions and labels: what they may hold, and labels as numbers."""

import logging
import re
from collections.abc import Iterable
from typing import Any

import torch

from ..schedulers.samplers import Generators, uniform
from ..utils.checks import shown
from ..utils.texts import tokenize_to_length, visible


logger = logging.getLogger(__name__)


def as_picture_column(dataset, column: str):
    """The dataset with a column of pictures as one of undecoded `datasets.Image`.

    Raises:
        ValueError: that names the column and its type, unless it is of bytes, paths, structs of them, or arrays.
    """
    from datasets import Image, Value

    feature, kind, accepted = dataset.features[column], dataset.data.schema.field(column).type, False
    if isinstance(feature, Image):
        accepted = True
    elif isinstance(feature, Value):
        accepted = feature.dtype in _BYTES + _PATHS
        # Image is cast to from the plain types alone.
        plain = {"string_view": "large_string", "binary_view": "large_binary"}.get(feature.dtype)
        if feature.dtype.startswith("fixed_size_binary"):
            accepted, plain = True, "large_binary"
        if plain is not None:
            dataset = dataset.cast_column(column, Value(plain))
    elif isinstance(feature, dict):
        known = {"bytes": (*_BYTES, "null"), "path": (*_PATHS, "null")}
        fields = {name: getattr(feature[name], "dtype", "") for name in known if name in feature}
        accepted = fields and all(
            dtype in known[name] or (name == "bytes" and dtype.startswith("fixed_size_binary"))
            for name, dtype in fields.items()
        )
    else:
        accepted = _array_depth(feature) in (2, 3)
    if not accepted:
        raise ValueError(
            f"column {column!r} has the type {kind}; pictures must be bytes of a "
            "picture file, paths, structs with 'bytes', 'path' or both, or arrays of (H, W) or (H, W, C) integers"
        )
    try:
        return dataset.cast_column(column, Image(decode=False))
    except Exception as error:  # of Arrow and numpy, for arrays that are ragged or out of range
        raise ValueError(f"column {column!r} has the type {kind}, and values that are no pictures: {error}") from error


_BYTES = ("binary", "large_binary", "binary_view")
_PATHS = ("string", "large_string", "string_view")


def _array_depth(feature: Any) -> int:
    """Dimensions of a column of arrays of integers; 0 for any other."""
    if hasattr(feature, "shape"):
        return len(feature.shape) if "int" in feature.dtype else 0
    depth = 0
    while hasattr(feature, "feature"):
        feature, depth = feature.feature, depth + 1
    return depth if re.fullmatch(r"u?int\d+", getattr(feature, "dtype", "") or "") else 0


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def check_captions(captions: Iterable[Any], column: str) -> None:
    """Raise a ValueError unless each caption is a string with some text, or a list of one or more of them.

    The message names the column, and the first rows whose caption is missing or of another type.
    """
    missing, wrong = [], []
    for row, value in enumerate(captions):
        texts = value if isinstance(value, list | tuple) else [value]
        if not texts or any(text is None for text in texts):
            missing.append(row)
        elif odd := [text for text in texts if not isinstance(text, str)]:
            wrong.append((row, odd[0]))
        elif not all(visible(text) for text in texts):
            missing.append(row)
    if wrong:
        kinds = sorted({type(value).__name__ for _, value in wrong})
        raise ValueError(
            f"column {column!r} has {len(wrong)} rows of the type {' and '.join(kinds)}, the first are rows "
            f"{[row for row, _ in wrong[:5]]} with {shown(wrong[0][1], 40)}; captions must be strings or lists of them"
        )
    if missing:
        raise ValueError(f"column {column!r}: {len(missing)} rows have no caption, the first are rows {missing[:5]}")


def caption_lists(captions: Iterable[Any], column: str) -> list[list[str]]:
    """The captions of each row, one or several, after [`check_captions`]."""
    captions = list(captions)
    check_captions(captions, column)
    return [[value] if isinstance(value, str) else list(value) for value in captions]


def draw_captions(
    captions: dict[str, list[list[str]]], rows: torch.LongTensor, generator: Generators = None
) -> list[str]:
    """One caption for each of `rows`: a column drawn evenly, then one of its texts there.

    `generator` may be a list with one a row.
    """
    wordings = list(captions.values())
    columns = (uniform(rows.shape, generator, rows.device) * len(wordings)).long().tolist()
    shares = uniform(rows.shape, generator, rows.device).tolist()
    chosen = [wordings[column][row] for column, row in zip(columns, rows.tolist(), strict=True)]
    return [texts[int(share * len(texts))] for texts, share in zip(chosen, shares, strict=True)]


def warn_of_cut(texts: list[str], tokenizer, length: int) -> None:
    """One warning, with the count, where texts have more than `length` tokens."""
    cut = 0
    for start in range(0, len(texts), 1024):
        counts = tokenize_to_length(tokenizer, texts[start : start + 1024], length)[2]
        cut += sum(count > length for count in counts)
    if cut:
        logger.warning(f"{cut} of {len(texts)} captions have more than max_length={length} tokens and are cut")


# ---------------------------------------------------------------------------------------------------------------------
# Labels


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
            names.append(str(value))
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
    for name in order if not id2label else [name for name in order if name in set(names)]:
        if name not in numbers:
            numbers[name], id2label[first] = first, name
            first += 1
    return torch.tensor([numbers[name] for name in names]), id2label
