"""Pictures of a stream, decoded in the order in which they come."""

from typing import Any

import torch

from .image_reader import ImageReader
from .sample_stream import SampleStream


class ImageStream(SampleStream, ImageReader):
    """Pictures of an undecoded column of a `datasets.IterableDataset`, see [`~training.sample_stream.SampleStream`].

    Args:
        source: what tells the data from others ([`~training.table_files.stream_identity`]); None where nothing does.
        reading, options: those of [`~training.image_reader.ImageReader`].
    """

    noun = "picture"
    pictures = None  # in memory

    def __init__(self, *reading: Any, source: str | None = None, **options: Any) -> None:
        super().__init__(*reading, **options)
        self.source = source

    def _open(self, dataset: Any) -> None:
        self.begin(dataset, self.image_column, self.seed)

    def identity(self) -> dict[str, str]:
        """What tells these pictures from others, for the identity of a run."""
        source = {} if self.source is None else {"pictures": self.source}
        return {**source, "resize_mode": self.resize_mode, "interpolation": self.interpolation}

    def read(self, value: Any, position: int) -> torch.Tensor:
        """A picture, (3, resolution, resolution) uint8, with the crop and the flip of its position."""
        centering, mirrored = self._draw(position)
        picture = self._decode(value, centering)
        return picture.flip(-1) if mirrored else picture


def picture_stream(dataset: Any, column: str) -> Any:
    """A `datasets.IterableDataset` whose column of pictures is undecoded.

    Raises:
        ValueError: if the column isn't there, or can't be one.
    """
    from datasets import Image, Value

    features = dataset.features or dataset._resolve_features().features
    if column not in features:
        raise ValueError(f"column {column!r} is not in the data: it has {sorted(features)}")
    kind = features[column]
    plain = isinstance(kind, Value) and kind.dtype in ("binary", "large_binary")
    if not (isinstance(kind, Image) or plain or (isinstance(kind, dict) and "bytes" in kind)):
        raise ValueError(f"column {column!r} has the type {kind}; streamed pictures must be bytes of a picture file")
    return dataset.cast_column(column, Image(decode=False)) if isinstance(kind, Image) else dataset
