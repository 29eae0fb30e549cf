"""What sampling looks like: pictures of codes of which some are still masked."""

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image


@torch.no_grad()
def unmasking_image(segment: Any, codes: torch.LongTensor) -> list[Image.Image]:
    """Pictures of codes (B, h, w) or (B, h, w, q) of a segment of pictures, grey where they are masked.

    Args:
        segment: of the pipeline, ``pipe._segments[name]``.
        codes: int64 in [0, K], where K is the mask.
    """
    masked = codes == segment.vocab_size
    pixels = segment.vq.decode_codes(codes.masked_fill(masked, 0)).sample.float()  # (B, C, H, W) in [-1, 1]
    share = masked.reshape(*codes.shape[:3], -1).float().mean(-1)[:, None]  # (B, 1, h, w)
    pixels = torch.lerp(pixels, torch.full_like(pixels, 0.5), F.interpolate(share, pixels.shape[2:]))
    return segment.components["image_processor"].postprocess(pixels, output_type="pil")
