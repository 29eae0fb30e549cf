"""Sounds of a dataset or a stream, decoded when they are asked for, and random parts of them."""

import argparse
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..schedulers.samplers import uniform
from ..utils.sounds import part_start, read_part, read_sound, sound_seconds
from .checkpoints import fingerprint
from .data import MAX_NAMED, MAX_TRIED, choose_validation_split, load_splits, take_split, try_rows
from .data_identity import rows_fingerprint
from .draws import row_generators, step_generator
from .image_dataset import CACHED_BYTES
from .sample_stream import SampleStream, as_dataset
from .table_files import stream_identity


logger = logging.getLogger(__name__)

VALIDATION_SOUNDS = 256  # at most
_DRAWS = 5  # tells the draws of a stream's parts from others of their step


class SoundDataset:
    """Sounds of a `datasets.Dataset`, int16 (T,), each decoded when it is asked for.

    In place of a sound that can't be read stands the next one that can. A small dataset is decoded once and kept; what
    can't be read is left out of it. Either way, broken sounds are named in warnings.

    Args:
        dataset: a `datasets.Dataset`.
        audio_column: its column of sounds: files, or their paths.
        sampling_rate: that they are resampled to.

    Attributes:
        sounds (`list[torch.Tensor]`, *optional*): all of them, where they are kept.

    Raises:
        ValueError: if the column is none of sounds, or no sound of a small dataset, or none of the first thousand of
            another, can be read.
    """

    def __init__(self, dataset: Any, audio_column: str, sampling_rate: int) -> None:
        from datasets import Audio

        self.audio_column, self.sampling_rate = audio_column, sampling_rate
        try:
            self.column = dataset.select_columns(audio_column).cast_column(audio_column, Audio(decode=False))
        except Exception as error:  # of Arrow
            found = dataset.features[audio_column]
            raise ValueError(f"column {audio_column!r} of {found} can't be one of sounds: {error}") from error
        self.sounds: list[torch.Tensor] | None = None
        self._told: set[int] = set()
        if not self._is_small():
            self[0]
            return
        self.sounds, _, problems = try_rows(self._decode, lambda row: f"in row {row}", range(len(self.column)))
        for problem in problems[:MAX_NAMED]:
            logger.warning(f"skipped sound {problem}")
        if problems:
            logger.warning(f"skipped {len(problems)} of {len(self.column)} sounds that could not be read")
        if not self.sounds:
            raise ValueError(f"column {audio_column!r}: none of the {len(self.column)} sounds could be read")

    def __len__(self) -> int:
        return len(self.column if self.sounds is None else self.sounds)

    def __getitem__(self, row: int) -> torch.Tensor:
        """A row's whole sound, int16 (T,)."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.sounds[row] if self.sounds is not None else self._readable(row, self._decode)

    def part(self, row: int, share: float, length: int) -> torch.Tensor:
        """At most `length` samples of a row's sound, int16, that begin at a `share` in [0, 1) of all possible places;
        of a sound that isn't kept, no more than these are decoded."""
        if self.sounds is None:
            return self._readable(
                row, lambda own: _kept(read_part(self._value(own), self.sampling_rate, share, length))
            )
        start = part_start(len(self.sounds[row]), share, length)
        return self.sounds[row][start : start + length]

    def identity(self) -> dict[str, str]:
        """What tells these sounds from others, for the identity of a run."""
        if self.sounds is not None:
            return {"training data": fingerprint(self.sounds)}
        return {"sounds": rows_fingerprint(self.column, [self.audio_column])}

    def _value(self, row: int) -> Any:
        return self.column[row][self.audio_column]

    def _decode(self, row: int) -> torch.Tensor:
        return _kept(read_sound(self._value(row), self.sampling_rate))

    def _is_small(self) -> bool:
        """Whether all sounds take no more than [`CACHED_BYTES`], by their files' headers."""
        left = CACHED_BYTES // 2  # samples
        for row in range(len(self.column)):
            try:
                left -= round(sound_seconds(self._value(row)) * self.sampling_rate)
            except ValueError:  # a broken one, which is left out
                continue
            if left < 0:
                return False
        return True

    def _readable(self, row: int, read: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """What `read` gives of a row, or of the next one that can be read."""
        first, tried = "", min(len(self), MAX_TRIED)
        for other in range(row, row + tried):
            try:
                return read(other % len(self))
            except Exception as error:  # whatever a sound raises: it is one of many
                reason = f"{type(error).__name__}: {error}"
                self._tell(other % len(self), reason)
                first = first or reason
        raise ValueError(
            f"column {self.audio_column!r}: none of {tried} sounds from row {row} on could be read: {first}"
        )

    def _tell(self, row: int, reason: str) -> None:
        if row not in self._told and len(self._told) < MAX_NAMED:
            logger.warning(f"skipped sound in row {row}: {reason}; the next one stands in for it")
            self._told.add(row)
            if len(self._told) == MAX_NAMED:
                logger.warning(f"more sounds that can't be read than {MAX_NAMED} are not named")


class SoundStream(SampleStream):
    """Parts of the sounds of a stream, see [`~training.sample_stream.SampleStream`]: each a float32 (length,), drawn
    from the seed and its position; shorter sounds are followed by silence.

    Args:
        dataset: a `datasets.IterableDataset` with that column, undecoded.
        audio_column: the column's name.
        sampling_rate: that sounds are resampled to.
        length: of a part, in samples.
        seed: of the orders and the parts.
        source: what tells the data from others ([`~training.table_files.stream_identity`]).
    """

    noun, feature = "sound", "Audio"

    def __init__(
        self, dataset: Any, audio_column: str, sampling_rate: int, length: int, *, seed: int, source: str
    ) -> None:
        self.sampling_rate, self.length, self.source = sampling_rate, length, source
        self.begin(dataset, audio_column, seed)

    def identity(self) -> dict[str, str]:
        """What tells these sounds from others, for the identity of a run."""
        return {"sounds": self.source}

    def read(self, value: Any, position: int) -> torch.Tensor:
        """A part of a sound, (length,) float32."""
        share = torch.rand(1, generator=step_generator(self.seed, position, _DRAWS)).item()
        part = as_waveform(_kept(read_part(value, self.sampling_rate, share, self.length)))
        return torch.nn.functional.pad(part, (0, self.length - len(part)))


def load_sounds(
    args: argparse.Namespace, sampling_rate: int, length: int
) -> tuple[SoundDataset | SoundStream, SoundDataset]:
    """The sounds of the training split, as a stream parts of `length` samples, and the first of those that validation
    measures; by the flags of the data, of which it settles ``validation_split``."""
    splits = load_splits(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        columns=[args.audio_column],
        cache_dir=args.cache_dir,
        output_dir=args.output_dir,
        streaming=args.streaming,
    )
    args.validation_split = choose_validation_split(splits, args.validation_split)
    held_out = "train" if args.validation_split == "none" else args.validation_split
    limit = VALIDATION_SOUNDS
    if held_out == "train":
        limit = min(limit, args.max_train_samples or limit)
    if args.streaming:
        read = args.audio_column, sampling_rate
        source = stream_identity(splits, "train", args.audio_column)
        sounds, first = (SoundStream.open_column(splits, name, args.audio_column) for name in ("train", held_out))
        measured = SoundDataset(as_dataset(first.take(limit), args.audio_column, args.cache_dir), *read)
        return SoundStream(sounds, *read, length, seed=args.seed, source=source), measured
    train, measured = (
        take_split(splits, name, audio_column=args.audio_column, max_samples=count)
        for name, count in (("train", args.max_train_samples), (held_out, limit))
    )
    return (
        SoundDataset(train, args.audio_column, sampling_rate),
        SoundDataset(measured, args.audio_column, sampling_rate),
    )


def _kept(waveform: np.ndarray) -> torch.Tensor:
    """A waveform as it is kept, int16."""
    return torch.from_numpy((waveform.clip(-1, 1) * 32767).round().astype(np.int16))


def as_waveform(sound: torch.Tensor) -> torch.Tensor:
    """A kept sound as floats (T,)."""
    return sound.float() / 32767


def crop_sounds(
    sounds: SoundDataset, rows: torch.Tensor, length: int, *, seed: int, step: int, rank: int = 0
) -> torch.Tensor:
    """Parts (B, length) of the sounds of some rows, each drawn from (seed, step, row of the global batch) alone;
    shorter ones are followed by silence."""
    found = torch.zeros(len(rows), length)
    shares = uniform(rows.shape, row_generators(seed, step, len(rows), rank=rank), rows.device).tolist()
    for index, (row, share) in enumerate(zip(rows.tolist(), shares, strict=True)):
        part = sounds.part(row, share, length)
        found[index, : len(part)] = as_waveform(part)
    return found


class _Crops(Dataset):
    """The parts of a batch's sounds, by its rows and its step."""

    def __init__(self, sounds: SoundDataset, length: int, seed: int, rank: int) -> None:
        self.sounds, self.length, self.seed, self.rank = sounds, length, seed, rank

    def __getitem__(self, index: tuple[torch.Tensor, int]) -> torch.Tensor:
        rows, step = index
        return crop_sounds(self.sounds, rows, self.length, seed=self.seed, step=step, rank=self.rank)


def load_crops(
    sounds: SoundDataset,
    batches: Iterator[torch.Tensor],
    length: int,
    *,
    seed: int,
    step: int = 0,
    rank: int = 0,
    num_workers: int = 0,
) -> Iterator[torch.Tensor]:
    """What [`crop_sounds`] gives (B, length) of each of a run's batches of rows (B,), from `step` on; decoded by
    `num_workers` processes ahead of time, or by this one. Sounds that are kept need none."""
    return iter(
        DataLoader(
            _Crops(sounds, length, seed, rank),
            batch_size=None,
            sampler=((rows, step + number) for number, rows in enumerate(batches)),
            num_workers=0 if sounds.sounds is not None else num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else it draws from that of the models' weights
        )
    )
