"""How loud sounds are: their level, what is clipped, what is silent, and where something is heard."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .evaluation import mean


CLIPPED = 0.999  # of full scale
SILENT = -50.0  # dB of full scale
FRAME = 0.02  # seconds, each silent or not
AUDIBLE = 0.01  # of the loudest sample


def levels(sounds: Sequence[Any], rate: int) -> dict[str, Any]:
    """Of sounds (T,) at a rate: their level, the shares of samples that are clipped and of frames that are silent, and
    the share of sounds without samples."""
    parts = [torch.as_tensor(one, dtype=torch.float64) for one in sounds if len(one)]
    empty = {"empty": {"value": 1 - len(parts) / len(sounds)}}
    if not parts:
        return empty

    def decibels(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        return 10 * torch.stack([piece.square().mean() for piece in pieces]).clamp_min(1e-12).log10()

    frames = decibels([frame for part in parts for frame in part.split(max(1, round(FRAME * rate)))])
    return {
        "level": mean(decibels(parts), "dB"),
        "clipped samples": {"value": float((torch.cat(parts).abs() > CLIPPED).double().mean())},
        "silent frames": {"value": float((frames < SILENT).double().mean())},
        **empty,
    }


def middle_third(sound: np.ndarray) -> np.ndarray:
    """A mask (T,), True in the middle third of what is heard of a sound (T,): from the first sample to the last that
    is louder than a hundredth of the loudest."""
    loud = np.flatnonzero(np.abs(sound) > AUDIBLE * np.abs(sound).max())
    first, last = (loud[0], loud[-1] + 1) if len(loud) else (0, len(sound))
    mask, length = np.zeros(len(sound), bool), last - first
    mask[first + length // 3 : first - (-2 * length // 3)] = True
    return mask
