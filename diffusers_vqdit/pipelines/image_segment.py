"""Pictures as segments, and low-resolution ones that others are made from."""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from ..models.image_vq import ImageVQModel
from ..models.segment_layers import segment_patch
from ..utils.buckets import check_bucket_steps, check_buckets, nearest_bucket
from ..utils.checks import check_choice, check_integer, shown
from ..utils.components import find_component
from ..utils.decoding import as_picture_column, decode_image, image_size, place, to_bytes, to_pixels
from ..utils.fingerprints import tensor_sha256
from ..utils.fitting import cuts_much
from ..utils.images import (
    back_project,
    cut_out,
    fill_with_surroundings,
    fit_images,
    join_tiles,
    lower_resolution,
    own_size,
    read_images,
    read_mask,
    resize,
    resize_pixels,
    shift_and_scale,
    split_tiles,
    touched_patches,
)
from .check_inputs import MAX_SIDE
from .segment_base import ARGUMENTS, ColumnReader, EncodedValue, SegmentProcessor, forget_positions


class ImageReader(ColumnReader):
    """A column of pictures. Takes ``"resolution"``, or ``"buckets"`` of [height, width] in pixels; ``"resize_mode"``,
    ``"interpolation"``, ``"augmentations"``, and ``"lowres_of"`` with ``"factor"``."""

    feature = "Image"

    def __init__(
        self,
        dataset: Any,
        column: str,
        tokenizer: Any = None,
        beside: Any = None,
        *,
        resolution: int | None = None,
        buckets: list[list[int]] | None = None,
        resize_mode: str = "crop",
        interpolation: str = "lanczos",
        augmentations: int = 0,
        lowres_of: str | None = None,
        factor: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(dataset, column, tokenizer)
        resolution = resolution or tokenizer.config.sample_size
        self.sizes = [(height, width) for height, width in buckets or [[resolution, resolution]]]
        self.num_groups, self.resize_mode, self.interpolation = len(buckets or []), resize_mode, interpolation
        self.channels = tokenizer.config.in_channels
        if self.channels not in (1, 3):
            raise ValueError(
                f"column {column!r}: its tokenizer takes pictures of {self.channels} channels; files have 1 or 3"
            )
        self.geometry = {"centered_positions": True}
        self.factor = factor if lowres_of is not None else None
        if lowres_of is not None:
            self.entry = {"lowres_of": lowres_of, "factor": factor}
        self.augmentations = 0 if self.factor else augmentations
        self.settings = {"resize_mode": resize_mode, "image_augmentations": augmentations}
        if interpolation != "lanczos":
            self.settings["image_interpolation_mode"] = interpolation
        step, name = tokenizer.downsample_factor, "resolution" if buckets is None else "aspect_ratio_buckets"
        check_bucket_steps(name, self.sizes, (step, step), f"a code of column {column!r}")
        if self.factor is not None:
            check_bucket_steps(name, self.sizes, (self.factor, self.factor), f"lowres_factor={factor}")
        if buckets is None:
            self.settings = {"resolution": resolution, **self.settings}
        else:
            self.settings["aspect_ratio_buckets"] = buckets
            self.entry["buckets"] = [[height // step, width // step] for height, width in buckets]

    @classmethod
    def cast(cls, dataset: Any, column: str) -> Any:
        return as_picture_column(dataset, column)

    @property
    def reads(self) -> tuple:
        return (*super().reads, *self.sizes, self.resize_mode, self.interpolation, self.channels)

    def group_of(self, row: int) -> int:
        """The bucket nearest in aspect ratio. A picture that can't be read is in the first, until it is left out."""
        try:
            return nearest_bucket(image_size(self.dataset[row][self.column]), self.sizes)
        except Exception:  # of any kind, as in `read`, which tells it
            return 0

    def is_cut(self, row: int) -> bool:
        """Whether the picture is cropped, and much of it."""
        if self.resize_mode != "crop":
            return False
        return cuts_much(image_size(self.dataset[row][self.column]), self.sizes[self.group])

    def read(self, row: int) -> torch.Tensor:
        """uint8 (C, height, width)."""
        value = self.dataset[row][self.column]
        size, options = self.sizes[self.group], (self.resize_mode, self.channels, self.interpolation)
        return to_bytes(decode_image(value, size, *options))

    def placed(self, row: int) -> str:
        return place(self.dataset[row][self.column], row)

    def digest(self, values: list) -> bytes:
        return tensor_sha256(torch.stack(values)).encode()

    def encode(self, values: list, batch_size: int) -> list[torch.LongTensor]:
        factor = self.factor
        return self._encode(values, batch_size, (lambda x: lower_resolution(x, factor)) if factor else lambda x: x)

    def moved(self, values: list, batch_size: int) -> list[list[torch.LongTensor]]:
        # Drawn from what the picture is: whatever else is encoded, in whatever order and by whom.
        seeds = [int(tensor_sha256(one)[:15], 16) for one in values] if self.augmentations else []
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return [self._encode(values, batch_size, shift_and_scale, generators) for _ in range(self.augmentations)]

    def _encode(
        self, values: list, batch_size: int, change: Any, generators: list[torch.Generator] | None = None
    ) -> list[torch.LongTensor]:
        parts, vq = [], self.tokenizer
        for start in range(0, len(values), batch_size):
            own = slice(start, start + batch_size)
            pixels = to_pixels(torch.stack(values[own]))
            pixels = change(pixels) if generators is None else change(pixels, generators[own])
            parts.append(vq.encode_codes(pixels.to(vq.device)).cpu())
        return list(torch.cat(parts)[:, None])


class ImageSegment(SegmentProcessor):
    """Pictures on a grid of codes."""

    options = ("lowres_of", "factor", "buckets")
    ndims = (2, 3)
    tokenizer = "image_vq"
    reader = ImageReader
    noun = "picture"
    output_field = "images"
    takes_mask = True
    has_size = True
    guidance_scale = 3.0
    how_to_pass = "give mask_image to repaint a part or strength to repair it; this checkpoint can't enlarge pictures"

    @classmethod
    def load_tokenizer(cls, name: str, *, cache_dir: str | None = None, **options: Any) -> tuple[Any, Any]:
        """The image tokenizer in a folder or Hub repository: its own, a pipeline's, or a subfolder such as
        ``user/model/image_vq``."""
        source, folder = find_component(name, cls.tokenizer, cache_dir)
        model = ImageVQModel.from_pretrained(source, subfolder=folder or None, cache_dir=cache_dir, **options)
        return model, None

    @classmethod
    def check_entry(cls, where: str, entry: dict[str, Any], name: str, segments: Mapping[str, Any]) -> dict[str, Any]:
        entry = super().check_entry(where, entry, name, segments)
        if "lowres_of" in entry:
            others = [n for n in segments if n != name and len(segments[n]["shape"]) == len(segments[name]["shape"])]
            check_choice(f"{where}['lowres_of']", entry["lowres_of"], others)
            entry["factor"] = check_integer(f"{where}['factor']", entry.get("factor", 2), 2)
        elif "factor" in entry:
            raise ValueError(f"{where}['factor']={shown(entry['factor'])} needs 'lowres_of' beside it")
        if "buckets" in entry:
            argument, shape = f"{where}['buckets']", list(segments[name]["shape"][:2])
            entry["buckets"] = buckets = check_buckets(argument, entry["buckets"])
            if buckets[0] != shape:
                raise ValueError(f"{argument}={shown(buckets)} must begin with {shape}, the transformer's grid")
            check_bucket_steps(argument, buckets, segment_patch(dict(segments), name)[:2], "a position")
        return entry

    @classmethod
    def known_options(cls, entry: Mapping[str, Any], geometry: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        return {"resolution": geometry["shape"][0] * tokenizer.downsample_factor}

    @property
    def buckets(self) -> list[list[int]]:
        return self.entry.get("buckets", [])

    def bucket_of(self, values: list) -> list[int]:
        """The grid of the bucket that is nearest in aspect ratio to all of some pictures.

        Raises:
            ValueError: if they have several nearest ones: a sample must not depend on what else is in its batch.
        """
        sizes = [height_and_width(one) for one in values]
        found = [nearest_bucket(size, self.buckets) for size in sizes]
        if (other := next((index for index, one in enumerate(found) if one != found[0]), None)) is not None:
            first, second = (f"{sizes[i][0]} x {sizes[i][1]}" for i in (0, other))
            raise ValueError(
                f"{self.argument} has pictures of {first} and {second} pixels (height x width), which belong to "
                f"different grids of {self.buckets}: call once for each aspect ratio, or give height and width"
            )
        return self.buckets[found[0]]

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width in pixels."""
        factor = self.vq.downsample_factor
        return self.shape[0] * factor, self.shape[1] * factor

    def shape_of(self, height: int | None, width: int | None, patch: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the codes of pictures of a size in pixels; None for that of the training.

        Raises:
            ValueError: unless it is a multiple of what a position covers.
        """
        sides = []
        for argument, size, codes, own in zip(
            ("height", "width"), (height, width), patch[:2], self.resolution, strict=True
        ):
            step = self.vq.downsample_factor * codes
            size = own if size is None else check_integer(argument, size, step, MAX_SIDE)
            if size % step:
                raise ValueError(
                    f"{argument}={size} must be a multiple of {step}, what one position covers, such as "
                    f"{size // step * step} or {-(-size // step) * step}"
                )
            sides.append(size // self.vq.downsample_factor)
        return (*sides, *self.shape[2:])

    def read(self, value: Any) -> list:
        try:
            return read_images(value, self.vq.config.in_channels)
        except ValueError as error:
            if self.argument in ARGUMENTS:
                raise
            raise ValueError(f"{self.argument}: {error}") from error

    def read_mask(self, mask_image: Any, values: list) -> torch.Tensor:
        pixels = own_size(values)
        return read_mask(mask_image, tuple(pixels.shape[-2:]), len(pixels))

    def own_size(self, values: Any) -> torch.Tensor:
        """Pictures at their own size, (B, C, H, W) in [0, 1]; all must have one size."""
        return own_size(self.read(values)).to(self.device())

    def encode(self, values: Any) -> torch.LongTensor:
        """Codes (B, h, w) of pictures, resized without distortion: cropped or padded, by `resize_mode`."""
        pixels = fit_images(self.read(values), self.resolution, self.resize_mode)  # (B, C, H, W) in [0, 1]
        return self.vq.encode_codes((2.0 * pixels - 1.0).to(self.device()))

    def encode_partial(self, values: Any, mask_image: torch.Tensor | None = None) -> EncodedValue:
        """Codes (B, h, w) of pictures, unknown where the mask touches them; without a mask, all of them.

        A picture of another aspect ratio than the grid's is fitted in whole, and white around it is known.

        Two fillings of the holes are encoded, a smooth and a grey one: a code that tells them apart is one of the
        hole's too.
        """
        if mask_image is None:
            return EncodedValue(self.encode(values))
        pixels = self.own_size(values)
        mask = read_mask(mask_image, tuple(pixels.shape[-2:]), len(pixels)).to(pixels)
        smooth = fill_with_surroundings(2.0 * pixels - 1.0, mask)
        codes, other = (
            self.vq.encode_codes(resize_pixels(filled, self.resolution))
            for filled in (smooth, smooth.masked_fill(mask > 0, 0.0))
        )
        touched = touched_patches(mask, self.resolution, self.shape[:2])  # (B, h, w)

        def finish(codes: torch.LongTensor, repeats: int, output_type: str) -> Any:
            every = [tensor.repeat_interleave(repeats, dim=0) for tensor in (pixels, mask)]
            return self.paste(codes, every[0], every[1], output_type)

        return EncodedValue(forget_positions(codes, other, touched, self.vocab_size), self.name, finish)

    def paste(self, codes: torch.LongTensor, pixels: torch.Tensor, mask: torch.Tensor, output_type: str) -> Any:
        """Pictures of codes (B, h, w) where a mask (B, 1, H, W) is 1, elsewhere `pixels` (B, C, H, W) in [0, 1]."""
        repainted = cut_out(self.vq.decode_codes(codes).sample.float(), tuple(pixels.shape[-2:])) / 2 + 0.5
        return self.components["pixel_processor"].postprocess(torch.where(mask > 0, repainted, pixels), output_type)

    def decode(self, codes: torch.LongTensor, output_type: str = "pil") -> Any:
        """Pictures of codes (B, h, w), as ``"pil"``, ``"np"`` or ``"pt"``."""
        return self.components["image_processor"].postprocess(
            self.vq.decode_codes(codes).sample, output_type=output_type
        )


def height_and_width(picture: Image.Image | torch.Tensor) -> tuple[int, int]:
    """In pixels, of one of Pillow's or a tensor (C, H, W)."""
    return tuple(picture.shape[-2:]) if isinstance(picture, torch.Tensor) else (picture.height, picture.width)


class LowResolutionSegment(ImageSegment):
    """Pictures that are `factor` times smaller than another segment's, which are made from them, tile by tile."""

    tiled = True

    def check_single(self, values: list) -> None:
        factor = self.entry["factor"]
        height, width = (side // factor for side in self.resolution)
        for own_height, own_width in map(height_and_width, values):
            if own_height > height or own_width > width:
                raise ValueError(
                    f"{self.argument} has a picture of {own_height} x {own_width} pixels (height x width), which "
                    f"makes several tiles; what is scored, classified or searched is one of at most {height} x {width}"
                )

    def encode(self, values: Any) -> torch.LongTensor:
        return self.encode_given(values).codes

    def encode_given(self, values: Any) -> EncodedValue:
        """Codes (B * T, h, w) of small pictures in T tiles each."""
        pixels, (height, width), factor = self.own_size(values), self.resolution, self.entry["factor"]
        tiles = split_tiles(2.0 * pixels - 1.0, (height // factor, width // factor))

        def finish(codes: torch.LongTensor, repeats: int, output_type: str) -> Any:
            # Both segments have one tokenizer's codes.
            drawn, lowres = self.vq.decode_codes(codes).sample.float(), pixels.repeat_interleave(repeats, dim=0)
            enlarged = join_tiles(drawn, tuple(lowres.shape[-2:]), factor)
            return self.components["image_processor"].postprocess(
                back_project(enlarged, 2.0 * lowres - 1.0), output_type
            )

        codes = self.vq.encode_codes(resize(tiles, (height, width)))
        return EncodedValue(codes, self.entry["lowres_of"], finish, len(tiles) // len(pixels))
