"""Pictures of a dataset's column, as they are stored, to tensors."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from PIL import Image, TiffImagePlugin

from .checks import shown
from .fitting import resize_image
from .images import orientation, to_channels


def decode_image(
    value: dict,
    resolution: int | tuple[int, int],
    resize_mode: str = "crop",
    channels: int = 3,
    interpolation: str = "lanczos",
    centering: tuple[float, float] = (0.5, 0.5),
) -> torch.Tensor:
    """One undecoded picture of a `datasets` image column as a (C, height, width) float tensor in [-1, 1].

    Args:
        value: ``{"bytes": bytes or None, "path": str or None}``; the path is read where there are no bytes.
        resolution: height and width of the result; one number for both.
        resize_mode, interpolation, centering: as in [`~utils.fitting.resize_image`].
        channels: C, 3 for RGB or 1 for grey.

    Raises:
        ValueError: if there are neither bytes nor the path of a regular file, or they are no picture that Pillow can
            read as RGB ([`~utils.images.to_rgb`]).
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    with _opened(value) as picture:
        picture = to_channels(picture, channels)
        picture = resize_image(picture, (height, width), resize_mode, interpolation, centering)
        data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return to_pixels(data.view(height, width, channels).permute(2, 0, 1))


def image_size(value: dict) -> tuple[int, int]:
    """Height and width of an undecoded picture as it is seen: turned as its EXIF orientation says.

    Raises:
        ValueError: as [`decode_image`], as far as its header tells.
    """
    with _opened(value) as picture:
        width, height = picture.size
        if isinstance(picture, TiffImagePlugin.TiffImageFile):  # Pillow's versions differ in whose size it is
            width, height = picture.tag_v2[TiffImagePlugin.IMAGEWIDTH], picture.tag_v2[TiffImagePlugin.IMAGELENGTH]
        return (width, height) if orientation(picture) >= 5 else (height, width)


@contextmanager
def _opened(value: dict) -> Iterator[Image.Image]:
    """A picture of Pillow's, whose pixels are not read yet."""
    data: Any = value.get("bytes") if isinstance(value, dict) else None
    path: Any = value.get("path") if isinstance(value, dict) else None
    if data is None and path is None:
        raise ValueError(f"the picture is missing: it must have bytes or a path, got {shown(value)}")
    # A pipe would block, and Pillow would say of a folder that it may not be read.
    if data is None and not os.path.isfile(path):
        raise ValueError(f"the picture's path {shown(path)} is not a regular file")
    try:
        Image.init()
        # EPS pictures are programs that Ghostscript runs, for as long as they like.
        formats = [name for name in Image.ID if name != "EPS"]
        picture: Image.Image = Image.open(io.BytesIO(data) if data is not None else path, formats=formats)
    except Exception as error:  # besides OSError, a plugin may raise anything on bytes that are no picture
        named = "the picture" if path is None else f"the picture {shown(path)}"
        raise ValueError(f"{named} can't be read: {error}") from error
    with picture:
        yield picture


def place(value: Any, row: int) -> str:
    """Where a row's undecoded value is: its path, or the row."""
    return (value.get("path") if isinstance(value, dict) else None) or f"in row {row}"


def to_pixels(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 pictures as float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1.0


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """float32 pictures in [-1, 1] as uint8."""
    return ((pixels + 1.0) * 127.5).round().to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Columns of a dataset


def as_picture_column(dataset, column: str):
    """The dataset with a column of pictures as one of undecoded `datasets.Image`.

    Raises:
        ValueError: that names the column and its type, unless it is of bytes, paths, structs of them, or arrays.
    """
    datasets = import_module("datasets")  # of training alone: an import would be asked of all who draw
    feature, kind, accepted = dataset.features[column], dataset.data.schema.field(column).type, False
    if isinstance(feature, datasets.Image):
        accepted = True
    elif isinstance(feature, datasets.Value):
        accepted = feature.dtype in _BYTES + _PATHS
        # Image is cast to from the plain types alone.
        plain = {"string_view": "large_string", "binary_view": "large_binary"}.get(feature.dtype)
        if feature.dtype.startswith("fixed_size_binary"):
            accepted, plain = True, "large_binary"
        if plain is not None:
            dataset = dataset.cast_column(column, datasets.Value(plain))
    elif isinstance(feature, dict):
        known = {"bytes": (*_BYTES, "null"), "path": (*_PATHS, "null")}
        fields = {name: getattr(feature[name], "dtype", "") for name in known if name in feature}
        accepted = bool(fields) and all(
            dtype in known[name] or (name == "bytes" and dtype.startswith("fixed_size_binary"))
            for name, dtype in fields.items()
        )
    else:
        accepted = _array_depth(feature) in (2, 3)
    if not accepted:
        raise ValueError(
            f"column {column!r} has the type {kind}; pictures must be bytes of a "
            "picture file, paths, structs with 'bytes', 'path' or both, or arrays of (H, W) or (H, W, C) integers"
        )
    try:
        return dataset.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # of Arrow and numpy, for arrays that are ragged or out of range
        raise ValueError(f"column {column!r} has the type {kind}, and values that are no pictures: {error}") from error


_BYTES = ("binary", "large_binary", "binary_view")
_PATHS = ("string", "large_string", "string_view")


def _array_depth(feature: Any) -> int:
    """Dimensions of a column of arrays of integers; 0 for any other."""
    if hasattr(feature, "shape"):
        return len(feature.shape) if "int" in feature.dtype else 0
    depth = 0
    while hasattr(feature, "feature"):
        feature, depth = feature.feature, depth + 1
    return depth if re.fullmatch(r"u?int\d+", getattr(feature, "dtype", "") or "") else 0
