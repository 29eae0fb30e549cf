"""What reading the pictures of a dataset and of a stream have in common: their size, crops and flips."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.utils.data import Dataset

from ..utils.decoding import decode_image, to_bytes
from ..utils.fitting import MAX_CUT
from .draws import step_generator


_DRAWS = 3  # tells the draws of a picture from others of its step


def crop_warning(cut: int, count: int, *, first: bool = False) -> str:
    """What is said where `cut` of `count` pictures, all or the first, are cropped so."""
    return (
        f"resize_mode='crop' takes more than {MAX_CUT:.0%} of the area off {cut} of {'the first ' * first}{count} "
        "pictures, which have another aspect ratio: --resize_mode auto reads those on transparent or plain ground "
        "whole, pad_border all"
    )


class ImageReader(Dataset, ABC):
    """Pictures (C, resolution, resolution) uint8 of an undecoded column.

    Args:
        dataset: with that column.
        image_column: the column's name.
        resolution: side of the pictures in pixels.
        resize_mode, interpolation: as in [`~utils.fitting.resize_image`].
        channels: C, 3 for RGB or 1 for grey.
        random_crop: cut another part out each time, in place of what `resize_mode` says.
        random_flip: mirror half of the pictures, other ones each time.
        seed: of these draws.
    """

    def __init__(
        self,
        dataset: Any,
        image_column: str,
        resolution: int,
        *,
        resize_mode: str = "crop",
        interpolation: str = "lanczos",
        channels: int = 3,
        random_crop: bool = False,
        random_flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.image_column, self.resolution, self.seed = image_column, resolution, seed
        self.resize_mode = "crop" if random_crop else resize_mode
        if channels not in (1, 3):
            raise ValueError(f"channels={channels} of the image tokenizer: pictures are read as grey (1) or RGB (3)")
        self.interpolation, self.channels = interpolation, channels
        self.random_crop, self.random_flip = random_crop, random_flip
        self._open(dataset)

    @abstractmethod
    def _open(self, dataset: Any) -> None:
        """Take the dataset, by the row or as a stream."""

    def _draw(self, position: int) -> tuple[tuple[float, float], bool]:
        """Where the picture at a position of the run's order is cut out, and whether it is mirrored."""
        if not (self.random_crop or self.random_flip):
            return (0.5, 0.5), False
        across, down, flip = torch.rand(3, generator=step_generator(self.seed, position, _DRAWS)).tolist()
        return (across, down) if self.random_crop else (0.5, 0.5), self.random_flip and flip < 0.5

    def _decode(self, value: Any, centering: tuple[float, float]) -> torch.Tensor:
        """An undecoded picture's pixels. It raises what the picture makes Pillow raise."""
        options: dict[str, Any] = {"interpolation": self.interpolation, "centering": centering}
        return to_bytes(decode_image(value, self.resolution, self.resize_mode, self.channels, **options))
