"""What guidance needs beside a prefix."""

from dataclasses import dataclass, field
from typing import Any

from ..models.layers import VQDiTPrefix


@dataclass
class GuidedPrefix(VQDiTPrefix):
    """A prefix, and those with less that guidance compares it with. All have as many samples.

    Args:
        negative: takes the place of nothing.
        parts: of some of the given segments, by their names in the order in which guidance adds them.
    """

    negative: VQDiTPrefix | None = None
    parts: dict[tuple[str, ...], VQDiTPrefix] = field(default_factory=dict)

    def _map(self, function: Any) -> "GuidedPrefix":
        negative = None if self.negative is None else self.negative._map(function)
        parts = {names: part._map(function) for names, part in self.parts.items()}
        return GuidedPrefix(**vars(super()._map(function)), negative=negative, parts=parts)
