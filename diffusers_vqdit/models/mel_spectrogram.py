"""Waveforms to log-mel spectrograms, and back by the Griffin-Lim algorithm.

transformers makes the mel filters. Its spectrograms, and librosa's, are numpy's; these are on the waveforms' device.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from transformers.audio_utils import mel_filter_bank


LOG_FLOOR = 1e-10  # as in transformers' SpeechT5FeatureExtractor
MEL_INVERSION_STEPS = 50
MOMENTUM = 0.99


@lru_cache(maxsize=8)
def mel_filters(
    sampling_rate: int, n_fft: int, num_mel_bins: int, min_frequency: float, max_frequency: float
) -> torch.Tensor:
    """Slaney's filters (M, F), float32, F = n_fft / 2 + 1."""
    filters = mel_filter_bank(
        num_frequency_bins=n_fft // 2 + 1,
        num_mel_filters=num_mel_bins,
        min_frequency=min_frequency,
        max_frequency=max_frequency,
        sampling_rate=sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters.T).float()


def short_time_fourier(waveform: torch.Tensor, n_fft: int, hop_length: int) -> torch.Tensor:
    """Complex spectra (B, F, T / hop_length) of waveforms (B, T), T a multiple of `hop_length`; frame i is about its
    sample i hop_length."""
    window = torch.hann_window(n_fft, device=waveform.device)
    spectra = torch.stft(waveform, n_fft, hop_length, window=window, pad_mode="constant", return_complex=True)
    return spectra[..., :-1]


def log_mel_spectrogram(waveform: torch.Tensor, filters: torch.Tensor, n_fft: int, hop_length: int) -> torch.Tensor:
    """log10 of the mel amplitudes, (B, M, T / hop_length), of waveforms (B, T)."""
    amplitudes = short_time_fourier(waveform.float(), n_fft, hop_length).abs()
    return (filters @ amplitudes).clamp_min(LOG_FLOOR).log10()


def griffin_lim(
    log_mel: torch.Tensor, filters: torch.Tensor, n_fft: int, hop_length: int, num_iterations: int
) -> torch.Tensor:
    """Waveforms (B, n hop_length) whose log-mel spectrograms are near to these, (B, M, n).

    Amplitudes by multiplicative updates (Lee & Seung 2001), which keep them positive; phases by Griffin & Lim (1984)
    with the momentum of Perraudin et al. (2013). The first phases are always the same ones.
    """
    mel = 10.0 ** log_mel.float()
    amplitudes, gram = filters.T @ mel, filters.T @ filters
    target = amplitudes
    for _ in range(MEL_INVERSION_STEPS):
        amplitudes = amplitudes * target / (gram @ amplitudes).clamp_min(LOG_FLOOR)
    window = torch.hann_window(n_fft, device=mel.device)
    length = mel.shape[-1] * hop_length

    def synthesis(spectra: torch.Tensor) -> torch.Tensor:
        return torch.istft(spectra, n_fft, hop_length, window=window, length=length)

    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(amplitudes.shape[1:], generator=generator).to(mel.device) * 2 * torch.pi
    phases = torch.polar(torch.ones_like(angles), angles).expand(amplitudes.shape)
    previous = torch.zeros_like(phases)
    for _ in range(num_iterations):
        rebuilt = short_time_fourier(synthesis(amplitudes * phases), n_fft, hop_length)
        ahead = rebuilt - MOMENTUM / (1 + MOMENTUM) * previous
        phases, previous = ahead / ahead.abs().clamp_min(LOG_FLOOR), rebuilt
    return synthesis(amplitudes * phases)


def pad_to_multiple(waveform: torch.Tensor, size: int) -> torch.Tensor:
    """Waveforms (B, T) with silence after them, up to a multiple of `size`."""
    return F.pad(waveform, (0, -waveform.shape[-1] % size))
