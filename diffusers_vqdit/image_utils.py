"""Reading pictures as the tokenizers want them."""

import torch
import torch.nn.functional as F
from PIL import Image


def on_white(picture: Image.Image) -> Image.Image:
    """An RGB picture, transparent pixels on white."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pixels (B, C, H, W) in [-1, 1] resized to (height, width) by bicubic interpolation, antialiased as Pillow's."""
    return F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(-1, 1)


def lower_resolution(pixels: torch.Tensor, factor: int) -> torch.Tensor:
    """Pixels (B, C, H, W) in [-1, 1] without their finest details: `factor` times smaller, and back to their size."""
    height, width = pixels.shape[-2:]
    return resize(resize(pixels, (height // factor, width // factor)), (height, width))


def shift_and_scale(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures (B, C, H, W), each moved by up to 1/16 of its side and made up to 10 % smaller or larger.

    What this uncovers takes the colour of the nearest border pixel.
    """
    batch_size = len(pixels)
    scale = 1.0 + 0.1 * (2.0 * torch.rand(batch_size, 1, 1, generator=generator) - 1.0)
    shift = 0.125 * (2.0 * torch.rand(batch_size, 2, 1, generator=generator) - 1.0)  # the side is 2 here
    theta = torch.cat([scale * torch.eye(2), shift], dim=2).to(pixels)  # (B, 2, 3)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(-1, 1)
