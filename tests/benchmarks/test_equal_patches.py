"""Codes of equal patches, counted by hand."""

import math
from collections import Counter

import pytest
import torch
from datasets import Dataset
from PIL import Image

from benchmarks.equal_patches import codes_of_patches, figures, main, parse_args


class Tokenizer:
    """A code is the first pixel of its patch, plus one where the picture's last pixel is 9."""

    downsample_factor = 2

    def encode_codes(self, pixels):
        values = ((pixels + 1) * 127.5).round().long()[:, 0]
        return values[:, ::2, ::2] + (values[:, -1:, -1:] == 9)


def test_each_patch_is_counted_with_what_is_around_it():
    first = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    first[..., 2:4, 2:4] = 3
    second = first.clone()
    second[..., -1, -1] = 9
    found = codes_of_patches(Tokenizer(), [torch.cat([first, second]), first])
    assert sum(codes.total() for codes in found.values()) == 3 * 2 * 2  # those with neighbours on all sides
    patch = first[0, :, :6, :6].numpy().tobytes()
    assert found[patch] == Counter({3: 2, 4: 1})
    corner = [codes for key, codes in found.items() if 9 in key]
    assert corner == [Counter({1: 1})]  # the same but for one pixel


@pytest.mark.parametrize("white", [0, 1, 7])
def test_white_stands_apart_and_single_patches_are_not_counted(white):
    found = {
        b"ab": Counter({1: 3, 2: 1}),
        b"cd": Counter({5: 1}),
        b"ef": Counter({4: 2}),
        b"\xff\xfe": Counter({9: 2}),
    }
    if white:
        found[b"\xff\xff"] = Counter(range(white))
    assert figures(found) == {"patches": 8, "alike": 7 / 8, "white": white, "codes_of_white": white}


def test_nothing_that_is_equal():
    found = figures({b"ab": Counter({1: 1})})
    assert found["patches"] == 0 and math.isnan(found["alike"])


@pytest.mark.parametrize("resolution", [1, 8, 11])
def test_pictures_without_a_patch_inside_are_refused(resolution, image_vq, tmp_path):
    image_vq.save_pretrained(tmp_path / "image_vq")
    Dataset.from_dict({"image": [Image.new("RGB", (32, 32))]}).to_parquet(tmp_path / "pictures.parquet")
    args = f"--image_vq {tmp_path}/image_vq --dataset_name {tmp_path}/pictures.parquet --split train"
    with pytest.raises(ValueError, match=f"resolution={resolution} must be at least three of the 4 "):
        main(parse_args(f"{args} --resolution {resolution}".split()))
