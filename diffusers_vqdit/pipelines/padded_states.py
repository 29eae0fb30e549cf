"""States of an encoder with the mask of their padding."""

from dataclasses import dataclass
from typing import Any

import torch

from ..utils.checks import shown


@dataclass
class PaddedStates:
    """States of an encoder, filled up to those of the longest sample.

    Args:
        states: (B, n, channels) of any float type.
        mask: (B, n), zero at padding; None where nothing is.
    """

    states: torch.Tensor
    mask: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def to(self, device: torch.device | str) -> "PaddedStates":
        return PaddedStates(self.states.to(device), None if self.mask is None else self.mask.to(device))

    def rows(self) -> list["PaddedStates"]:
        """Each sample on its own, with its padding."""
        masks = [None] * len(self) if self.mask is None else self.mask.split(1)
        return [PaddedStates(states, mask) for states, mask in zip(self.states.split(1), masks, strict=True)]


def join_states(rows: list[PaddedStates]) -> PaddedStates:
    """Samples, filled up to the longest."""
    lengths = [row.states.shape[1] for row in rows]
    longest, first = max(lengths), rows[0].states
    if len(set(lengths)) == 1 and all(row.mask is None for row in rows):
        return PaddedStates(torch.cat([row.states for row in rows]))
    states = first.new_zeros(len(rows), longest, first.shape[2])
    mask = torch.zeros(len(rows), longest, dtype=torch.bool, device=first.device)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        states[index, :length] = row.states[0]
        mask[index, :length] = True if row.mask is None else row.mask[0].bool()
    return PaddedStates(states, mask)


def check_states_of(name: str, value: Any, channels: int, mask: Any = None, mask_name: str = "mask") -> PaddedStates:
    """States that a pipeline is passed, and their mask.

    Raises:
        ValueError: unless they are finite floats (B, n, channels), with a mask (B, n) of zeros and ones or None.
    """
    fits = isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == 3 and value.numel() > 0
    if not fits or value.shape[2] != channels:
        got = f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, torch.Tensor) else shown(value)
        raise ValueError(f"{name} must be states (B, n, {channels}) of an encoder, got {got}")
    if not value.isfinite().all():
        raise ValueError(f"{name} has states that are not finite")
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.shape != value.shape[:2]:
            got = str(tuple(mask.shape)) if isinstance(mask, torch.Tensor) else shown(mask)
            raise ValueError(f"{mask_name} must be a tensor of shape {tuple(value.shape[:2])}, as {name}, got {got}")
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"{mask_name} must be 0 at padding and else 1, got {mask.min()} to {mask.max()}")
    return PaddedStates(value, mask)


def to_halves(states: torch.Tensor, column: str) -> torch.Tensor:
    """States of a dataset's column as they are kept: float16, on the CPU.

    Raises:
        ValueError: if they are beyond its range.
    """
    halves = states.half().cpu()
    if not halves.isfinite().all():
        raise ValueError(
            f"column {column!r}: the encoder's states reach {states.abs().max():g} in {states.dtype}; they are kept "
            "in float16, up to 65504"
        )
    return halves
