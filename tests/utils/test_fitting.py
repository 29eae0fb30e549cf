"""What is drawn on plain or transparent ground is never cut; other pictures are cropped as they always were."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps

from diffusers_vqdit.utils.fitting import INTERPOLATION_MODES, resize_image
from diffusers_vqdit.utils.images import to_rgb


SIDES, GREY = st.integers(24, 90), st.integers(0, 255)


def drawn(size, ground, ink, box):
    """A rectangle on plain ground; `box` is in shares of the sides."""
    picture = Image.new("RGB" if len(ground) == 3 else "RGBA", size, ground)
    left, top, right, bottom = (round(share * side) for share, side in zip(box, size * 2, strict=True))
    ImageDraw.Draw(picture).rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), ink)
    return picture


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


@pytest.mark.parametrize("size", [(30, 80), (80, 30)])
def test_a_cut_out_that_touches_the_border_is_whole(size):
    picture = to_rgb(drawn(size, (0, 0, 0, 0), (200, 30, 30, 255), (0.3, 0.0, 0.7, 1.0)))
    pixels = np.asarray(resize_image(picture, (32, 32), "auto")).astype(int)
    rows, columns = np.nonzero(pixels[..., 1] < 150)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert height / width == pytest.approx(size[1] / (0.4 * size[0]), rel=0.25)
    assert pixels[[0, 0, -1, -1], [0, -1, 0, -1]].min() == 255


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
