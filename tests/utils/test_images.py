"""Pictures of every mode and format are read one way; masks too; what can't be read is named, and never waited for."""

import io
import os
import random
import struct
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from diffusers_vqdit.utils.decoding import decode_image, image_size
from diffusers_vqdit.utils.fitting import RESIZE_MODES, fitted_box, resize_image
from diffusers_vqdit.utils.images import (
    cut_out,
    fit_images,
    lower_resolution,
    own_size,
    read_images,
    read_mask,
    resize,
    resize_pixels,
    shift_and_scale,
    to_rgb,
)


GREY = np.tile(np.arange(0, 250, 10, dtype=np.uint8), (12, 1))  # 12 x 25
ORIENTATION = 0x0112


def noise(size=(20, 12), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def of_mode(mode):
    """The grey ramp in a mode of Pillow's."""
    grey = Image.fromarray(GREY)
    if mode.startswith("I;16"):
        return Image.frombytes(mode, grey.size, (GREY.astype(">u2" if mode == "I;16B" else "<u2") * 257).tobytes())
    if mode in ("I", "F"):
        return Image.fromarray(GREY.astype(np.int32) * 257 if mode == "I" else GREY.astype(np.float32) / 255)
    via = {"La": "LA", "RGBa": "RGBA", "PA": "P", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB"}.get(mode)
    return (grey.convert(via) if via else grey).convert(mode)


MODES = ["L", "P", "RGB", "RGBA", "RGBX", "RGBa", "La", "LA", "PA", "CMYK", "YCbCr", "HSV"]
MODES += ["I", "F", "I;16", "I;16B", "I;16L"]


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_is_the_same_in_every_mode_and_orientation(mode):
    expected = np.repeat(GREY[..., None], 3, axis=2)
    picture = of_mode(mode)
    read = to_rgb(picture)
    assert read.mode == "RGB" and np.abs(np.asarray(read).astype(int) - expected).max() <= 1
    assert np.array_equal(np.asarray(to_rgb(read)), np.asarray(read))
    for orientation in range(1, 9):
        picture.getexif()[ORIENTATION] = orientation
        turned = to_rgb(picture)
        assert turned.size == ((12, 25) if orientation > 4 else (25, 12))
        read.getexif()[ORIENTATION] = orientation
        assert np.array_equal(np.asarray(turned), np.asarray(ImageOps.exif_transpose(read)))
        assert turned.getexif().get(ORIENTATION, 1) == 1  # read again, it isn't turned again
        del read.getexif()[ORIENTATION]


def test_floats_and_integers_go_by_their_range():
    for values, mode in (
        (GREY.astype(np.float32), "F"),
        (GREY.astype(np.int32), "I"),
    ):  # as Pillow's convert makes them
        picture = Image.fromarray(values)
        assert picture.mode == mode and np.array_equal(np.asarray(to_rgb(picture))[..., 0], GREY)
    for wrong in (
        np.full((4, 4), np.nan, np.float32),
        np.full((4, 4), 300.0, np.float32),
        np.full((4, 4), -1, np.int32),
        np.full((4, 4), 70_000, np.int32),
    ):
        with pytest.raises(ValueError, match="image of mode '[IF]' .* values from"):
            to_rgb(Image.fromarray(wrong))
    for size in ((0, 5), (5, 0), (0, 0)):
        with pytest.raises(ValueError, match="no pixels"):
            to_rgb(Image.new("RGB", size))


def test_transparent_pixels_are_white_however_they_are_stored():
    def stored(picture, **options):
        file = io.BytesIO()
        picture.save(file, "PNG", **options)
        return Image.open(file)

    clear = Image.new("L", (4, 4), 7)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    wide = Image.fromarray(np.full((4, 4), 1000, np.uint16))
    pictures = [Image.new("RGBA", (4, 4), (255, 0, 0, 0)), Image.new("LA", (4, 4), (0, 0))]
    pictures += [pictures[0].convert("RGBa"), pictures[1].convert("La"), stored(clear, transparency=7)]
    pictures += [stored(palette, transparency=b"\xff\x00"), stored(wide, transparency=1000)]
    pictures += [stored(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))]
    for picture in pictures:
        assert np.asarray(to_rgb(picture)).min() == 255, (picture.mode, picture.info)
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    assert to_rgb(half).getpixel((0, 0)) == (255, 127, 127)


def test_cropping_is_pillows_fit_and_padding_keeps_the_whole_picture():
    for size in ((20, 12), (12, 20), (16, 16), (3, 300), (300, 1)):
        picture = noise(size)
        fit = ImageOps.fit(picture, (8, 8), Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(resize_image(picture, (8, 8))), np.asarray(fit))
        padded = np.asarray(resize_image(picture, (8, 8), "pad"))
        top, left, height, width = fitted_box(size[::-1], (8, 8))
        inner = picture.resize((width, height), Image.Resampling.LANCZOS)
        assert np.array_equal(padded[top : top + height, left : left + width], np.asarray(inner))
        padded = padded.copy()
        padded[top : top + height, left : left + width] = 255
        assert padded.min() == 255


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("size", [(16, 12), (40, 24), (7, 30)])
def test_pictures_arrays_and_tensors_of_any_precision_are_one(mode, size):
    pictures = [noise(size, seed) for seed in range(3)]
    arrays = [np.asarray(picture) / 255 for picture in pictures]
    expected = fit_images(read_images(pictures, 3), (12, 16), mode)
    assert expected.shape == (3, 3, 12, 16) and expected.dtype == torch.float32
    batch = np.stack(arrays)
    tensor = torch.tensor(batch).permute(0, 3, 1, 2)
    for other in (arrays, batch, batch.astype(np.float32), batch[::-1][::-1], tensor, tensor.float(), list(tensor)):
        assert torch.equal(fit_images(read_images(other, 3), (12, 16), mode), expected)
    for half in (torch.float16, torch.bfloat16):
        same = fit_images(read_images(tensor.to(half), 3), (12, 16), mode)
        assert same.dtype == torch.float32 and (same - expected).abs().max() < 0.02
    floats = torch.rand(2, 3, 12, 16)
    assert torch.equal(fit_images(read_images(floats, 3), (12, 16), mode), floats)  # at its size, as it is
    assert torch.equal(own_size(read_images(floats[:, :, 1:], 3)), floats[:, :, 1:])


def test_what_was_fitted_whole_is_cut_out_again():
    for size in ((16, 16), (40, 24), (24, 40), (5, 60)):
        pixels = resize(torch.rand(1, 3, 4, 4) * 2 - 1, size)
        fitted = resize_pixels(pixels, (64, 64))
        top, left, height, width = fitted_box(size, (64, 64))
        outside = torch.ones(64, 64, dtype=torch.bool)
        outside[top : top + height, left : left + width] = False
        assert (fitted[..., outside] == 1).all()
        assert (cut_out(fitted, size) - pixels).abs().mean() < 0.05
    square = torch.rand(1, 3, 40, 40) * 2 - 1
    for mode in RESIZE_MODES:  # of the aspect ratio, nothing is cropped or padded
        assert torch.equal(resize_pixels(square, (16, 16), mode), resize(square, (16, 16)))
    wide = torch.rand(1, 3, 16, 24) * 2 - 1
    assert torch.equal(resize_pixels(wide, (16, 16), "crop"), wide[..., 4:20])


# ---------------------------------------------------------------------------------------------------------------------
# Files


def corrupted(data, rng):
    kind = rng.randrange(4)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        data = bytearray(data)
        for _ in range(rng.choice([1, 4, 40])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if kind == 2:
        start = rng.randrange(len(data))
        return data[:start] + rng.randbytes(20) + data[start:]
    return data[: rng.randrange(40)] + data[rng.randrange(len(data)) :]


def test_broken_pictures_of_every_format_are_read_or_refused_at_once(tmp_path):
    Image.init()
    rng, whole = random.Random(0), {}
    for name in sorted(set(Image.SAVE) - {"PDF", "EPS", "MPO"}):
        for mode in ("RGB", "L", "1", "P"):
            file = io.BytesIO()
            try:
                noise((32, 32)).convert(mode).save(file, name)
                Image.open(file).load()
            except Exception:  # not every format holds every mode, or can be read again
                continue
            whole.setdefault(name, file.getvalue())
    assert len(whole) >= 15
    counts = {"read": 0, "refused": 0}
    slowest = 0.0
    for index in range(200):
        name = sorted(whole)[index % len(whole)]
        data = corrupted(whole[name], rng)
        value = {"bytes": data, "path": None}
        if index % 2:  # as a file, and called something else
            path = tmp_path / f"{index}.{rng.choice(['png', 'jpg', 'txt', 'tif', 'gif'])}"
            path.write_bytes(data)
            value = {"bytes": None, "path": str(path)}
        started = time.process_time()
        try:
            picture = decode_image(value, 16)
            assert picture.shape == (3, 16, 16) and picture.abs().max() <= 1
            counts["read"] += 1
        except ValueError as error:
            said = str(error).replace(str(tmp_path), "")
            assert "picture" in said or "image" in said
            counts["refused"] += 1
        slowest = max(slowest, time.process_time() - started)
    print(f"200 broken pictures of {len(whole)} formats: {counts}, slowest {slowest:.3f} s")
    assert counts["refused"] > 50 and slowest < 2


@pytest.mark.parametrize("kind", ["null", "no bytes", "empty", "text", "folder", "missing", "pipe", "number", "eps"])
def test_what_is_no_picture_file_is_named(kind, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{} loop\n%%EOF\n"
    value = {
        "null": None,
        "no bytes": {"bytes": None, "path": None},
        "empty": {"bytes": b"", "path": "a.png"},
        "text": {"bytes": b"no picture", "path": "a.png"},
        "number": {"bytes": 3, "path": None},
        "eps": {"bytes": program, "path": "a.eps"},
    }.get(kind, {"bytes": None, "path": str(tmp_path / kind)})
    with pytest.raises(ValueError, match="the picture"):
        decode_image(value, 8)


def test_exif_that_pillow_cannot_write_anew_is_no_hindrance():
    """A field of another type than its number's, as some cameras and programs write it."""
    picture, data = noise((40, 24)), io.BytesIO()
    fields = struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0) + struct.pack("<HHI4s", 282, 2, 3, b"72\0\0")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + fields + bytes(4)
    picture.save(data, "JPEG", exif=exif, quality=95)
    plain = io.BytesIO()
    picture.save(plain, "JPEG", quality=95)
    turned = Image.open(plain).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(to_rgb(Image.open(data))), np.asarray(turned))
    assert image_size({"bytes": data.getvalue(), "path": None}) == turned.size[::-1]


def test_a_decoded_file_is_the_picture_as_it_is_seen(tmp_path):
    picture = noise((40, 24))
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned.save(tmp_path / "a.png", exif=exif)
    for mode in RESIZE_MODES:
        pixels = decode_image({"bytes": None, "path": str(tmp_path / "a.png")}, 16, mode)
        expected = np.asarray(resize_image(picture, (16, 16), mode))
        assert torch.equal(pixels, torch.tensor(expected).permute(2, 0, 1).float() / 127.5 - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Masks

LEFT = np.zeros((24, 32), np.uint8)
LEFT[:, :16] = 255


def masks():
    """The left half, as everything that a mask may be."""
    rgba = np.full((24, 32, 4), 255, np.uint8)
    rgba[..., 3] = LEFT
    turned = Image.fromarray(np.rot90(LEFT, 1).copy())
    turned.getexif()[ORIENTATION] = 6
    picture = Image.fromarray(LEFT)
    flags, floats = LEFT > 0, LEFT / 255
    tensor = torch.tensor(floats)
    yield from (picture, picture.convert("1"), picture.convert("RGB"), picture.convert("P"), picture.convert("CMYK"))
    yield from (Image.fromarray(rgba), Image.fromarray(rgba).convert("LA"), turned, [picture])
    yield from (Image.fromarray(LEFT.astype(np.uint16) * 257), Image.fromarray(floats.astype(np.float32)))
    yield from (
        flags,
        flags[None],
        flags[None, ..., None],
        flags[..., None],
        [flags],
        floats,
        floats.astype("float16"),
    )
    yield from (floats[None].astype(np.float32), tensor, tensor[None], tensor[None, None], tensor.half(), tensor > 0.5)
    yield from (tensor[None, None].bfloat16(), [tensor[None]], np.repeat(floats[:, ::2], 1, axis=1).repeat(2, axis=1))
    yield from (picture.resize((64, 48)), picture.resize((16, 12)), flags[::2, ::2], floats.repeat(3, 0).repeat(3, 1))


def test_a_mask_may_be_anything_that_says_where():
    count = 0
    for mask in masks():
        read = read_mask(mask, (24, 32), 2)
        assert read.shape == (2, 1, 24, 32) and read.dtype == torch.float32
        assert torch.equal(read, torch.tensor(LEFT > 0).float().expand(2, 1, -1, -1)), count
        count += 1
    print(f"{count} kinds of masks")
    soft = np.array([[0.0, 0.49], [0.5, 1.0]])
    assert read_mask(soft, (2, 2), 1)[0, 0].tolist() == [[0, 0], [1, 1]]
    two = read_mask(np.stack([LEFT > 0, LEFT == 0]), (24, 32), 2)
    assert torch.equal(two[0], 1 - two[1])
    black = Image.fromarray(np.zeros((24, 32), np.uint8))
    assert not read_mask(black, (24, 32), 1).any()  # says so itself


def alpha_mask(colour):
    mask = np.zeros((24, 32, 4), np.uint8)
    mask[4:8, 4:8] = (*colour, 255)
    return Image.fromarray(mask)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (alpha_mask((0, 0, 0)), "paint white"),
        (Image.new("RGBA", (32, 24)), "paint white"),
        (Image.new("L", (0, 0)), "no pixels"),
        (Image.new("L", (24, 32)), "aspect ratio"),
        (Image.new("L", (32, 21)), "aspect ratio"),
        (LEFT, "got uint8 from 0 to 255"),
        (LEFT.astype(np.int64) // 255, "int64"),
        (torch.tensor(LEFT), "uint8"),
        (np.full((24, 32), np.nan), "from nan"),
        (torch.full((24, 32), 1.5), "from 1.5"),
        (-(LEFT / 255.0), "from -1.0"),
        (np.zeros((0, 32)), r"\(0, 32\)"),
        (np.zeros((24, 32, 3)), "masks for 2 pictures|aspect"),
        (np.zeros((1, 24, 32, 3)), r"must have shape .*got \(1, 24, 32, 3\)"),
        (torch.zeros(1, 3, 24, 32), r"must have shape .*got \(1, 3, 24, 32\)"),
        (np.zeros((3, 24, 32)), "3 masks for 2 pictures"),
        ([LEFT > 0] * 3, "3 masks for 2 pictures"),
        ([], "0 masks for 2 pictures"),
        ("mask.png", "got str"),
        (3, "got int"),
        (np.zeros(24), r"\(24,\)"),
        (np.zeros((24, 32), dtype=object), "object"),
        (np.zeros((24, 32), dtype=complex), "complex"),
    ],
)
def test_masks_that_do_not_fit_are_named(mask, message):
    with pytest.raises(ValueError, match=f"(?s)mask_image.*({message})"):
        read_mask(mask, (24, 32), 2)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def test_resizing_is_pillows():
    pixels = torch.rand(1, 3, 24, 24) * 2 - 1
    picture = Image.fromarray(((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
    smaller = torch.tensor(list(picture.resize((8, 8), Image.Resampling.BICUBIC).tobytes())).view(8, 8, 3)
    assert (((resize(pixels, (8, 8))[0].permute(1, 2, 0) + 1) * 127.5) - smaller).abs().max() < 1.5


def test_lower_resolution_keeps_the_size_and_loses_details():
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1.0
    pixels = board.expand(2, 3, 16, 16)
    assert lower_resolution(pixels, 2).shape == pixels.shape
    assert lower_resolution(pixels, 2)[:, :, 4:-4, 4:-4].abs().max() < 0.2
    assert torch.allclose(lower_resolution(torch.full((1, 3, 16, 16), 0.3), 4), torch.tensor(0.3), atol=1e-5)


def test_moved_pictures_stay_within_the_stated_bounds():
    dot = torch.full((200, 1, 32, 32), 1.0)
    dot[:, :, 14:18, 14:18] = -1.0  # centred
    moved = shift_and_scale(dot, torch.Generator().manual_seed(0))
    assert moved.shape == dot.shape and moved.min() >= -1 and moved.max() <= 1
    weight = (1 - moved[:, 0]) / 2
    place = torch.arange(32) + 0.5 - 16
    centre = torch.stack([(weight * place[:, None]).sum((1, 2)), (weight * place).sum((1, 2))]) / weight.sum((1, 2))
    assert centre.abs().max() < 2.4 and centre.std() > 0.8  # 1/16 of 32 pixels, and up to 10 % more where enlarged
    area = weight.sum((1, 2)) / 16
    assert area.min() > 0.75 and area.max() < 1.3 and area.std() > 0.05
    border = shift_and_scale(torch.full((4, 3, 8, 8), -0.5), torch.Generator().manual_seed(0))
    assert torch.allclose(border, torch.tensor(-0.5), atol=1e-5)
