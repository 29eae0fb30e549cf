"""Pictures of a dataset as training reads them: decoded when they are asked for, in batches that the seed and the step
tell.

What a batch holds is a function of the seed, the step and the row of the global batch alone: however many processes
and workers read it, and wherever a run was resumed.
"""

import argparse
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..utils.decoding import as_picture_column, image_size, place
from ..utils.distributed import process_rank
from ..utils.fitting import cuts_much
from .checkpoints import fingerprint
from .data import MAX_NAMED, MAX_TRIED, choose_validation_split, decode_images, load_splits, take_split
from .data_identity import rows_fingerprint
from .image_reader import ImageReader, crop_warning
from .image_stream import ImageStream
from .sample_stream import as_dataset
from .table_files import stream_identity


logger = logging.getLogger(__name__)

CACHED_BYTES = 1 << 26  # all decoded pictures are kept in memory where they take no more
VALIDATION_PICTURES = (1024, 256)  # at most: of a split of their own, of the training split
LOOKED_AT = 1000  # pictures at most whose sizes tell what a crop cuts off

Problem = tuple[int, str]  # a row, and why it can't be read


class ImageDataset(ImageReader):
    """Pictures of a `datasets.Dataset`, each decoded, cropped and resized when it is asked for.

    An item's index is a row and its position in the order of the run, which its crop and flip are drawn from. In place
    of a picture that can't be read stands the next one that can. A small dataset is decoded once and kept; what can't
    be read is left out of it.

    Attributes:
        pictures (`torch.Tensor`, *optional*): all of them, (N, C, resolution, resolution) uint8, where they are kept.
        rows (`Sequence[int]`): those of the dataset that it has.

    Raises:
        ValueError: if no picture of a small dataset, or none of the first thousand of another, can be read.
    """

    def _open(self, dataset: Any) -> None:
        self.column = dataset.select_columns(self.image_column)  # the others need not be read, or decoded
        self.pictures: torch.Tensor | None = None
        self.rows: Sequence[int] = range(len(dataset))
        self._warn_of_crops()
        if not self.random_crop and len(dataset) * self.channels * self.resolution**2 <= CACHED_BYTES:
            options: dict[str, Any] = {"resize_mode": self.resize_mode, "interpolation": self.interpolation}
            options["channels"] = self.channels
            self.pictures, self.rows = decode_images(dataset, self.image_column, self.resolution, **options)
        else:
            self[0, 0]

    def _warn_of_crops(self) -> None:
        """By the headers of the first pictures."""
        if self.resize_mode != "crop" or self.random_crop or process_rank()[0] > 0:
            return
        cuts = []
        for row in range(min(len(self.column), LOOKED_AT)):
            try:
                size = image_size(self.column[row][self.image_column])
            except Exception:  # of any kind; it is told when it is read
                continue
            cuts.append(cuts_much(size, (self.resolution, self.resolution)))
        if any(cuts):
            logger.warning(crop_warning(sum(cuts), len(cuts), first=len(self.column) > LOOKED_AT))

    def __len__(self) -> int:
        return len(self.column if self.pictures is None else self.pictures)

    def decode(self, row: int, centering: tuple[float, float] = (0.5, 0.5)) -> torch.Tensor:
        """A row's picture, (C, resolution, resolution) uint8. It raises what the picture makes Pillow raise."""
        if self.pictures is not None:
            return self.pictures[row]
        return self._decode(self.column[row][self.image_column], centering)

    def __getitem__(self, index: tuple[int, int]) -> tuple[torch.Tensor, list[Problem]]:
        """The picture of a row at a position of the run's order, and the rows it stands in for, with the reasons."""
        row, position = index
        centering, mirrored = self._draw(position)
        problems: list[Problem] = []
        for other in range(row, row + min(len(self), MAX_TRIED)):
            try:
                picture = self.decode(other % len(self), centering)
                break
            except Exception as error:  # whatever a picture raises: it is one of many
                problems.append((other % len(self), f"{type(error).__name__}: {error}"))
        else:
            raise ValueError(
                f"column {self.image_column!r}: none of {len(problems)} pictures from row {row} on could be read: "
                f"{problems[0][1]}"
            )
        return picture.flip(-1) if mirrored else picture, problems

    def identity(self) -> dict[str, str]:
        """What tells these pictures from others, for the identity of a run."""
        if self.pictures is not None:
            return {"training data": fingerprint(self.pictures)}
        return {
            "pictures": rows_fingerprint(self.column, [self.image_column]),
            "resize_mode": self.resize_mode,
            "interpolation": self.interpolation,
        }

    def with_files(self, batches: Iterable[list[int]]) -> Iterator[tuple[list[int], Any]]:
        """Lists of rows, each with what [`take_files`] needs to decode them in another process: here nothing."""
        return ((rows, None) for rows in batches)

    def take_files(self, files: Any) -> None:
        """Decode rows of these files from now on."""

    def placed(self, row: int) -> str:
        """Where a row's picture is, for a warning."""
        try:
            return place(self.column[row][self.image_column], row)
        except Exception:  # what can't be read may not tell its path either
            return f"in row {row}"


def load_batches(
    images: ImageDataset, batches: Iterator[torch.Tensor], *, first: int = 0, stride: int = 0, num_workers: int = 0
) -> Iterator[torch.Tensor]:
    """Pictures (B, C, resolution, resolution) uint8 of batches of rows (B,), decoded by `num_workers` processes ahead
    of time, or by this one. Those that can't be read are named in warnings, each once.

    Args:
        batches: rows, from [`shuffled_batches`] or another that is as endless or ends.
        first: position of the first row in the order of the run, which its crop and flip are drawn from.
        stride: positions from one batch to the next.
    """
    if images.pictures is not None and not images.random_flip:
        yield from (images.pictures[rows] for rows in batches)
        return
    places = (
        [(row, first + number * stride + index) for index, row in enumerate(rows.tolist())]
        for number, rows in enumerate(batches)
    )
    loader: Iterable[Any] = DataLoader(
        images,
        batch_sampler=places,
        num_workers=0 if images.pictures is not None else num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else it draws from that of the models' weights
    )
    told: set[int] = set()
    for pictures, problems in loader:
        for row, reason in problems:
            if row not in told and len(told) < MAX_NAMED:
                logger.warning(f"skipped picture {images.placed(row)}: {reason}; the next one stands in for it")
                told.add(row)
                if len(told) == MAX_NAMED:
                    logger.warning(f"more pictures that can't be read than {MAX_NAMED} are not named")
        yield pictures


def _collate(items: Sequence[tuple[torch.Tensor, list[Problem]]]) -> tuple[torch.Tensor, list[Problem]]:
    return torch.stack([picture for picture, _ in items]), [problem for _, problems in items for problem in problems]


def first_batches(count: int, batch_size: int) -> Iterator[torch.Tensor]:
    """The rows from 0 to `count`, in batches."""
    yield from torch.arange(count).split(batch_size)


def load_images(args: argparse.Namespace, channels: int) -> tuple[ImageDataset | ImageStream, ImageDataset]:
    """The pictures of a script's training split, and the first of those that validation measures, of so many channels.

    ``args.validation_split`` is then the split's name, or ``"none"``.
    """
    splits = load_splits(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        columns=[args.image_column],
        cache_dir=args.cache_dir,
        output_dir=args.output_dir,
        streaming=args.streaming,
    )
    args.validation_split = choose_validation_split(splits, args.validation_split)
    held_out = "train" if args.validation_split == "none" else args.validation_split
    limit = VALIDATION_PICTURES[held_out == "train"]
    if held_out == "train":
        limit = min(limit, args.max_train_samples or limit)
    plain: dict[str, Any] = {"resize_mode": args.resize_mode, "interpolation": args.image_interpolation_mode}
    plain["channels"] = channels
    own = {"random_crop": args.random_crop, "random_flip": args.random_flip, "seed": args.seed, **plain}
    read, column = (args.image_column, args.resolution), args.image_column
    if args.streaming:
        train, first = (ImageStream.open_column(splits, name, column) for name in ("train", held_out))
        measured = as_dataset(first.take(limit), column, args.cache_dir)
        pictures = ImageStream(train, *read, source=stream_identity(splits, "train", column), **own)
        return pictures, ImageDataset(as_picture_column(measured, column), *read, **plain)
    train, measured = (
        take_split(splits, name, image_column=column, max_samples=count)
        for name, count in (("train", args.max_train_samples), (held_out, limit))
    )
    return ImageDataset(train, *read, **own), ImageDataset(measured, *read, **plain)
