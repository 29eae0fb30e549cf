"""Long texts by blocks: each is denoised given all clean blocks before it (Arriola et al. 2025, BD3-LM)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..utils.checks import check_integer
from .layers import VQDiTPrefix
from .segment_layers import ordered_codes


class BlockCausal:
    """The part of [`VQDiTTransformer2DModel`] for segments with a ``block_length``.

    Clean blocks stand in the prefix, and are seen by themselves, by the clean blocks after them and by the block that
    is generated: block-causal, so that their keys and values are appended and never computed again. They have the role
    of the generated segment, as what they are is that segment without masks.
    """

    # The model's, of diffusers and of its other parts
    config: Any
    transformer_blocks: nn.ModuleList
    _embed: Callable[..., Any]
    _conditioning: Callable[..., torch.Tensor]
    _block: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    @apply_forward_hook
    def extend_prefix(
        self, prefix: VQDiTPrefix | None, clean: dict[str, torch.LongTensor], *, block_length: int | None = None
    ) -> VQDiTPrefix:
        """The prefix with the next blocks of a generated segment, which follow those that it has.

        Args:
            prefix: of what is given and of earlier blocks; None for neither.
            clean: the segment -> its codes (B, n), all known; n of whole blocks.
            block_length: codes a block; by default the segment's.

        Raises:
            ValueError: for another segment than one with blocks, or codes that don't fit.
        """
        codes = ordered_codes(clean, self.config.segments, "clean")
        name, value, block_length = self._of_blocks(codes, block_length)
        if prefix is not None and len(prefix) != len(value):
            raise ValueError(f"prefix has {len(prefix)} samples, but clean {len(value)}")
        start = prefix.offsets.get(name, 0) if prefix is not None else 0
        hidden_states, lengths, rotary = self._embed(codes, {name: start})  # (B, n, D)
        number = torch.arange(value.shape[1], device=value.device) // block_length  # (n,)
        mask = None
        if value.shape[1] > block_length or (prefix is not None and prefix.mask is not None):
            mask = with_prefix(prefix, number[:, None] >= number)  # (1 or B, 1, n, S + n)
        time = value.new_zeros(len(value), dtype=torch.float32) if self.config.time_conditioned else None
        conditioning = self._conditioning(codes, generated=True, timestep=time)
        keys, values = [], []
        for layer, block in enumerate(self.transformer_blocks):
            memory = (prefix.keys[layer], prefix.values[layer]) if prefix is not None else None
            last = block is self.transformer_blocks[-1]
            hidden_states, key, value_of = self._block(
                block, hidden_states, conditioning, lengths, memory, last, rotary, mask
            )
            keys.append(key if memory is None else torch.cat([memory[0], key], dim=1))
            values.append(value_of if memory is None else torch.cat([memory[1], value_of], dim=1))
        seen = None
        if prefix is not None and prefix.mask is not None:
            seen = torch.cat([prefix.mask, prefix.mask.new_ones(len(value), 1, 1, value.shape[1])], dim=-1)
        names = prefix.names if prefix is not None else ()
        return VQDiTPrefix(names, keys, values, seen, {name: start + value.shape[1]})

    def _clean_blocks(
        self,
        codes: dict[str, torch.LongTensor],
        clean: dict[str, torch.LongTensor],
        prefix: VQDiTPrefix | None,
        sampled: bool,
    ) -> tuple[VQDiTPrefix | None, torch.BoolTensor | None]:
        """The prefix with all clean blocks but the last, and the mask (1 or B, 1, n, S + n) with which each block of
        noised codes (B, n) sees those before it and itself; None where there is one block and nothing to mask."""
        if sampled:
            raise ValueError(
                "clean needs with_unconditional=False, and neither modulation nor cache, which are for single blocks"
            )
        name, value, block_length = self._of_blocks(ordered_codes(clean, self.config.segments, "clean"))
        if list(codes) != [name] or codes[name].shape != value.shape:
            found = {one: tuple(other.shape) for one, other in codes.items()}
            raise ValueError(
                f"clean is of {name!r} and {tuple(value.shape)}; hidden_states must be the same, got {found}"
            )
        if prefix is not None and prefix.offsets:
            raise ValueError("clean are all the blocks; give a prefix of the given segments alone")
        rest = value.shape[1] - block_length
        number = torch.arange(value.shape[1], device=value.device) // block_length
        mask = number[:, None] == number  # (n, n)
        if not rest:
            return prefix, None if prefix is None or prefix.mask is None else with_prefix(prefix, mask)
        prefix = replace(self.extend_prefix(prefix, {name: value[:, :rest]}), offsets={})
        mask = torch.cat([number[:, None] > number[:rest], mask], dim=1)  # (n, n - L + n)
        return prefix, with_prefix(prefix, mask, rest)

    def _of_blocks(
        self, codes: dict[str, torch.LongTensor], block_length: int | None = None
    ) -> tuple[str, torch.LongTensor, int]:
        """The one segment of blocks that codes are of, its codes (B, n), and its block length."""
        known = {n: one["block_length"] for n, one in self.config.segments.items() if "block_length" in one}
        (name, value), *others = codes.items()
        if name not in known or others:
            raise ValueError(f"clean={list(codes)} must be one segment with a block_length, of {list(known)}")
        length = known[name] if block_length is None else check_integer("block_length", block_length, 1)
        if value.shape[1] % length:
            raise ValueError(f"clean[{name!r}] has {value.shape[1]} codes, which are no whole blocks of {length}")
        return name, value, length


def equal_spans(lengths: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The lengths of so many equal parts of one segment's positions, each of a time of its own.

    Raises:
        ValueError: for positions that don't fall into them.
    """
    if len(lengths) > 1 or lengths[0] % count:
        raise ValueError(f"timestep has {count} times a sample, but the generated segments have {lengths} positions")
    return (lengths[0] // count,) * count


def with_prefix(prefix: VQDiTPrefix | None, mask: torch.BoolTensor, own: int = 0) -> torch.BoolTensor:
    """A mask (n, m) of some positions as one that all of them see the prefix by, too: (1 or B, 1, n, S + m); of the
    prefix's S positions the last `own` are in the mask already."""
    if prefix is None:
        return mask[None, None]
    size = prefix.keys[0].shape[1] - own
    if prefix.mask is None:
        return torch.cat([mask.new_ones(len(mask), size), mask], dim=1)[None, None]
    seen = prefix.mask[..., :size].expand(-1, -1, len(mask), -1)  # (B, 1, n, S)
    return torch.cat([seen, mask.expand(len(seen), 1, -1, -1)], dim=-1)
