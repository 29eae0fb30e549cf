"""The multi-scale spectral loss against a reference by hand, and its laws."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.audio_utils import mel_filter_bank

from diffusers_vqdit.training.audio_losses import FLOOR, WINDOWS, SpectralLoss


def log_mel(waveform, rate, window, bands):
    """By the definition of the Fourier transform, a frame and a frequency at a time."""
    filters = mel_filter_bank(window // 2 + 1, bands, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    filters = filters[:, filters.max(0) > 0]
    padded = np.pad(waveform, (window // 2, 2 * window))
    time = np.arange(window)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * time / window)
    kernel = np.exp(-2j * np.pi * np.outer(np.arange(window // 2 + 1), time) / window)
    starts = range(0, len(waveform), window // 4)
    amplitudes = np.stack([np.abs(kernel @ (hann * padded[start : start + window])) for start in starts])
    return np.log10(np.maximum(amplitudes @ filters, FLOOR))


@pytest.mark.filterwarnings("ignore:At least one mel filter")
@pytest.mark.parametrize(("rate", "difference"), [(1600, F.l1_loss), (24_000, F.mse_loss)])
def test_distance_is_that_of_the_definition(rate, difference):
    generator = np.random.default_rng(0)
    made, real = generator.normal(0, 0.1, (2, 2, 4000))
    made[1, 2000:], real[1, 1000:] = 0, 0  # silence
    loss = SpectralLoss(rate, difference)(torch.tensor(made), torch.tensor(real))
    order = 1 if difference is F.l1_loss else 2
    pairs = list(zip(made, real, strict=True))
    expected = [
        np.mean([np.abs(log_mel(a, rate, *sizes) - log_mel(b, rate, *sizes)) ** order for a, b in pairs])
        for sizes in WINDOWS.items()
    ]
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.parametrize("rate", [800, 8000, 11_025, 16_000, 24_000, 44_100, 48_000])
def test_filters_have_frequencies(rate, recwarn):
    loss = SpectralLoss(rate)
    assert not recwarn.list and not loss.state_dict()
    for window, bands in WINDOWS.items():
        filters = loss.get_buffer(f"filters_{window}")
        assert 0.4 * bands < len(filters) <= bands and (filters.amax(1) > 0).all()


def test_distance_grows_with_the_difference_and_has_gradients():
    loss = SpectralLoss(8000)
    noise = torch.randn(3, 3, 8000, generator=torch.Generator().manual_seed(1)) * 0.1
    real = torch.sin(torch.arange(8000) / 5).expand(3, -1) * 0.3
    assert loss(real, real) == 0
    near, far = loss(real + 0.01 * noise[0], real), loss(real + noise[0], real)
    assert 0 < near < far and loss(real, real + noise[0]) == far
    assert loss(0.1 * real, real) > loss(0.5 * real, real) > 0
    for made in (noise[1], torch.zeros(3, 8000), real[:, :10].repeat(1, 800)):
        made = made.clone().requires_grad_(True)
        loss(made, real).backward()
        assert torch.isfinite(made.grad).all() and (made.grad.abs().sum() > 0) == (made.abs().sum() > 0)
    picture = loss.picture(real)
    assert picture.shape[:2] == (3, 1) and picture.abs().max() <= 1.5


def test_short_sounds_have_a_distance():
    for length in (1, 100, 512, 513):
        assert SpectralLoss(1600)(torch.zeros(1, length), torch.ones(1, length)) > 0
