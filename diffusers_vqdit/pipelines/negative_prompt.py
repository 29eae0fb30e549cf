"""Guidance away from something given, in place of nothing."""

from dataclasses import dataclass
from typing import Any

import torch

from ..models.layers import VQDiTPrefix


@dataclass
class GuidedPrefix(VQDiTPrefix):
    """A prefix, and the one that takes the place of nothing in the other half of guidance.

    Args:
        negative: of as many samples.
    """

    negative: VQDiTPrefix | None = None

    def _map(self, function: Any) -> "GuidedPrefix":
        own = super()._map(function)
        negative = None if self.negative is None else self.negative._map(function)
        return GuidedPrefix(**vars(own), negative=negative)


def predict_halves(
    transformer: Any,
    codes: dict[str, torch.LongTensor],
    prefix: VQDiTPrefix | None,
    guided: bool,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Logits (B, N, K) by segment; of guidance (2B, N, K), those with the prefix first, and those without it, or with
    its negative, after them.

    A negative prefix has a pass of its own, of the same shape: equal prefixes so give equal logits, bit for bit.
    """
    negative = prefix.negative if guided and isinstance(prefix, GuidedPrefix) else None
    logits = transformer(codes, prefix=prefix, with_unconditional=guided and negative is None, **options).sample
    if negative is None:
        return logits
    other = transformer(codes, prefix=negative, **options).sample
    return {name: torch.cat([value, other[name]]) for name, value in logits.items()}
