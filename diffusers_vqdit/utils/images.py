"""Reading pictures and masks, and fitting them to the size that a model takes."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image

from .fitting import CLEAR_ALPHA, CLEAR_SHARE, CUT_OUT, fitted_box, padding_colour, resize_image, resize_planes


# What shows a picture of an EXIF orientation as it is meant; orientation 1 needs nothing.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where a picture of Pillow's says its orientation.
_ORIENTED = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")


# ---------------------------------------------------------------------------------------------------------------------
# Pillow's pictures


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB picture as it is seen: turned as its EXIF orientation says, transparent pixels on white, and its ``info``
    saying where it is a cut-out, which [`~utils.fitting.resize_image`] never crops of itself.

    Grey values of more than 8 bits are scaled by their range: 16 bits in the modes ``I;16``; in ``I`` and ``F`` 8 bits
    where no value is above 255, else 16 bits (``I``), and floats in [0, 1] where none is above 1 (``F``).

    Raises:
        ValueError: for a picture without pixels, of a mode that can't become RGB, with values out of range, or whose
            file is broken.
    """
    return _on_background(image, "white")[0]


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """A picture as a tokenizer of so many channels sees it: [`to_rgb`] for 3, and grey for 1.

    Raises:
        ValueError: for any other number, or what [`to_rgb`] refuses.
    """
    if channels not in (1, 3):
        raise ValueError(f"image must be arrays or tensors: the tokenizer's pictures have {channels} channels")
    return to_rgb(image) if channels == 3 else to_rgb(image).convert("L")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of a picture, 1 to 8; 1 where it says none, or nothing that can be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # what a camera wrote there tells nothing of the pixels
        return 1
    return found if found in _TURNS else 1


def _turned(image: Image.Image) -> Image.Image:
    """The picture as its orientation says, which is then no longer with it.

    Pillow's own function writes all of the EXIF data anew, and fails on fields that a picture can be read without.
    """
    image.load()  # which turns some formats' pictures
    number = orientation(image)
    if number == 1:
        return image
    image = image.transpose(_TURNS[number])
    for name in _ORIENTED:
        image.info.pop(name, None)
    return image


def _on_background(image: Image.Image, background: str) -> tuple[Image.Image, bool]:
    """A picture in RGB, transparent pixels on ``"white"`` or ``"black"``, and whether it may have such pixels."""
    if not isinstance(image, Image.Image):
        raise ValueError(f"image must be a PIL picture, got {type(image).__name__}")
    if 0 in image.size:
        raise ValueError(f"image has no pixels: its size is {image.size}")
    mode, size = image.mode, image.size
    try:
        image = _turned(image)
        transparent = image.has_transparency_data
        if mode.startswith("I") or mode == "F":
            return _to_8_bits(image, background).convert("RGB"), transparent
        if mode == "La":  # Pillow would drop its alpha
            image = image.convert("LA")
        if transparent:
            image = image.convert("RGBA")
            clear = sum(image.getchannel("A").histogram()[: CLEAR_ALPHA + 1])
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
            _mark_cut_out(image, clear)
        return image.convert("RGB"), transparent
    except Exception as error:  # Pillow's plugins raise what they like on broken files
        raise ValueError(f"image of mode {mode!r} and size {size} can't be read: {error}") from error


def _mark_cut_out(image: Image.Image, clear: int) -> None:
    """Note in a picture's info, which goes with it through Pillow's conversions, that so many pixels were clear."""
    if clear > CLEAR_SHARE * image.width * image.height:
        image.info[CUT_OUT] = True


def _to_8_bits(image: Image.Image, background: str) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    steps = {"I": (255, 65535), "F": (1, 255)}.get(image.mode, (65535,))
    white = steps[0] if values.max() <= steps[0] else steps[-1]
    if not (values.min() >= 0 and values.max() <= white):
        raise ValueError(f"it has values from {values.min()} to {values.max()}, which must be in [0, {white}]")
    scaled = np.rint(values * 255 / white)
    clear = image.info.get("transparency")
    if clear is not None:
        scaled[values == clear] = 255 if background == "white" else 0
    picture = Image.fromarray(scaled.astype(np.uint8))
    _mark_cut_out(picture, 0 if clear is None else int((values == clear).sum()))
    return picture


# ---------------------------------------------------------------------------------------------------------------------
# What a pipeline is passed


def read_images(image: Any, channels: int) -> list[Image.Image] | list[torch.Tensor]:
    """Each picture of what a pipeline is passed: as a picture of Pillow's, RGB or grey, or a float32 tensor (C, H, W).

    Args:
        image: one or a list of: PIL pictures, arrays ((B,) H, W, C) or tensors ((B,) C, H, W) of floats in [0, 1], of
            any precision.
        channels: C.

    Raises:
        ValueError: if they are not all of one of these kinds, or there is none, or one that can't be read.
    """
    images = image if isinstance(image, list | tuple) else [image]
    if not images:
        raise ValueError("image=[] is an empty list; give at least one, or None")
    if all(isinstance(one, Image.Image) for one in images):
        return [to_channels(one, channels) for one in images]
    kinds = {type(one).__name__ for one in images}
    if len(kinds) > 1 or not isinstance(images[0], np.ndarray | torch.Tensor):
        raise ValueError(
            f"image must be PIL pictures, arrays (B, H, W, C) or tensors (B, C, H, W), all of one kind, got "
            f"{', '.join(sorted(kinds))}"
        )
    read: list[torch.Tensor] = []
    for one in images:
        axis = -1 if isinstance(one, np.ndarray) else -3
        if one.ndim not in (3, 4) or 0 in tuple(one.shape) or one.shape[axis] != channels:
            order = f"(B, H, W, {channels})" if axis == -1 else f"(B, {channels}, H, W)"
            raise ValueError(f"image as {type(one).__name__} must have shape {order}, got {tuple(one.shape)}")
        pixels = _to_float(one, "image")
        pixels = pixels if axis == -3 else pixels.movedim(-1, -3)
        read += pixels if pixels.ndim == 4 else [pixels]
    return read


def _to_float(values: np.ndarray | torch.Tensor, name: str) -> torch.Tensor:
    """Floats in [0, 1] of any precision as float32."""
    if isinstance(values, torch.Tensor):
        floating, pixels = values.is_floating_point(), values.detach().float()
    else:
        floating = np.issubdtype(values.dtype, np.floating)
        pixels = torch.from_numpy(np.array(values, dtype=np.float32, order="C")) if floating else values
    if not floating or not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(
            f"{name} as {type(values).__name__} must hold floats in [0, 1], got {values.dtype} from {values.min()} to "
            f"{values.max()}"
        )
    return pixels


def fit_images(
    images: list[Image.Image] | list[torch.Tensor], size: tuple[int, int], resize_mode: str
) -> torch.Tensor:
    """Pictures from [`read_images`] as (B, C, height, width) in [0, 1].

    Tensors of that size are used as they are. Others are rounded to 8 bits, and so become what Pillow makes of them.
    """
    pixels = []
    for one in images:
        if isinstance(one, torch.Tensor) and tuple(one.shape[1:]) == size:
            pixels.append(one)
        elif isinstance(one, torch.Tensor):
            pixels.append(resize_planes((one * 255).round().byte(), size, resize_mode).float() / 255)
        else:
            pixels.append(_pixels(resize_image(one, size, resize_mode)))
    return torch.stack(pixels)


def own_size(images: list[Image.Image] | list[torch.Tensor]) -> torch.Tensor:
    """Pictures from [`read_images`] at their own size, (B, C, H, W) in [0, 1]; all must have one size."""
    pixels = [_pixels(one) if isinstance(one, Image.Image) else one for one in images]
    sizes = {tuple(one.shape[1:]) for one in pixels}
    if len(sizes) > 1:
        raise ValueError(f"image: the pictures of one call must have one size here, got {sorted(sizes)}")
    return torch.stack(pixels)


def _pixels(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image))  # (H, W, 3), or (H, W) where it is grey
    return torch.atleast_3d(pixels).permute(2, 0, 1).float() / 255


def read_mask(mask_image: Any, size: tuple[int, int], count: int) -> torch.Tensor:
    """Masks as zeros and ones (count, 1, height, width): ones where a mask is nearer to white than to black.

    Args:
        mask_image: one mask or one a picture: PIL pictures of any mode, where transparent counts as black; arrays
            ((B,) H, W) or (B, H, W, 1), or tensors ((B,) H, W) or (B, 1, H, W), of bools or of floats in [0, 1].
        size: height and width of the pictures, whose aspect ratio the masks must have.
        count: how many pictures there are.

    Raises:
        ValueError: if they are something else, their number or aspect ratio doesn't fit, or they are drawn in black on
            transparent ground, which would repaint nothing.
    """
    planes = [
        plane
        for one in (mask_image if isinstance(mask_image, list | tuple) else [mask_image])
        for plane in ([_grey_mask(one)] if isinstance(one, Image.Image) else _mask_planes(one))
    ]
    if len(planes) not in (1, count):
        raise ValueError(f"mask_image has {len(planes)} masks for {count} pictures; give one, or one each")
    masks = []
    for plane in planes:
        height, width = plane.height, plane.width
        if abs(height * size[1] - width * size[0]) > max(*size, height, width):
            raise ValueError(
                f"mask_image of {height} x {width} pixels (height x width) must have the aspect ratio of the picture, "
                f"which has {size[0]} x {size[1]}"
            )
        grey = np.asarray(plane.resize((size[1], size[0]), Image.Resampling.LANCZOS))
        masks.append(torch.from_numpy(grey >= 128).float()[None])
    return torch.stack(masks).expand(count, -1, -1, -1)


def _grey_mask(mask: Image.Image) -> Image.Image:
    try:
        rgb, transparent = _on_background(mask, "black")
    except ValueError as error:
        raise ValueError(f"mask_image: {error}") from error
    grey = rgb.convert("L")
    if transparent and np.asarray(grey).max() < 128:
        raise ValueError(
            "mask_image is transparent or black everywhere, so that nothing would be repainted: paint white where to "
            "repaint"
        )
    return grey


def _mask_planes(mask: Any) -> list[Image.Image]:
    if not isinstance(mask, np.ndarray | torch.Tensor):
        raise ValueError(
            f"mask_image must be PIL pictures, arrays ((B,) H, W) or (B, H, W, 1), or tensors ((B,) H, W) or "
            f"(B, 1, H, W), got {type(mask).__name__}"
        )
    shape, axis = tuple(mask.shape), -1 if isinstance(mask, np.ndarray) else -3
    if len(shape) not in (2, 3, 4) or 0 in shape or (len(shape) == 4 and shape[axis] != 1):
        order = "((B,) H, W) or (B, H, W, 1)" if axis == -1 else "((B,) H, W) or (B, 1, H, W)"
        raise ValueError(f"mask_image as {type(mask).__name__} must have shape {order}, got {shape}")
    if len(shape) > 2 and shape[axis] == 1:
        mask = mask.squeeze(axis)
    if mask.dtype in (torch.bool, np.bool_):
        planes = torch.as_tensor(mask).float()
    else:
        planes = _to_float(mask, "mask_image")
    planes = (planes * 255).round().byte().cpu().view(-1, *planes.shape[-2:])
    return [Image.fromarray(plane.numpy()) for plane in planes]


# ---------------------------------------------------------------------------------------------------------------------
# Tensors of pixels


def resize(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pixels (B, C, H, W) in [-1, 1] resized to (height, width) by bicubic interpolation, antialiased as Pillow's."""
    return F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(-1, 1)


def lower_resolution(pixels: torch.Tensor, factor: int) -> torch.Tensor:
    """Pixels (B, C, H, W) in [-1, 1] without their finest details: `factor` times smaller, and back to their size."""
    height, width = pixels.shape[-2:]
    return resize(resize(pixels, (height // factor, width // factor)), (height, width))


def shift_and_scale(pixels: torch.Tensor, generator: torch.Generator | list[torch.Generator]) -> torch.Tensor:
    """Pictures (B, C, H, W), each moved by up to 1/16 of its side and made up to 10 % smaller or larger.

    What this uncovers takes the colour of the nearest border pixel.

    Args:
        generator: one, or one a picture.
    """
    if isinstance(generator, list):
        scale, shift = torch.stack([torch.rand(3, 1, generator=one) for one in generator]).split([1, 2], dim=1)
    else:
        scale, shift = (torch.rand(len(pixels), count, 1, generator=generator) for count in (1, 2))
    scale = 1.0 + 0.1 * (2.0 * scale - 1.0)
    shift = 0.125 * (2.0 * shift - 1.0)  # the side is 2 here
    theta = torch.cat([scale * torch.eye(2), shift], dim=2).to(pixels)  # (B, 2, 3)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(-1, 1)


def resize_pixels(pixels: torch.Tensor, size: tuple[int, int], resize_mode: str = "pad") -> torch.Tensor:
    """Pixels (B, C, H, W) in [-1, 1] made `size` (height, width) without distortion, as [`resize_image`] does."""
    height, width = pixels.shape[-2:]
    top, left, *fitted = fitted_box((height, width), size)
    inner = (
        min(height, max(1, round(width * size[0] / size[1]))),
        min(width, max(1, round(height * size[1] / size[0]))),
    )
    upper, side = (height - inner[0]) // 2, (width - inner[1]) // 2
    found = []
    for one in pixels:
        planes = ((one + 1) * 127.5).round().byte().movedim(0, -1).cpu().numpy()
        colour = padding_colour(planes, size, resize_mode)
        if colour is None:
            found.append(resize(one[None, :, upper : upper + inner[0], side : side + inner[1]], size))
            continue
        canvas = (one.new_tensor(colour) / 127.5 - 1.0).view(-1, 1, 1).expand(-1, *size).clone()
        canvas[:, top : top + fitted[0], left : left + fitted[1]] = resize(one[None], (fitted[0], fitted[1]))[0]
        found.append(canvas[None])
    return torch.cat(found)


def cut_out(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The picture (B, C, *size) that was fitted whole into pixels (B, C, H, W) in [-1, 1], by [`resize_pixels`]."""
    top, left, height, width = fitted_box(size, tuple(pixels.shape[-2:]))
    return resize(pixels[..., top : top + height, left : left + width], size)


def touched_patches(mask: torch.Tensor, size: tuple[int, int], grid: tuple[int, int]) -> torch.BoolTensor:
    """Which patches (B, *grid) of a picture fitted whole into `size` a mask (B, 1, H, W) of zeros and ones touches."""
    top, left, height, width = fitted_box(tuple(mask.shape[-2:]), size)
    if mask.shape[-2] > height or mask.shape[-1] > width:
        mask = F.adaptive_max_pool2d(mask, (height, width))
    else:
        mask = F.interpolate(mask, (height, width))
    mask = F.pad(mask, (left, size[1] - left - width, top, size[0] - top - height))
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
    placed = ((y * factor, x * factor, parts[:, index]) for index, (y, x) in enumerate(corners))
    return blend_tiles(placed, (height, width))[..., : size[0] * factor, : size[1] * factor]


def blend_tiles(tiles: Iterable[tuple[int, int, torch.Tensor]], size: tuple[int, int]) -> torch.Tensor:
    """Pictures (B, C, *size) of tiles (top, left, (B, C, h, w)) that cover them: each pixel a mean, weighted by a ramp
    that falls to the tiles' borders."""
    total: Any = None
    weight: Any = None
    for top, left, tile in tiles:
        if total is None:
            total, weight = tile.new_zeros(*tile.shape[:2], *size), tile.new_zeros(size)
        positions = [torch.arange(n, device=tile.device, dtype=tile.dtype) for n in tile.shape[2:]]
        vertical, horizontal = (torch.minimum(x + 1, len(x) - x) for x in positions)
        ramp = vertical[:, None] * horizontal
        rows, columns = slice(top, top + tile.shape[2]), slice(left, left + tile.shape[3])
        total[..., rows, columns] += tile * ramp
        weight[rows, columns] += ramp
    return total / weight


def back_project(pixels: torch.Tensor, lowres: torch.Tensor, steps: int = 10) -> torch.Tensor:
    """The picture (B, C, H, W) near `pixels` that is `lowres` (B, C, h, w) when made smaller: what is missing there is
    added, again and again (Irani & Peleg 1991, eq. 4)."""
    for _ in range(steps):
        missing = lowres - F.interpolate(pixels, lowres.shape[-2:], mode="bicubic", antialias=True)
        pixels = pixels + F.interpolate(missing, pixels.shape[-2:], mode="bicubic")
    return pixels.clamp(-1, 1)
