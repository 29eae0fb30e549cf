"""Pictures of columns as they are decoded."""

import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from PIL import Image

from diffusers_vqdit.training.data import decode_images
from diffusers_vqdit.utils.decoding import as_picture_column, decode_image


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    picture = decode_image({"bytes": None, "path": str(tmp_path / "clear.png")}, 4)
    assert torch.equal(picture, torch.ones(3, 4, 4))


@pytest.mark.parametrize("array", [pa.array([[[300, 2]], [[1, 2]]]), pa.array([[[2**40]], [[1]]])])
def test_arrays_of_large_numbers_are_pictures(array):
    dataset = as_picture_column(Dataset(pa.table({"image": array})), "image")
    assert len(decode_images(dataset, "image", 8)[1]) == 2


def test_ragged_arrays_are_refused():
    table = Dataset(pa.table({"image": pa.array([[[1, 2], [3]], [[1]]])}))
    with pytest.raises(ValueError, match="column 'image' has the type list<.* no pictures"):
        as_picture_column(table, "image")
