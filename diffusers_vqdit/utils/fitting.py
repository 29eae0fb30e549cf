"""Making pictures of any aspect ratio the size that a model takes, without distortion: cropped, or whole."""

import numpy as np
import torch
from PIL import Image, ImageOps


# "crop" cuts the middle out; "pad" fits the whole picture on white, "pad_border" on the colour of its border; "auto"
# does the second for a cut-out, the third where the picture stands on plain ground, and crops else.
RESIZE_MODES = ("crop", "pad", "pad_border", "auto")
INTERPOLATION_MODES = tuple(method.name.lower() for method in Image.Resampling)

MAX_CUT = 0.05  # of a picture's area, that is cropped without a word

# Ground is plain where so large a share of the border's pixels differs from their median by so little.
GROUND_SHARE, GROUND_TOLERANCE = 0.6, 12

# A cut-out has so large a share of pixels that are at most so opaque, of 255. Once they are white, nothing but this
# entry in the `info` of a picture tells it from a photograph, where what is drawn reaches its border.
CLEAR_SHARE, CLEAR_ALPHA = 0.01, 25
CUT_OUT = "cut_out"


def fitted_box(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a picture (height, width) that is fitted whole into the middle of a canvas."""
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    height, width = (max(1, round(n * scale)) for n in size)
    return (canvas[0] - height) // 2, (canvas[1] - width) // 2, height, width


def cuts_much(size: tuple[int, int], canvas: tuple[int, int]) -> bool:
    """Whether a picture (height, width) that is cropped to fill a canvas loses more than `MAX_CUT` of its area."""
    scale = max(canvas[0] / size[0], canvas[1] / size[1])
    return canvas[0] * canvas[1] < (1 - MAX_CUT) * size[0] * size[1] * scale**2


def fitting_mode(image: Image.Image | torch.Tensor, resize_mode: str) -> str:
    """`resize_mode` for a picture from [`~utils.images.read_images`]: where it is "auto", a cut-out is fitted whole,
    on the white that was transparent. Tensors don't say what was."""
    cut_out = isinstance(image, Image.Image) and image.info.get(CUT_OUT) is True
    return "pad" if resize_mode == "auto" and cut_out else resize_mode


def padding_colour(pixels: np.ndarray, size: tuple[int, int], resize_mode: str) -> tuple[int, ...] | None:
    """What is around a picture (H, W, C) of bytes that is fitted whole into `size` (height, width), of each channel;
    None where it is cropped."""
    height, width, channels = pixels.shape
    if resize_mode == "crop":
        return None
    if resize_mode == "pad":
        return (255,) * channels
    if resize_mode == "auto" and height * size[1] == width * size[0]:
        return None  # nothing is cut off
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]]).astype(np.int16)  # (P, C)
    ground = np.median(border, axis=0).round().astype(np.int16)
    plain = (np.abs(border - ground).max(1) <= GROUND_TOLERANCE).mean() >= GROUND_SHARE
    return tuple(ground.tolist()) if plain or resize_mode == "pad_border" else None


def resize_image(
    image: Image.Image,
    size: tuple[int, int],
    resize_mode: str = "crop",
    interpolation: str = "lanczos",
    centering: tuple[float, float] = (0.5, 0.5),
) -> Image.Image:
    """A picture made `size` (height, width) without distortion.

    Args:
        image: of mode ``RGB`` or ``L``, from [`~utils.images.to_channels`] where it may have had transparent pixels.
        size: height and width of the result.
        resize_mode: one of `RESIZE_MODES`.
        interpolation: one of `INTERPOLATION_MODES`.
        centering: where the part that a crop keeps lies, across and down: 0 is left and top, 1 right and bottom.
    """
    pixels = np.asarray(image)
    mode = fitting_mode(image, resize_mode)
    colour = padding_colour(pixels if pixels.ndim == 3 else pixels[..., None], size, mode)
    return _fit(image, size, colour, Image.Resampling[interpolation.upper()], centering)


def resize_planes(planes: torch.Tensor, size: tuple[int, int], resize_mode: str) -> torch.Tensor:
    """A picture (C, H, W) of bytes as [`resize_image`] makes it, (C, height, width)."""
    array = planes.cpu().numpy()
    colour = padding_colour(array.transpose(1, 2, 0), size, resize_mode) or (None,) * len(array)
    fitted = [
        np.asarray(_fit(Image.fromarray(one), size, None if grey is None else (grey,), Image.Resampling.LANCZOS))
        for one, grey in zip(array, colour, strict=True)
    ]
    return torch.from_numpy(np.stack(fitted)).to(planes.device)


def _fit(
    image: Image.Image,
    size: tuple[int, int],
    colour: tuple[int, ...] | None,
    method: Image.Resampling,
    centering: tuple[float, float] = (0.5, 0.5),
) -> Image.Image:
    height, width = size
    if colour is None:
        return ImageOps.fit(image, (width, height), method, centering=centering)
    top, left, inner_height, inner_width = fitted_box((image.height, image.width), size)
    canvas = Image.new(image.mode, (width, height), colour if len(colour) > 1 else colour[0])
    canvas.paste(image.resize((inner_width, inner_height), method), (left, top))
    return canvas
