"""Model outputs that Accelerate's mixed precision can make anew."""

from collections.abc import Mapping
from dataclasses import fields

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
