"""Buckets: a few sizes of different aspect ratios, to the nearest of which a picture is made."""

import math
from collections.abc import Sequence
from typing import Any

from .checks import check_integers, shown


def check_buckets(name: str, buckets: Any) -> list[list[int]]:
    """Buckets as a list of [height, width], no two of one aspect ratio: a picture must have one nearest bucket.

    Raises:
        ValueError: for what is none, by name.
    """
    if not isinstance(buckets, list | tuple) or not buckets:
        raise ValueError(f"{name}={shown(buckets)} must be a list of one or more [height, width]")
    found = [check_integers(f"{name}[{index}]", one, 1, 2) for index, one in enumerate(buckets)]
    for index, (height, width) in enumerate(found):
        for other in found[:index]:
            if height * other[1] == width * other[0]:
                raise ValueError(
                    f"{name} has {other} and {[height, width]}, which have one aspect ratio: leave one of them out"
                )
    return found


def check_bucket_steps(name: str, buckets: Sequence[Sequence[int]], steps: Sequence[int], what: str) -> None:
    """Raise a ValueError unless heights and widths are multiples of `steps`, the height and width of `what`."""
    for bucket in buckets:
        if any(size % step for size, step in zip(bucket, steps, strict=True)):
            near = [max(1, round(size / step)) * step for size, step in zip(bucket, steps, strict=True)]
            raise ValueError(
                f"{name}: {list(bucket)} must be a multiple of {list(steps)}, the size of {what}, such as {near}"
            )


def check_resolution(resolution: int, step: int) -> None:
    """Raise a ValueError unless a side of so many pixels is a multiple of a code's."""
    check_bucket_steps("resolution", [(resolution, resolution)], (step, step), "a code")


def nearest_bucket(size: Sequence[int], buckets: Sequence[Sequence[int]]) -> int:
    """The bucket whose aspect ratio is nearest, by its logarithm, to that of a size (height, width); of two that are
    as near, the first."""
    return min(range(len(buckets)), key=lambda index: _distance(size, buckets[index]))


def _distance(size: Sequence[int], bucket: Sequence[int]) -> float:
    return abs(math.log(size[0] * bucket[1]) - math.log(size[1] * bucket[0]))
