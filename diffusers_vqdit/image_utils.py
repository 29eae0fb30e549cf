"""Reading pictures as the tokenizers want them."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def on_white(picture: Image.Image) -> Image.Image:
    """An RGB picture, transparent pixels on white."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def check_pixels(images: list[Any], channels: int) -> None:
    """Raise a ValueError unless all are arrays ((B,) H, W, C) or all tensors ((B,) C, H, W) of floats in [0, 1]."""
    kinds = {type(one).__name__ for one in images}
    if len(kinds) > 1 or not isinstance(images[0], np.ndarray | torch.Tensor):
        raise ValueError(
            f"image must be PIL pictures, arrays (B, H, W, C) or tensors (B, C, H, W), all of one kind, got "
            f"{', '.join(sorted(kinds))}"
        )
    for one in images:
        axis = -1 if isinstance(one, np.ndarray) else -3
        if one.ndim not in (3, 4) or 0 in tuple(one.shape) or one.shape[axis] != channels:
            order = f"(B, H, W, {channels})" if axis == -1 else f"(B, {channels}, H, W)"
            raise ValueError(f"image as {type(one).__name__} must have shape {order}, got {tuple(one.shape)}")
        floating = one.is_floating_point() if isinstance(one, torch.Tensor) else np.issubdtype(one.dtype, np.floating)
        if not floating or not (one.min() >= 0 and one.max() <= 1):
            raise ValueError(
                f"image as {type(one).__name__} must hold floats in [0, 1], got {one.dtype} from {one.min()} to "
                f"{one.max()}"
            )


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


def touched_patches(mask: torch.Tensor, size: tuple[int, int], grid: tuple[int, int]) -> torch.BoolTensor:
    """Which patches (B, *grid) of a picture resized to `size` a mask (B, 1, H, W) of zeros and ones touches."""
    mask = F.adaptive_max_pool2d(mask, size) if mask.shape[-1] > size[1] else F.interpolate(mask, size)
    return F.adaptive_max_pool2d(mask, grid)[:, 0] > 0


def fill_with_surroundings(pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Pixels (B, C, H, W) with those under a mask (B, 1, H, W) of ones made up from the known ones around them.

    Known colours spread by averaging at ever coarser resolutions, and each hole takes the finest average that has
    known pixels (pull-push, Gortler et al. 1996, section 3.4.1).
    """
    known = 1.0 - mask
    if min(pixels.shape[-2:]) == 1:
        mean = (pixels * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp_min(1e-6)
        return torch.where(mask > 0, mean, pixels)
    weight = F.avg_pool2d(known, 2, ceil_mode=True)
    coarse = F.avg_pool2d(pixels * known, 2, ceil_mode=True) / weight.clamp_min(1e-6)
    coarse = fill_with_surroundings(coarse, (weight == 0).to(pixels))
    return torch.where(mask > 0, F.interpolate(coarse, pixels.shape[-2:], mode="bilinear"), pixels)


# ---------------------------------------------------------------------------------------------------------------------
# Larger pictures by tiles


def tile_starts(size: int, tile: int) -> list[int]:
    """Where tiles begin that cover `size` pixels evenly, neighbours sharing a quarter of a tile or more."""
    if size <= tile:
        return [0]
    count = math.ceil((size - tile) / (tile - tile // 4)) + 1
    return [round(index * (size - tile) / (count - 1)) for index in range(count)]


def split_tiles(pixels: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """Tiles (B * T, C, *tile) of pictures (B, C, H, W), a picture's tiles together; a smaller picture is one tile,
    its right and bottom border repeated."""
    height, width = pixels.shape[-2:]
    pixels = F.pad(pixels, (0, max(0, tile[1] - width), 0, max(0, tile[0] - height)), mode="replicate")
    corners = [(y, x) for y in tile_starts(height, tile[0]) for x in tile_starts(width, tile[1])]
    return torch.stack([pixels[..., y : y + tile[0], x : x + tile[1]] for y, x in corners], 1).flatten(0, 1)


def join_tiles(tiles: torch.Tensor, size: tuple[int, int], factor: int) -> torch.Tensor:
    """Pictures (B, C, factor H, factor W) of tiles that [`split_tiles`] cut from (H, W) and `factor` enlarged.

    Where tiles overlap, each counts the more, the farther its own border is.
    """
    tile = tiles.shape[-2] // factor, tiles.shape[-1] // factor
    corners = [(y, x) for y in tile_starts(size[0], tile[0]) for x in tile_starts(size[1], tile[1])]
    height, width = (max(n, m) * factor for n, m in zip(size, tile, strict=True))
    parts = tiles.unflatten(0, (-1, len(corners)))  # (B, T, C, h, w)
    ramps = [
        torch.arange(n, device=tiles.device).add(1).minimum(n - torch.arange(n, device=tiles.device))
        for n in tiles.shape[-2:]
    ]
    window = (ramps[0][:, None] * ramps[1]).to(tiles)
    total = tiles.new_zeros(parts.shape[0], parts.shape[2], height, width)
    weight = tiles.new_zeros(height, width)
    for index, (y, x) in enumerate(corners):
        rows = slice(y * factor, y * factor + tiles.shape[-2])
        columns = slice(x * factor, x * factor + tiles.shape[-1])
        total[..., rows, columns] += parts[:, index] * window
        weight[rows, columns] += window
    return (total / weight)[..., : size[0] * factor, : size[1] * factor]


def back_project(pixels: torch.Tensor, lowres: torch.Tensor, steps: int = 10) -> torch.Tensor:
    """The picture (B, C, H, W) near `pixels` that is `lowres` (B, C, h, w) when made smaller: what is missing there is
    added, again and again (Irani & Peleg 1991, eq. 4)."""
    for _ in range(steps):
        missing = lowres - F.interpolate(pixels, lowres.shape[-2:], mode="bicubic", antialias=True)
        pixels = pixels + F.interpolate(missing, pixels.shape[-2:], mode="bicubic")
    return pixels.clamp(-1, 1)
