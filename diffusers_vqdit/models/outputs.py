"""Model outputs that Accelerate's mixed precision can make anew."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from diffusers.utils import BaseOutput


class CastableOutput(BaseOutput):
    """An output whose first field may be a mapping of all fields.

    With mixed precision, Accelerate casts outputs to float32 and makes them anew from a mapping. The dataclass needs
    a default for every other field.
    """

    def __post_init__(self) -> None:
        values = getattr(self, fields(self)[0].name)
        if isinstance(values, Mapping):
            for name, value in dict(values).items():
                setattr(self, name, value)
        super().__post_init__()


@dataclass
class VQDiTOutput(BaseOutput):
    """Output of [`VQDiTTransformer2DModel`] with segments.

    Args:
        sample (`dict[str, torch.Tensor]`): for each generated segment logits (B, N, K) over its codes, these in
            row-major order; or (M, K) at the M masked codes only, where `masked` was given.
    """

    sample: dict[str, torch.Tensor]

    def __post_init__(self) -> None:
        # `BaseOutput` takes a first field that is a dict for the fields themselves. What makes outputs anew, as
        # Accelerate's mixed precision and torch.export do, knows no segments.
        fields = self.sample
        self["sample"] = fields["sample"] if isinstance(fields.get("sample"), dict) else fields
