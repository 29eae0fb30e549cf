"""Pictures of a stream that are each encoded once: decoded in order, from files that are read as they come."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from ..pipelines.image_segment import ImageReader
from ..utils.distributed import from_main_process
from .image_dataset import ImageDataset
from .row_stream import POSITION, RowStream


class StreamedImages(ImageDataset):
    """Pictures of the rows of a [`~training.row_stream.RowStream`], for
    [`~training.picture_tensors.encode_pictures`]; they aren't kept, nor read in another order.

    Args:
        stream: that has the files.
        dataset: what it lists of its rows.
        reading, options: those of [`~training.image_dataset.ImageDataset`].
    """

    def __init__(self, stream: RowStream, dataset: Any, *reading: Any, **options: Any) -> None:
        self.stream = stream
        super().__init__(dataset, *reading, **options)

    def _open(self, dataset: Any) -> None:
        content = json.dumps([self.stream.identity, self.image_column])
        # That of one process: others may have copies that were written at other times.
        self.source = from_main_process(hashlib.sha256(content.encode()).hexdigest())
        self.places = dataset.select_columns(POSITION).with_format("numpy")
        self.pictures, self.rows = None, range(len(dataset))
        self.column: Any = {}  # by row

    def __len__(self) -> int:
        return len(self.rows)

    def with_files(self, batches: Iterable[list[int]]) -> Iterator[tuple[list[int], Any]]:
        """Lists of rows that follow one another, each with their undecoded values by row."""
        batches = list(batches)

        def positions() -> Iterator[int]:
            for rows in batches:
                yield from self.places[rows[0] : rows[-1] + 1][POSITION].tolist()

        files = self.stream.files(positions(), {self.image_column: ImageReader})
        for rows in batches:
            yield rows, dict(zip(rows, files, strict=False))

    def take_files(self, files: Any) -> None:
        self.column = files

    def identity(self) -> dict[str, str]:
        """What tells these pictures from others: their files' names, sizes and times, or the revision."""
        return {"pictures": self.source, "resize_mode": self.resize_mode, "interpolation": self.interpolation}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stream": None, "places": None}  # processes that read are handed the files
