"""Pictures of a stream: read shard by shard and shuffled in windows, from where a run stopped."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from ..utils.decoding import decode_image, to_bytes
from ..utils.distributed import process_rank
from .data import MAX_NAMED
from .draws import step_generator


logger = logging.getLogger(__name__)

WINDOW = 1000  # samples, undecoded, that are shuffled together
_CROP, _ORDER = 3, 4  # tell the draws of one kind from another


class ImageStream(Dataset):
    """Pictures of an undecoded column of a `datasets.IterableDataset`, again and again.

    In each epoch the shards come in another order, of the seed and the epoch, and each window of a thousand samples in
    one of the seed, the epoch and the window. Each process has shards of its own, or every so many samples of all.
    In place of a picture that can't be read stands the next one of its batch that can.

    Its state is where the batches that were taken end: the epoch, the window, and the place of `datasets` before it.

    Args:
        dataset: with the column alone.
        image_column, resolution, resize_mode, interpolation, random_crop, random_flip, seed: as in [`ImageDataset`].
    """

    pictures = None  # in memory

    def __init__(
        self,
        dataset: Any,
        image_column: str,
        resolution: int,
        *,
        resize_mode: str = "crop",
        interpolation: str = "lanczos",
        random_crop: bool = False,
        random_flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.image_column, self.resolution, self.seed = image_column, resolution, seed
        self.resize_mode = "crop" if random_crop else resize_mode
        self.interpolation, self.random_crop, self.random_flip = interpolation, random_crop, random_flip
        self.rank, self.world_size = process_rank()
        if self.world_size > 1:
            from datasets.distributed import split_dataset_by_node

            dataset = split_dataset_by_node(dataset, self.rank, self.world_size)
        self.dataset = dataset
        # Of windows that were begun: the samples before them, the epoch, the window, and the state before it.
        self.begun: deque[tuple[int, int, int, dict | None]] = deque()
        self.start: tuple[int, int, dict | None, int] = (0, 0, None, 0)
        self.taken = self.first = 0

    def identity(self) -> dict[str, str]:
        """What tells these pictures from others, for the identity of a run."""
        return {"resize_mode": self.resize_mode, "interpolation": self.interpolation}

    def samples(self) -> Iterator[tuple[Any, int]]:
        """Undecoded values from the state on, each with its position among those of all processes."""
        epoch, window, state, skipped = self.start
        count = self.first - skipped
        while True:
            shards = self.dataset.shuffle(seed=self.seed * 1_000_003 + epoch, buffer_size=1, max_buffer_input_shards=1)
            if state is not None:
                shards.load_state_dict(state)
            values, empty = iter(shards), True
            while True:
                self.begun.append((count, epoch, window, state))
                found = [row[self.image_column] for _, row in zip(range(WINDOW), values, strict=False)]
                if not found:
                    break
                empty, state = False, shards.state_dict()
                order = torch.randperm(len(found), generator=step_generator(self.seed, epoch, window, _ORDER))
                for index in order[skipped:].tolist():
                    yield found[index], (count + skipped) * self.world_size + self.rank
                    skipped += 1
                count, window, skipped = count + len(found), window + 1, 0
            if empty and window == 0:
                raise ValueError(f"column {self.image_column!r}: process {self.rank} finds no samples in the stream")
            epoch, window, state = epoch + 1, 0, None

    def batches(self, batch_size: int, num_workers: int = 0) -> Iterator[torch.Tensor]:
        """Pictures (B, 3, resolution, resolution) uint8, decoded by `num_workers` processes, or by this one."""

        def places() -> Iterator[list[tuple[Any, int]]]:
            samples = self.samples()
            while True:
                yield [next(samples) for _ in range(batch_size)]

        loader: Iterable[Any] = DataLoader(
            _Decoder(self),
            batch_sampler=places(),
            num_workers=num_workers,
            collate_fn=list,
            pin_memory=False,
            generator=torch.Generator(),  # else it draws from that of the models' weights
        )
        told = 0
        for items in loader:
            for problem in [one for one in items if isinstance(one, str)][: max(0, MAX_NAMED - told)]:
                logger.warning(f"skipped picture {problem}; the next one of its batch stands in for it")
                told += 1
            readable = [index for index, one in enumerate(items) if not isinstance(one, str)]
            if not readable:
                raise ValueError(f"column {self.image_column!r}: no picture of a batch could be read: {items[0]}")
            chosen = [next((n for n in readable if n >= index), readable[0]) for index in range(len(items))]
            self.taken += batch_size
            yield torch.stack([items[index] for index in chosen])

    # -----------------------------------------------------------------------------------------------------------------
    # Where a run goes on

    def state_dict(self) -> dict[str, Any]:
        """The states of all processes, which must call it."""
        taken = self.first + self.taken
        while len(self.begun) > 1 and self.begun[1][0] <= taken:
            self.begun.popleft()
        own: list[Any] = [0, 0, None, 0, 0]
        if self.begun:
            before, epoch, window, state = self.begun[0]
            own = [epoch, window, state, taken - before, taken]
        states = gather_object([own]) if self.world_size > 1 else [own]
        return {"processes": {str(rank): state for rank, state in enumerate(states)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: if it is of another number of processes.
        """
        if len(state["processes"]) != self.world_size:
            raise ValueError(
                f"the checkpoint's stream was read by {len(state['processes'])} processes, and is now by "
                f"{self.world_size}: each has a place of its own in it"
            )
        *start, self.first = state["processes"][str(self.rank)]
        self.start = tuple(start)
        self.taken = 0
        self.begun.clear()


class _Decoder(Dataset):
    """Undecoded values to pictures (3, resolution, resolution) uint8, or to what is wrong with them."""

    def __init__(self, stream: ImageStream) -> None:
        self.resolution, self.seed = stream.resolution, stream.seed
        self.resize_mode, self.interpolation = stream.resize_mode, stream.interpolation
        self.random_crop, self.random_flip = stream.random_crop, stream.random_flip

    def __getitem__(self, sample: tuple[Any, int]) -> torch.Tensor | str:
        value, position = sample
        value = {"bytes": value, "path": None} if isinstance(value, bytes) else value
        across, down, flip = torch.rand(3, generator=step_generator(self.seed, position, _CROP)).tolist()
        centering = (across, down) if self.random_crop else (0.5, 0.5)
        try:
            picture = decode_image(
                value, self.resolution, self.resize_mode, interpolation=self.interpolation, centering=centering
            )
        except Exception as error:  # whatever a picture raises: it is one of many
            path = value.get("path") if isinstance(value, dict) else None
            return f"{path or f'at position {position}'}: {type(error).__name__}: {error}"
        return to_bytes(picture.flip(-1) if self.random_flip and flip < 0.5 else picture)


def picture_stream(dataset: Any, column: str) -> Any:
    """A `datasets.IterableDataset` with one undecoded column of pictures.

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
    dataset = dataset.select_columns(column)
    return dataset.cast_column(column, Image(decode=False)) if isinstance(kind, Image) else dataset
