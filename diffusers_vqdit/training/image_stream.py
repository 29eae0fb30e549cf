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

    noun, feature = "picture", "Image"
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
        """A picture, (C, resolution, resolution) uint8, with the crop and the flip of its position."""
        centering, mirrored = self._draw(position)
        picture = self._decode(value, centering)
        return picture.flip(-1) if mirrored else picture
