"""The shapes of the codes of what is passed and generated: by height and width, by aspect ratio, or by ready codes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch

from ..models.segment_layers import segment_patch
from ..tasks import Task
from ..utils.buckets import nearest_bucket
from ..utils.checks import shown
from .ready_codes import are_codes, read_value
from .segment_base import SegmentProcessor, bucket_shape


Codes: TypeAlias = torch.LongTensor | dict[str, torch.LongTensor]


class SizesMixin:
    """The part of [`VQDiTPipeline`] that reads what is passed, and knows of which shape its codes are."""

    # The pipeline's
    transformer: Any
    _segments: Any
    _segments_of: Callable[[dict[str, tuple[int, ...]]], dict[str, SegmentProcessor]]
    _check_components: Callable[[str, str], None]

    def _read(
        self, passed: dict[str, Any], unknown: bool = True, sizes: tuple[int | None, int | None] | None = None
    ) -> dict[str, list]:
        """Lists of what was passed, by segment: texts, labels and codes that are checked, and pictures that are read;
        `unknown` is as [`read_value`] has it, and `sizes` the height and the width that they may be of."""
        segments, found = self._segments, {}
        for name, value in passed.items():
            grids: list | None = None if sizes is None else []
            if sizes not in (None, (None, None)) and segments[name].has_size and are_codes(segments[name], value):
                self._check_components(name, "a height or a width")
                patch = segment_patch(self.transformer.config.segments, name)
                grids = [segments[name].shape_of(*sizes, patch)]
            found[name] = read_value(segments[name], value, unknown, grids)
        return found

    def _shapes(
        self, task: Task, passed: dict[str, list], height: int | None, width: int | None, latents: Codes | None
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of pictures' codes, by segment, where they are not the transformer's own: of the generated ones, and
        of given ones that were trained on at several aspect ratios. By a size in pixels, or [`_bucket_shapes`].

        Raises:
            ValueError: for a size that no grid of codes makes, or where none is to be chosen.
        """
        if height is None and width is None:
            return self._bucket_shapes(task, passed, latents)
        segments, shapes = self._segments, {}
        sized = [name for name in task.generated if segments[name].has_size]
        ready = [name for name in task.given if segments[name].has_size and are_codes(segments[name], passed[name])]
        sized += [name for name in task.given if segments[name].buckets and not segments[name].tiled or name in ready]
        said = {name: size for name, size in (("height", height), ("width", width)) if size is not None}
        shown_sizes = " and ".join(f"{name}={shown(size)}" for name, size in said.items())
        if not sized:
            raise ValueError(f"{shown_sizes}: the task {str(task)!r} generates nothing that has a size")
        if tiled := [name for name in passed if segments[name].tiled]:
            raise ValueError(f"{shown_sizes}: what {tiled[0]!r} is made to has the size of what is passed, enlarged")
        for name in sized:
            self._check_components(name, shown_sizes)
            patch = segment_patch(self.transformer.config.segments, name)
            shapes[name] = segments[name].shape_of(height, width, patch)
            known = passed.get(name, [])
            if name in task.generated and are_codes(segments[name], known) and known[0].shape != shapes[name]:
                raise ValueError(
                    f"{segments[name].argument} has codes of shape {tuple(known[0].shape)}, but {shown_sizes} ask for "
                    f"{shapes[name]} each; give one of the two"
                )
        return shapes

    def _bucket_shapes(self, task: Task, passed: dict[str, list], latents: Codes | None) -> dict[str, tuple[int, ...]]:
        """Shapes of the codes of the bucket that what is passed belongs to, by segment that has buckets: as in the
        training, where the first picture of a row has chosen one for all.

        Raises:
            ValueError: if what is passed belongs to several.
        """
        segments = self._segments
        seen = [name for name in segments if name in passed and segments[name].buckets]
        if not seen or any(segments[name].tiled for name in passed):
            return {}
        grid = self._bucket_of(segments[seen[0]], passed[seen[0]])
        for name in seen[1:]:
            self._bucket_of(segments[name], passed[name])
        return self._shapes_on(grid, [name for name in task.segments if name in passed or latents is None])

    def _shapes_on(self, grid: Sequence[int], names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Shapes of the codes of the buckets nearest to a grid, by segment that has buckets."""
        segments, shapes = self._segments, {}
        for name in names:
            if buckets := segments[name].buckets:
                bucket = nearest_bucket(grid, buckets)
                shapes[name] = tuple(bucket_shape(segments[name].shape, segments[name].entry, bucket))
        return shapes

    def _by_grid(
        self, passed: dict[str, list], names: Iterable[str]
    ) -> list[tuple[list[int], dict[str, list], dict[str, SegmentProcessor]]]:
        """What is passed, sorted by the bucket that each sample's first picture belongs to, so that no sample depends
        on the others: for each bucket the samples' places, their values, and the segments, those of `names` on its
        grid. A single value is of all samples."""
        segments, size = self._segments, max(map(len, passed.values()))
        seen = [name for name in segments if name in passed and segments[name].buckets and not segments[name].tiled]
        if not seen:
            return [(list(range(size)), passed, segments)]
        first = passed[seen[0]]
        rows: dict[tuple[int, ...], list[int]] = {}
        for row in range(size):
            value = first[row : row + 1] if len(first) > 1 else first
            rows.setdefault(tuple(self._bucket_of(segments[seen[0]], value)), []).append(row)
        return [
            (
                places,
                {name: [one[row] for row in places] if len(one) > 1 else one for name, one in passed.items()},
                self._segments_of(self._shapes_on(grid, names)),
            )
            for grid, places in sorted(rows.items())
        ]

    @staticmethod
    def _bucket_of(segment: SegmentProcessor, values: list) -> list[int]:
        if not are_codes(segment, values):
            return segment.bucket_of(values)
        return segment.buckets[nearest_bucket(tuple(values[0].shape[:2]), segment.buckets)]


def in_order(places: Sequence[list[int]], parts: Sequence[Any]) -> Any:
    """The rows (b, ...) of several groups of samples, or one number for each group, in the samples' order."""
    if len(parts) == 1:
        return parts[0]
    rows = [
        one if isinstance(one, torch.Tensor) else torch.tensor([one] * len(own))
        for one, own in zip(parts, places, strict=True)
    ]
    order = torch.tensor([place for own in places for place in own]).argsort()
    return torch.cat(rows)[order.to(rows[0].device)]
