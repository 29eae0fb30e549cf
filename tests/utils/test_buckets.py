"""Buckets of aspect ratios: which is nearest, and what is none."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusers_vqdit.utils.buckets import check_bucket_steps, check_buckets, nearest_bucket
from diffusers_vqdit.utils.decoding import decode_image, image_size


sides = st.integers(1, 3000)
pairs = st.tuples(sides, sides)


@settings(max_examples=80, deadline=None)
@given(pairs, st.lists(pairs, min_size=1, max_size=6), st.integers(1, 9))
def test_the_nearest_is_that_of_the_smallest_factor_between_the_ratios(size, buckets, scale):
    def factor(bucket):
        ratio = Fraction(size[0] * bucket[1], size[1] * bucket[0])
        return max(ratio, 1 / ratio)

    found = nearest_bucket(size, buckets)
    assert math.isclose(factor(buckets[found]), min(map(factor, buckets)), rel_tol=1e-9)
    same = nearest_bucket((size[0] * scale, size[1] * scale), buckets)
    assert math.isclose(factor(buckets[same]), factor(buckets[found]), rel_tol=1e-9)
    # A picture and the buckets on their sides: the same one.
    turned = nearest_bucket(size[::-1], [bucket[::-1] for bucket in buckets])
    assert math.isclose(factor(buckets[turned]), factor(buckets[found]), rel_tol=1e-9)


def test_of_two_as_near_it_is_the_first():
    assert nearest_bucket((5, 5), [(3, 4), (4, 3)]) == nearest_bucket((5, 5), [(4, 3), (3, 4)]) == 0


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ([], r"x=\[\] must be a list of one or more \[height, width\]"),
        ("32,32", "x='32,32' must be a list"),
        ([[32]], r"x\[0\]=\[32\] must be a list of 2 integers of at least 1"),
        ([[32, 32], [0, 8]], r"x\[1\]\[0\]=0 must be an integer of at least 1"),
        ([[32, 32.0]], r"x\[0\]\[1\]=32.0 must be an integer"),
        ([[32, 32], [24, 40], [16, 16]], r"x has \[32, 32\] and \[16, 16\], which have one aspect ratio"),
    ],
)
def test_what_is_none_is_named(buckets, message):
    with pytest.raises(ValueError, match=message):
        check_buckets("x", buckets)


def test_sizes_between_steps_are_refused_with_what_would_do():
    check_bucket_steps("x", [[32, 24], [8, 8]], (8, 4), "a code")
    with pytest.raises(
        ValueError, match=r"x: \[24, 42\] must be a multiple of \[8, 4\], the size of a code, .* \[24, 4"
    ):
        check_bucket_steps("x", [[32, 24], [24, 42]], (8, 4), "a code")


@pytest.mark.parametrize("ending", ["jpg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_picture_as_it_is_seen(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 10)).save(tmp_path / f"a.{ending}", exif=exif)
    value = {"bytes": None, "path": str(tmp_path / f"a.{ending}")}
    assert image_size(value) == ((10, 30) if orientation < 5 else (30, 10))
    assert decode_image(value, (4, 6)).shape == (3, 4, 6)
