"""The tokenizers that are published on their own: they load, and do what their cards say."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_vqdit import ImageVQModel, SpectrogramVQModel
from diffusers_vqdit.training.data import decode_images, load_training_dataset
from diffusers_vqdit.training.metrics import psnr
from diffusers_vqdit.utils.decoding import to_pixels


@torch.no_grad()
def test_the_image_tokenizer_of_64_pixels(root):
    model = ImageVQModel.from_pretrained(root / "model_cards" / "image-vq-emoji-64").eval()
    test = load_training_dataset(
        dataset_name=str(root / "training/data/emoji.parquet"), split="test", image_column="image"
    )
    pixels = to_pixels(decode_images(test.select(range(0, 300, 20)), "image", 64)[0])
    codes = model.encode_codes(pixels)
    assert codes.shape == (15, 16, 16)
    made = model.decode_codes(codes).sample.clamp(-1, 1)
    assert psnr(made, pixels).mean().item() == pytest.approx(30.2, abs=1.0)


@torch.no_grad()
def test_the_image_tokenizer_of_photographs(root):
    """On the photographs of the docs' figure, the real ones above what came back, it gives what stands below them."""
    model = ImageVQModel.from_pretrained(root / "model_cards" / "image-vq-photographs").eval()
    figure = torch.from_numpy(np.array(Image.open(root / "docs" / "photographs.png"))).permute(2, 0, 1)
    real, shown = (
        to_pixels(torch.stack([figure[:, top : top + 256, left : left + 256] for left in range(0, 1036, 260)]))
        for top in (0, 260)
    )
    codes = model.encode_codes(real)
    assert codes.shape == (4, 32, 32) and codes.max() < 4096
    made = model.decode_codes(codes).sample.clamp(-1, 1)
    assert psnr(made, shown).min().item() > 40
    assert psnr(made, real).mean().item() == pytest.approx(21.9, abs=0.2)


@torch.no_grad()
def test_the_speech_codec(root):
    codec = SpectrogramVQModel.from_pretrained(root / "model_cards" / "audio-vq-speech").eval()
    # A vowel that glides: harmonics of a falling pitch under two formants.
    time = torch.arange(11025) / 11025
    phase = 2 * math.pi * torch.cumsum(140 - 40 * time, 0) / 11025
    formants = [
        (k, math.exp(-(((140 * k - 700) / 300) ** 2)) + 0.5 * math.exp(-(((140 * k - 1200) / 300) ** 2)))
        for k in range(1, 20)
    ]
    sound = 0.1 * sum(weight * torch.sin(k * phase) for k, weight in formants)[None]
    codes = codec.encode_codes(sound)
    assert codes.shape == (1, 11, 8)
    real = codec.spectrogram(sound)
    made = codec.vq.decode_codes(codes.transpose(1, 2)).sample
    silent = codec.vq.decode_codes(codec.encode_codes(torch.zeros_like(sound)).transpose(1, 2)).sample
    assert psnr(made, real).item() > 20 > 12 > psnr(silent, real).item()
