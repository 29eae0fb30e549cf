"""Codes in place of the values that they stand for: wherever a segment takes a value, it takes its codes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..utils.checks import shown
from .segment_base import EncodedValue, SegmentProcessor, bucket_shape


def are_codes(segment: SegmentProcessor, value: Any) -> bool:
    """Whether what is passed for a segment is codes: an int64 tensor (B, *shape), or a list of such of one sample."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, torch.Tensor) and first.dtype == torch.int64 and not segment.given_only


def check_codes_dtype(segment: SegmentProcessor, argument: str, value: Any) -> None:
    """Raise a ValueError, which names the argument, where codes are integers of another type, or arrays."""
    first = value[0] if isinstance(value, list) and value else value
    if segment.given_only or segment.takes_integers or not isinstance(first, torch.Tensor | np.ndarray):
        return
    kind = str(first.dtype).removeprefix("torch.")
    ndim = len(segment.shape) + (first is value)
    if first.ndim == ndim and "int" in kind and kind != "uint8" and not are_codes(segment, value):
        pixels = "; pixels are floats in [0, 1]" if segment.takes_mask else ""
        raise ValueError(
            f"{argument} is {kind} of shape {tuple(first.shape)}, a {type(first).__name__}: codes must be int64 "
            f"tensors of shape {codes_shape(segment)}, such as torch.as_tensor(codes).long(){pixels}"
        )


def codes_shape(segment: SegmentProcessor) -> str:
    """The shape of a segment's codes, as error messages say it."""
    return "('B', n), n any length from 1 on" if segment.has_length else str(("B", *segment.shape))


def has_unknown(segment: SegmentProcessor, value: Any) -> bool:
    """Whether some of what is passed is to be filled in: codes that are the mask, or blanks of a text."""
    if not are_codes(segment, value):
        return segment.has_blanks(value)
    codes = value if isinstance(value, list) else [value]
    return any(isinstance(one, torch.Tensor) and bool((one == segment.vocab_size).any()) for one in codes)


def read_value(
    segment: SegmentProcessor, value: Any, unknown: bool = True, grids: Sequence[tuple[int, ...]] | None = None
) -> list:
    """One or several values, or their codes, as a list that is checked.

    Args:
        unknown: whether codes may be the mask, and texts have blanks.
        grids: shapes that a height and a width ask for, which codes may have beside the segment's own and those of its
            buckets; None where no size can be asked for.

    Raises:
        ValueError: naming the argument.
    """
    if not are_codes(segment, value):
        if not unknown:
            segment.check_whole(segment.argument, value)
        return segment.read(value)
    name, size = segment.argument, segment.vocab_size
    rows = value if isinstance(value, list) else list(value)
    fits = bool(rows) and all(isinstance(row, torch.Tensor) and row.dtype == torch.int64 for row in rows)
    if not fits or len({row.shape for row in rows}) > 1 or rows[0].ndim != len(segment.shape) or not rows[0].numel():
        got = f"{tuple(value.shape)}" if isinstance(value, torch.Tensor) else shown(value)
        raise ValueError(f"{name} must be int64 codes of shape {codes_shape(segment)}, got {got}")
    buckets = [tuple(bucket_shape(segment.shape, segment.entry, i)) for i in range(len(segment.buckets))]
    if not segment.has_length and tuple(rows[0].shape) not in [segment.shape, *buckets, *(grids or ())]:
        also = f" or of one of its grids {segment.buckets}" if buckets else ""
        also += ", or of the grid of height and width" if segment.has_size and grids is not None else ""
        raise ValueError(
            f"{name} must be int64 codes of shape {codes_shape(segment)}{also}, got {(len(rows), *rows[0].shape)}"
        )
    low, high = min(int(row.min()) for row in rows), max(int(row.max()) for row in rows)
    if low < 0 or high > (size if unknown else size - 1):
        raise ValueError(
            f"{name} must be codes in [0, {size}), or {size} where they are generated and unknown; got values from "
            f"{low} to {high}"
        )
    return rows


def encode_value(segment: SegmentProcessor, values: list) -> EncodedValue:
    """Codes of values that others are generated from, as [`read_value`] gives them; ready ones as they are."""
    if are_codes(segment, values):
        return segment.given_codes(torch.stack(values).to(segment.device()))
    return segment.encode_given(values)


def encode_one_each(segment: SegmentProcessor, values: list) -> EncodedValue:
    """[`encode_value`] of values that are to be one sample each, as likelihoods are of samples.

    Raises:
        ValueError: for what is so large that it makes several.
    """
    if not are_codes(segment, values):
        segment.check_single(values)
    return encode_value(segment, values)


def encode_partial_value(
    segment: SegmentProcessor, values: list, mask_image: torch.Tensor | None = None
) -> EncodedValue:
    """Codes of values of which a part is known; ready ones say themselves what is not."""
    if are_codes(segment, values):
        return EncodedValue(torch.stack(values).to(segment.device()))
    return segment.encode_partial(values, mask_image)
