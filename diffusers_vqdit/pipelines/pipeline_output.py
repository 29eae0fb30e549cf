"""What the pipeline over codes gives back."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class VQDiTPipelineOutput(BaseOutput):
    """Output of [`VQDiTPipeline`]; None for what was not generated.

    Args:
        images: list of PIL pictures, array (B, H, W, C) or tensor (B, C, H, W) in [0, 1], or codes (B, h, w).
        texts: list of strings, or codes (B, L).
        labels: list of label names, or codes (B, 1).
        segments: all that was generated, by the segment's name. Where a task generates several pictures or several
            texts, `images` and `texts` are the first of them by name.
        audios: list of sounds (T,), arrays or with ``output_type="pt"`` tensors, or codes (B, n, q).
        sampling_rate: of `audios`, in Hz; None of codes.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None = None
    texts: list[str] | torch.Tensor | None = None
    labels: list[str] | torch.Tensor | None = None
    segments: dict[str, Any] | None = None
    audios: list[np.ndarray] | list[torch.Tensor] | torch.Tensor | None = None
    sampling_rate: int | None = None

    def as_tuple(self, made: list[str]) -> tuple:
        """What ``return_dict=False`` gives: pictures, texts and labels, and all fields where something was made that
        is none of these. `made` is the field of each segment, or empty."""
        usual = ("images", "texts", "labels")
        more = () if set(made) <= set(usual) else ("segments", "audios", "sampling_rate")
        return tuple(getattr(self, name) for name in (*usual, *more))
