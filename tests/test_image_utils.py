import torch
from PIL import Image

from diffusers_vqdit.image_utils import lower_resolution, resize, shift_and_scale


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
