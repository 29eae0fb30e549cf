"""What a codec of waveforms is trained by: the distance of log-mel spectrograms of several resolutions."""

import warnings
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..models.mel_spectrogram import mel_filters, pad_to_multiple, short_time_fourier


# Samples of a window, and mel bands: those of DAC (Kumar et al. 2023), with its weight of the sum of all and its floor
# of amplitudes. A window moves by a quarter.
WINDOWS = {32: 5, 64: 10, 128: 20, 256: 40, 512: 80, 1024: 160, 2048: 320}
SPECTRAL_WEIGHT = 15.0
FLOOR = 1e-5
PICTURE = 512  # the window of the spectrogram that a discriminator sees


class SpectralLoss(nn.Module):
    """Multi-scale spectral loss of waveforms (Défossez et al. 2022, EnCodec; Kumar et al. 2023, DAC).

    The mean difference of log10 of the mel amplitudes, of windows of 32 to 2,048 samples with 5 to 320 bands; the mean
    over the seven. Phases don't matter to it but by how neighbouring windows overlap.

    Args:
        sampling_rate: of the waveforms, in Hz.
        difference: of two tensors, a scalar: `F.l1_loss`, as in DAC, or `F.mse_loss`.
    """

    def __init__(self, sampling_rate: int, difference: Callable[..., torch.Tensor] = F.l1_loss) -> None:
        super().__init__()
        self.difference = difference
        for window, bands in WINDOWS.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of filters between two frequencies, which are left out here
                filters = mel_filters(sampling_rate, window, bands, 0.0, sampling_rate / 2)
            self.register_buffer(f"filters_{window}", filters[filters.amax(1) > 0], persistent=False)

    def spectrogram(self, waveform: torch.Tensor, window: int) -> torch.Tensor:
        """log10 of the mel amplitudes (B, M, n), float32, of waveforms (B, T), with silence after them, for one of the
        windows."""
        hop = window // 4
        amplitudes = short_time_fourier(pad_to_multiple(waveform.float(), hop), window, hop).abs()
        return (self.get_buffer(f"filters_{window}") @ amplitudes).clamp_min(FLOOR).log10()

    def picture(self, waveform: torch.Tensor) -> torch.Tensor:
        """A spectrogram (B, 1, M, n) in about [-1, 1] of waveforms (B, T): what a discriminator sees."""
        return (self.spectrogram(waveform, PICTURE)[:, None] + 2) / 3

    def forward(self, made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """The distance, a scalar, with gradients to `made` (B, T), of `real` (B, T)."""
        pairs = ((self.spectrogram(made, window), self.spectrogram(real, window)) for window in WINDOWS)
        return torch.stack([self.difference(one, other) for one, other in pairs]).mean()
