"""Figures of reconstructions and of codes."""

import pytest
import torch

from diffusers_vqdit.training.metrics import code_usage, psnr, ssim


def test_psnr_and_ssim():
    picture = torch.rand(2, 3, 32, 32) * 2 - 1
    shifted = picture.clone() * 0.9
    error = (shifted - picture).square().mean((1, 2, 3))
    torch.testing.assert_close(psnr(shifted, picture), 10 * torch.log10(4 / error))
    torch.testing.assert_close(ssim(picture, picture), torch.ones(2))
    noise = (picture + 0.5 * torch.randn_like(picture)).clamp(-1, 1)
    assert (ssim(noise, picture) < ssim(shifted, picture)).all() and (ssim(noise, picture) < 0.95).all()
    # Two constant pictures: only the first factor of the formula is left.
    one, other = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.1)
    c1 = (0.01 * 2) ** 2
    assert ssim(one, other).item() == pytest.approx((2 * 0.5 * 0.1 + c1) / (0.5**2 + 0.1**2 + c1), rel=1e-4)


def test_code_usage():
    usage, perplexity = code_usage(torch.tensor([0, 0, 1, 1]), 4)
    assert usage == 0.5 and perplexity == pytest.approx(2.0)
