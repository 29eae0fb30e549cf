"""Samples of a stream: read shard by shard and shuffled in windows, from where a run stopped."""

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from ..utils.distributed import process_rank
from .data import MAX_NAMED, MAX_TRIED
from .draws import step_generator
from .file_lists import mapped_table
from .table_files import (
    SPLIT_COLUMN,
    MissingSplitError,
    Splits,
    check_files,
    compare_files,
    is_by_column,
    loading,
    split_names,
    split_of,
    stream_of,
)


logger = logging.getLogger(__name__)

WINDOW = 1000  # samples, undecoded, that are shuffled together
_ORDER = 4  # tells the draws of orders from those of pictures


class SampleStream(Dataset, ABC):
    """Tensors of the undecoded values of a column of a `datasets.IterableDataset`, again and again.

    In each epoch the shards come in another order, of the seed and the epoch, and each window of a thousand samples in
    one of the seed, the epoch and the window. Each process has shards of its own, or every so many samples of all.
    In place of a sample that can't be read stands the next one of its batch that can; in place of a batch of such
    samples the next one.

    Its state is where the batches that were taken end: the epoch, the window, and the place of `datasets` before it.

    Attributes:
        noun (`str`): what a sample is, for messages.
        feature (`str`): that of `datasets` which has files of such samples.
    """

    noun: str
    feature: str

    def begin(self, dataset: Any, stream_column: str, seed: int) -> None:
        """Take the dataset, from its start."""
        self.stream_column, self.seed = stream_column, seed
        self.rank, self.world_size = process_rank()
        if self.world_size > 1:
            from datasets.distributed import split_dataset_by_node

            dataset = split_dataset_by_node(dataset, self.rank, self.world_size)
        self.dataset = dataset
        # Of windows that were begun: the samples before them, the epoch, the window, and the state before it.
        self.begun: deque[tuple[int, int, int, dict | None]] = deque()
        self.start: tuple[int, int, dict | None, int] = (0, 0, None, 0)
        self.taken = self.first = 0

    @classmethod
    def undecoded(cls, dataset: Any, column: str) -> Any:
        """A `datasets.IterableDataset` whose column of files is undecoded.

        Raises:
            ValueError: if the column isn't there, or can't be one.
        """
        import datasets

        features = dataset.features or dataset._resolve_features().features
        if column not in features:
            raise ValueError(f"column {column!r} is not in the data: it has {sorted(features)}")
        kind, files = features[column], getattr(datasets, cls.feature)
        plain = isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")
        if not (isinstance(kind, files) or plain or (isinstance(kind, dict) and "bytes" in kind)):
            raise ValueError(
                f"column {column!r} has the type {kind}; streamed {cls.noun}s must be bytes of a {cls.noun} file"
            )
        return dataset.cast_column(column, files(decode=False)) if isinstance(kind, files) else dataset

    @classmethod
    def open_column(cls, splits: Splits, split: str, column: str) -> Any:
        """The undecoded column of a split of [`~training.data.load_splits`] as a `datasets.IterableDataset`, which
        reads no other columns of parquet files. Of one table with a ``split`` column, the rows that have it there.

        All processes must call it.

        Raises:
            ValueError: also if there is no such split, if the column is missing, or of a type that can't be read, in
                a file that lies here, or if processes find different files.
        """
        if split not in split_names(splits):
            raise MissingSplitError(f"split={split!r} is not in the data: it has {split_names(splits)}")
        by_column = is_by_column(splits)
        source, columns = (str(next(iter(splits))), [column, SPLIT_COLUMN]) if by_column else (split, [column])
        cls.undecoded(splits[source], column)
        compare_files(splits, source)
        check_files(splits, source, splits[source].features, columns)
        dataset = cls.undecoded(stream_of(splits.builder, source, columns), column)
        if by_column:
            dataset = dataset.filter(lambda said: split_of(said, 0) == split, input_columns=SPLIT_COLUMN)
        return dataset.select_columns(column)

    @abstractmethod
    def read(self, value: Any, position: int) -> torch.Tensor:
        """The tensor of an undecoded value at a position of the run's order. It raises what a broken one does."""

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
                with loading(f"column {self.stream_column!r} of the stream can't be read"):
                    found = [row[self.stream_column] for _, row in zip(range(WINDOW), values, strict=False)]
                if not found:
                    break
                empty, state = False, shards.state_dict()
                order = torch.randperm(len(found), generator=step_generator(self.seed, epoch, window, _ORDER))
                for index in order[skipped:].tolist():
                    yield found[index], (count + skipped) * self.world_size + self.rank
                    skipped += 1
                count, window, skipped = count + len(found), window + 1, 0
            if empty and window == 0:
                raise ValueError(f"column {self.stream_column!r}: process {self.rank} finds no samples in the stream")
            epoch, window, state = epoch + 1, 0, None

    def __getitem__(self, sample: tuple[Any, int]) -> torch.Tensor | str:
        """The tensor of an undecoded value at a position, or what is wrong with it."""
        value, position = sample
        value = {"bytes": value, "path": None} if isinstance(value, bytes) else value
        try:
            return self.read(value, position)
        except Exception as error:  # whatever a value raises: it is one of many
            path = value.get("path") if isinstance(value, dict) else None
            return f"{path or f'at position {position}'}: {type(error).__name__}: {error}"

    def __getstate__(self) -> dict[str, Any]:
        # For the processes that decode: they are handed the values, and have no use for where these are from.
        return {**self.__dict__, "dataset": None, "begun": None}

    def batches(self, batch_size: int, num_workers: int = 0) -> Iterator[torch.Tensor]:
        """Tensors (B, *shape), read by `num_workers` processes, or by this one.

        Raises:
            ValueError: if none of so many samples in a row can be read.
        """

        def places() -> Iterator[list[tuple[Any, int]]]:
            samples = self.samples()
            while True:
                yield [next(samples) for _ in range(batch_size)]

        loader: Iterable[Any] = DataLoader(
            self,
            batch_sampler=places(),
            num_workers=num_workers,
            collate_fn=list,
            pin_memory=False,
            generator=torch.Generator(),  # else it draws from that of the models' weights
        )
        told = tried = 0
        for items in loader:
            for problem in [one for one in items if isinstance(one, str)][: max(0, MAX_NAMED - told)]:
                logger.warning(f"skipped {self.noun} {problem}; another one stands in for it")
                told += 1
            readable = [index for index, one in enumerate(items) if not isinstance(one, str)]
            self.taken += batch_size
            tried = 0 if readable else tried + batch_size
            if tried >= MAX_TRIED:
                raise ValueError(
                    f"column {self.stream_column!r}: none of {tried} {self.noun}s in a row could be read: {items[0]}"
                )
            if not readable:
                continue
            chosen = [next((n for n in readable if n >= index), readable[0]) for index in range(len(items))]
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


def as_dataset(dataset: Any, column: str, cache_dir: str | None = None) -> Any:
    """The undecoded files in a column of a `datasets.IterableDataset` that ends, as a `datasets.Dataset` whose values
    are in a file that has no name, in `cache_dir`."""
    from datasets import Dataset
    from datasets.fingerprint import generate_random_fingerprint

    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({column: kind})  # not its features, which would encode sounds anew
    # A batch each, as one of Arrow's holds 2 GB.
    arrays = (pa.array([_as_file(row[column])], kind) for row in dataset)
    table = mapped_table((pa.record_batch([array], schema=schema) for array in arrays), schema, cache_dir)
    return Dataset(table, fingerprint=generate_random_fingerprint())


def _as_file(value: Any) -> dict[str, Any] | None:
    """An undecoded file as `datasets` has it."""
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    return {"bytes": None, "path": value} if isinstance(value, str) else value
