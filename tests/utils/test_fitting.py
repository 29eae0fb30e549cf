"""What is drawn on plain or transparent ground is never cut; other pictures are cropped as they always were."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps

from diffusers_vqdit.utils.decoding import decode_image, to_bytes
from diffusers_vqdit.utils.fitting import INTERPOLATION_MODES, resize_image
from diffusers_vqdit.utils.images import to_rgb


SIDES, GREY = st.integers(24, 90), st.integers(0, 255)


def drawn(size, ground, ink, box):
    """A rectangle on plain ground; `box` is in shares of the sides."""
    picture = Image.new("RGB" if len(ground) == 3 else "RGBA", size, ground)
    left, top, right, bottom = (round(share * side) for share, side in zip(box, size * 2, strict=True))
    ImageDraw.Draw(picture).rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), ink)
    return picture


# The box of what touches some edges, in shares of the sides.
EDGES = {
    "none": (0.2, 0.2, 0.8, 0.8),
    "top": (0.3, 0.0, 0.7, 0.9),
    "left, right": (0.0, 0.1, 1.0, 0.9),
    "top, bottom": (0.3, 0.0, 0.7, 1.0),
    "top, left": (0.0, 0.0, 0.9, 0.9),
    "all but the left": (0.1, 0.0, 1.0, 1.0),
    "all": (0.0, 0.0, 1.0, 1.0),
}


def cut_out(size, edges):
    """A box of noise on transparent ground, with a hole."""
    box = drawn(size, (0, 0, 0, 0), (0, 0, 0, 255), EDGES[edges]).getchannel("A")
    ImageDraw.Draw(box).ellipse([side * share for share in (0.4, 0.6) for side in size], 0)
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    picture.putalpha(box)
    return picture


def stored(picture, mode):
    """A PNG of that mode: with a colour that is transparent ("1-bit"), or all as it says."""
    options = {}
    if mode == "P":
        picture = picture.quantize(64)
    elif mode == "1-bit":
        alpha = picture.getchannel("A")
        picture, options = picture.convert("RGB"), {"transparency": (1, 2, 3)}
        picture.paste((1, 2, 3), mask=alpha.point(lambda value: 255 - value))
    else:
        picture = picture.convert(mode)
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(SIDES, SIDES), ground=st.tuples(GREY, GREY, GREY), target=st.sampled_from([(32, 32), (24, 40)]))
def test_what_stands_on_plain_ground_is_whole(size, ground, target):
    ink = tuple(255 - one if abs(255 - 2 * one) > 60 else 0 for one in ground)
    picture = drawn(size, ground, ink, (0.1, 0.1, 0.9, 0.9))
    found = resize_image(picture, target, "auto")
    same = size[0] * target[0] == size[1] * target[1]
    expected = resize_image(picture, target, "crop" if same else "pad_border")
    assert np.array_equal(np.asarray(found), np.asarray(expected))
    pixels = np.asarray(found).astype(int)
    assert (np.abs(pixels[[0, -1]] - ground).max(-1) < 40).all()  # around it is the ground, on all sides
    assert (np.abs(pixels[:, [0, -1]] - ground).max(-1) < 40).all()


@pytest.mark.parametrize("target", [(32, 32), (24, 40)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1-bit"])
@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("size", [(30, 80), (80, 30)])
def test_a_cut_out_is_whole_however_many_edges_it_touches(size, edges, mode, target):
    file = stored(cut_out(size, edges), mode)
    picture = to_rgb(Image.open(file))
    for one in (picture, to_rgb(picture)):  # as what is read twice is
        found = resize_image(one, target, "auto")
        assert np.array_equal(np.asarray(found), np.asarray(resize_image(picture, target, "pad")))
    pixels = decode_image({"bytes": file.getvalue()}, target, "auto")
    assert np.array_equal(to_bytes(pixels).movedim(0, -1).numpy(), np.asarray(found))
    grey = decode_image({"bytes": file.getvalue()}, target, "auto", channels=1)
    assert torch.equal(grey, decode_image({"bytes": file.getvalue()}, target, "pad", channels=1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
@pytest.mark.parametrize("clear", [0, 2])  # of 2400 pixels, as a rounded corner has
def test_photographs_that_could_be_transparent_are_cropped(mode, clear):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 80, 3), dtype=np.uint8)).convert("RGBA")
    for column in range(clear):
        picture.putpixel((column, 0), (0, 0, 0, 0))
    half = picture.copy()
    half.putalpha(128)  # that can be seen through is nothing cut out
    for one in (picture, half):
        read = to_rgb(Image.open(stored(one, mode)))
        for target in ((32, 32), (40, 24)):
            expected = ImageOps.fit(read, target[::-1], Image.Resampling.LANCZOS)
            assert np.array_equal(np.asarray(resize_image(read, target, "auto")), np.asarray(expected))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1-bit"])
def test_of_the_same_aspect_ratio_cut_outs_are_as_they_were(mode):
    picture = to_rgb(Image.open(stored(cut_out((60, 60), "all"), mode)))
    expected = ImageOps.fit(picture, (32, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(resize_image(picture, (32, 32), "auto")), np.asarray(expected))


@settings(max_examples=30, deadline=None)
@given(size=st.tuples(SIDES, SIDES), seed=st.integers(0, 99))
def test_photographs_are_cropped(size, seed):
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))
    found = resize_image(picture, (32, 32), "auto")
    assert np.array_equal(np.asarray(found), np.asarray(ImageOps.fit(picture, (32, 32), Image.Resampling.LANCZOS)))


def test_padding_takes_the_colour_of_the_border():
    picture = drawn((60, 20), (10, 120, 200), (250, 250, 250), (0.2, 0.2, 0.8, 0.8))
    white, border = (np.asarray(resize_image(picture, (30, 30), mode)) for mode in ("pad", "pad_border"))
    assert (white[0] == 255).all() and (border[0] == (10, 120, 200)).all()
    assert np.array_equal(white[10:20], border[10:20])


@pytest.mark.parametrize("name", INTERPOLATION_MODES)
def test_interpolation_is_pillows(name):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8))
    expected = ImageOps.fit(picture, (16, 16), Image.Resampling[name.upper()])
    assert np.array_equal(np.asarray(resize_image(picture, (16, 16), "crop", name)), np.asarray(expected))


@pytest.mark.parametrize(("centering", "part"), [((0, 0.5), slice(0, 20)), ((1, 0.5), slice(40, 60))])
def test_a_crop_may_be_of_another_part(centering, part):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 60, 3), dtype=np.uint8)
    found = resize_image(Image.fromarray(pixels), (20, 20), centering=centering)
    assert np.array_equal(np.asarray(found), pixels[:, part])
