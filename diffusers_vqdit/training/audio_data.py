"""Sounds of a dataset in memory, and random parts of them."""

import argparse
import logging
from typing import Any

import numpy as np
import torch

from ..schedulers.samplers import uniform
from ..utils.sounds import read_sound
from .data import choose_validation_split, load_splits, read_rows, take_split
from .draws import row_generators


logger = logging.getLogger(__name__)


def decode_sounds(dataset: Any, audio_column: str, sampling_rate: int) -> list[torch.Tensor]:
    """Every sound of a dataset, int16 (T,) at this rate, leaving out the broken ones with warnings that name them.

    Raises:
        ValueError: if no sound could be read.
    """
    from datasets import Audio

    column = dataset.select_columns(audio_column)
    try:
        column = column.cast_column(audio_column, Audio(decode=False))
    except Exception as error:  # of Arrow
        found = dataset.features[audio_column]
        raise ValueError(f"column {audio_column!r} of {found} can't be one of sounds: {error}") from error

    def read(row: int) -> torch.Tensor:
        waveform = read_sound(column[row][audio_column], sampling_rate)
        return torch.from_numpy((waveform.clip(-1, 1) * 32767).round().astype(np.int16))

    sounds, _ = read_rows(read, lambda row: f"in row {row}", range(len(column)), "sound")
    if not sounds:
        raise ValueError(f"column {audio_column!r}: none of the {len(column)} sounds could be read")
    return sounds


def load_sounds(args: argparse.Namespace, sampling_rate: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The sounds of the training split, and those that validation measures, as [`decode_sounds`] gives them; by the
    flags of the data, of which it settles ``validation_split``."""
    splits = load_splits(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_data_dir=args.train_data_dir,
        columns=[args.audio_column],
        cache_dir=args.cache_dir,
        output_dir=args.output_dir,
    )
    args.validation_split = choose_validation_split(splits, args.validation_split)
    names = ["train"] if args.validation_split == "none" else ["train", args.validation_split]
    every = []
    for name in names:
        split = take_split(splits, name, columns=[args.audio_column], max_samples=args.max_train_samples)
        every.append(decode_sounds(split, args.audio_column, sampling_rate))
    return every[0], every[-1]


def as_waveform(sound: torch.Tensor) -> torch.Tensor:
    """A kept sound as floats (T,)."""
    return sound.float() / 32767


def crop_sounds(
    sounds: list[torch.Tensor], rows: torch.Tensor, length: int, *, seed: int, step: int, rank: int = 0
) -> torch.Tensor:
    """Parts (B, length) of the sounds of some rows, each drawn from (seed, step, row of the global batch) alone;
    shorter ones are followed by silence."""
    found = torch.zeros(len(rows), length)
    shares = uniform(rows.shape, row_generators(seed, step, len(rows), rank=rank), rows.device).tolist()
    for index, (row, share) in enumerate(zip(rows.tolist(), shares, strict=True)):
        start = int(share * (max(len(sounds[row]) - length, 0) + 1))
        part = sounds[row][start : start + length]
        found[index, : len(part)] = as_waveform(part)
    return found
