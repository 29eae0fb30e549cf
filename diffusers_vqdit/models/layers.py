"""What the transformer over codes and the one over latents have in common."""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from ..utils.checks import shown


@dataclass
class VQDiTPrefix:
    """What is generated needs this of what is given, at every sampling step the same.

    Args:
        names (`tuple[str, ...]`): the given segments; ``("caption",)`` for a caption's states.
        keys, values (`list[torch.Tensor]`): for each layer (B, S, heads, head_dim), S positions of all given segments.
        mask (`torch.BoolTensor`, *optional*): (B, 1, 1, S), false at positions that nothing may see; None for none.
        offsets (`dict[str, int]`): the codes of a generated segment that stand at its end, clean: those before the
            block that is generated next.
    """

    names: tuple[str, ...]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    mask: torch.Tensor | None = None
    offsets: dict[str, int] = field(default_factory=dict)

    def repeat_interleave(self, repeats: int) -> "VQDiTPrefix":
        """Each sample `repeats` times in a row."""
        return self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def __len__(self) -> int:
        return len(self.keys[0])

    def expand(self, size: int) -> "VQDiTPrefix":
        """The only sample as a batch of `size`, without copies."""
        return self._map(lambda x: x.expand(size, -1, -1, -1))

    def select(self, index: torch.Tensor | slice) -> "VQDiTPrefix":
        """The samples at `index`."""
        return self._map(lambda x: x[index])

    def part(self, rows: slice, size: int) -> "VQDiTPrefix":
        """The samples `rows` of `size`, or for each of them the only one there is.

        Raises:
            ValueError: if this prefix is neither of one sample nor of `size`.
        """
        if len(self) not in (1, size):
            raise ValueError(f"prefix must be of one sample or of {size}, got {len(self)}")
        return self.select(rows) if len(self) == size else self.expand(rows.stop - rows.start)

    def _map(self, function) -> "VQDiTPrefix":
        mask = None if self.mask is None else function(self.mask)
        keys, values = [function(x) for x in self.keys], [function(x) for x in self.values]
        return VQDiTPrefix(self.names, keys, values, mask, self.offsets)


@dataclass
class VQDiTModulation:
    """adaLN of the generated segments, where no time conditions it: the same at every sampling step.

    Args:
        names (`tuple[str, ...]`): the generated segments.
        conditioning (`torch.Tensor` of shape `(1, segments, D)`): what it was made of.
        blocks (`list[torch.Tensor]`): for each layer shifts, scales and gates (1, segments, 6D).
        out (`torch.Tensor` of shape `(1, segments, 2D)`): the output's shift and scale.
    """

    names: tuple[str, ...]
    conditioning: torch.Tensor
    blocks: list[torch.Tensor]
    out: torch.Tensor


def check_kind(argument: str, value: Any, kind: type, made_by: str) -> None:
    """Raise a ValueError unless it is None or of the kind that another method makes."""
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{argument} must be a {kind.__name__}, as {made_by} makes it, got {type(value).__name__}")


def check_timestep(timestep: Any, batch_size: int) -> torch.Tensor:
    """Times (1,) or (B,) as a tensor; a single one is all samples'.

    Raises:
        ValueError: for what are no numbers, or another count of them.
    """
    if not isinstance(timestep, torch.Tensor | int | float) or isinstance(timestep, bool):
        raise ValueError(f"timestep={shown(timestep)} must be a tensor of times (B,), or one of all samples")
    times = torch.as_tensor(timestep).reshape(-1)
    if len(times) not in (1, batch_size):
        raise ValueError(f"timestep has {len(times)} times, but there are {batch_size} samples: give one for each")
    return times


def join_masks(
    masks: dict[str, torch.Tensor], names: tuple[str, ...], lengths: tuple[int, ...], hidden_states: torch.Tensor
) -> torch.BoolTensor | None:
    """Masks (B, n) of some segments as one of all their positions, (B, 1, 1, S); None where nothing is padding."""
    if not isinstance(masks, dict) or set(masks) - set(names):
        found = sorted(masks) if isinstance(masks, dict) else type(masks).__name__
        raise ValueError(f"given_mask must be a dict with some of the given segments {sorted(names)}, got {found}")
    if not masks:
        return None
    parts, size = [], len(hidden_states)
    for name, length in zip(names, lengths, strict=True):
        mask = masks.get(name, hidden_states.new_ones(size, length))
        if not isinstance(mask, torch.Tensor) or mask.shape != (size, length):
            got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(f"given_mask[{name!r}] must have shape {(size, length)}, got {got}")
        if mask.is_floating_point() and not torch.compiler.is_compiling() and (mask < 0).any():
            raise ValueError(f"given_mask[{name!r}] must be 0 at padding and else 1; it has {mask.min().item():g}")
        parts.append(mask.to(hidden_states.device).bool())
    joined = torch.cat(parts, dim=1)[:, None, None, :]
    return None if not torch.compiler.is_compiling() and joined.all() else joined


def modulate(
    norm: nn.LayerNorm, hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """adaLN: norm(x) (1 + scale) + shift, with shift and scale broadcast to the hidden states."""
    if shift.numel() == shift.shape[-1]:
        # One row for all, as with one segment and no time: LayerNorm's own affine part is a third of the passes.
        # Under autocast the row has the linear layer's type and the hidden states keep float32.
        scale, shift = (1 + scale).flatten().to(hidden_states), shift.flatten().to(hidden_states)
        return F.layer_norm(hidden_states, norm.normalized_shape, scale, shift, norm.eps)
    return torch.addcmul(shift, norm(hidden_states), 1 + scale)


def expand_segments(values: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """(B, segments, D) to (B, N, D): each segment's row at all of its positions."""
    if len(lengths) == 1:
        return values  # broadcasts over the positions
    return torch.cat([row.expand(-1, n, -1) for row, n in zip(values.split(1, dim=1), lengths, strict=True)], dim=1)


def sincos_positions(
    shape: tuple[int, ...],
    trained_shape: tuple[int, ...],
    dim: int,
    like: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Sine-cosine positions (prod(shape), dim) of a line or a grid, each axis with an equal part of the channels.

    Coordinates are scaled to the trained shape (Peebles & Xie 2023; Vaswani et al. 2017, section 3.5). By default each
    axis is by itself, so that another grid covers the same range. With a `scale`, all axes are by this one, around the
    trained grid's middle: a coordinate means the same part of a picture at each aspect ratio (Li et al. 2024,
    Hunyuan-DiT: centralized interpolative positions). The result has the device and dtype of `like`, by default
    float32 on the CPU.
    """
    device, dtype = ("cpu", torch.float32) if like is None else (like.device, like.dtype)
    # torch.export's tensors have no values: one that is kept spoils all later calls.
    make = _sincos_positions if torch.compiler.is_compiling() else _kept_positions
    return make(shape, trained_shape, dim, device, dtype, scale)


def _sincos_positions(
    shape: tuple[int, ...],
    trained_shape: tuple[int, ...],
    dim: int,
    device: torch.device | str,
    dtype: torch.dtype,
    scale: float | None,
) -> torch.Tensor:
    part = dim // (2 * len(shape)) * 2
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(0, part, 2, dtype=torch.float64) / part)
    axes = []
    for n, base in zip(shape, trained_shape, strict=True):
        steps = torch.arange(n, dtype=torch.float64)
        if scale is None:
            axes.append(steps * (base / n))
        else:
            axes.append((steps - (n - 1) / 2) * scale + (base - 1) / 2)
    waves = []
    for coordinate in torch.meshgrid(*axes, indexing="ij"):
        angle = coordinate.flatten()[:, None] * frequencies
        waves += [angle.sin(), angle.cos()]
    return F.pad(torch.cat(waves, dim=1), (0, dim - part * len(shape))).float().to(device, dtype)


_kept_positions = lru_cache(maxsize=64)(_sincos_positions)


def rotary_positions(
    shape: tuple[int, ...], head_dim: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (prod(shape), head_dim) that rotate the queries and keys of a line or a grid.

    Each axis has an equal, even part of the channels; those left over are not rotated. A coordinate is the number of
    steps from the start, whatever the shape that was trained on, so that a distance means the same on each grid
    (Su et al. 2021, section 3.2.2; on two axes Heo et al. 2024, section 3.2).
    """
    part = head_dim // (2 * len(shape)) * 2
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in shape]
    tables = [get_1d_rotary_pos_embed(part, x.flatten(), use_real=True) for x in torch.meshgrid(*axes, indexing="ij")]
    rest = (0, head_dim - part * len(shape))
    cos, sin = (torch.cat(parts, dim=1) for parts in zip(*tables, strict=True))
    return F.pad(cos, rest, value=1.0), F.pad(sin, rest)
