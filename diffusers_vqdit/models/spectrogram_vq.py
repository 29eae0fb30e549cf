"""The audio tokenizer: waveforms to codes of their spectrograms and back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..utils.checkpoint_mixin import ModelCheckpointMixin
from ..utils.checks import check_integer, check_integers, check_number, shown
from .image_vq import ImageVQModel
from .mel_spectrogram import griffin_lim, log_mel_spectrogram, mel_filters, pad_to_multiple
from .outputs import CastableOutput


MAX_RATE = 2**20  # Hz


@dataclass
class SpectrogramVQOutput(CastableOutput):
    """Output of [`SpectrogramVQModel`].

    Args:
        sample (`torch.Tensor` of shape `(B, 1, M, n)`): the reconstruction of the log-mel spectrogram.
        spectrogram (`torch.Tensor` of shape `(B, 1, M, n)`): the spectrogram itself, in [-1, 1].
        commit_loss (`torch.Tensor`): the quantizer's loss, a scalar.
        codes (`torch.LongTensor` of shape `(B, n, q)`): in [0, num_codes).
        usage, perplexity (`torch.Tensor`): of the batch's codes, see [`~models.quantizers.QuantizerOutput`].
    """

    sample: torch.Tensor
    spectrogram: torch.Tensor | None = None
    commit_loss: torch.Tensor | None = None
    codes: torch.LongTensor | None = None
    usage: torch.Tensor | None = None
    perplexity: torch.Tensor | None = None


class SpectrogramVQModel(ModelCheckpointMixin, ModelMixin, ConfigMixin):
    """An audio codec: an [`ImageVQModel`] of one channel over log-mel spectrograms.

    A waveform (B, T) becomes the log10 of its mel amplitudes (B, M, T / hop_length), which `log_mel_range` maps to
    [-1, 1]; with f = 2^(levels - 1) the picture of it has (M / f) x (T / (f hop_length)) codes, and those of a column
    are a frame's: (B, n, q) with q = M / f. Codes become a spectrogram again, and that a waveform by the algorithm of
    Griffin & Lim (1984), or by a vocoder.

    Args:
        sampling_rate: of the waveforms, in Hz.
        n_fft, hop_length: samples of a spectrum's window, and from one to the next.
        num_mel_bins: M, mel bands from `min_frequency` to `max_frequency`, by default half the sampling rate, in Hz.
        log_mel_range: log10 of the amplitudes that become -1 and 1; what is beyond is cut off.
        block_out_channels, layers_per_block, norm_num_groups, latent_channels: of the [`ImageVQModel`].
        num_vq_embeddings, vq_embed_dim: size K of the codebook and length of its vectors, of unit length.
        beta, ema_decay, restart_threshold, codebook_init: see [`~models.quantizers.VectorQuantizer`].
        griffin_lim_iterations: of the algorithm.

    Raises:
        ValueError: if an argument has a wrong type, is out of range or doesn't fit the others.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["quantize", "norm"]
    _supports_group_offloading = False

    @register_to_config
    def __init__(
        self,
        sampling_rate: int = 11025,
        n_fft: int = 512,
        hop_length: int = 128,
        num_mel_bins: int = 64,
        min_frequency: float = 40.0,
        max_frequency: float | None = None,
        log_mel_range: tuple[float, float] = (-4.0, 0.5),
        block_out_channels: tuple[int, ...] = (24, 48, 96, 128),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        latent_channels: int = 64,
        num_vq_embeddings: int = 2048,
        vq_embed_dim: int = 8,
        beta: float = 0.25,
        ema_decay: float = 0.99,
        restart_threshold: float = 0.1,
        codebook_init: str = "kmeans",
        griffin_lim_iterations: int = 32,
    ) -> None:
        super().__init__()
        check_integer("sampling_rate", sampling_rate, 1, MAX_RATE)
        check_integer("n_fft", n_fft, 4)
        check_integer("hop_length", hop_length, 1, n_fft // 2)
        check_integer("griffin_lim_iterations", griffin_lim_iterations, 1)
        check_number("min_frequency", min_frequency, 0)
        if max_frequency is not None:
            check_number("max_frequency", max_frequency, min_frequency, sampling_rate / 2, above=True)
        if not isinstance(log_mel_range, list | tuple) or len(log_mel_range) != 2:
            raise ValueError(f"log_mel_range={shown(log_mel_range)} must be two numbers, the lower first")
        check_number(
            "log_mel_range[1]", log_mel_range[1], check_number("log_mel_range[0]", log_mel_range[0]), above=True
        )
        levels = len(check_integers("block_out_channels", block_out_channels, 1))
        factor = 2 ** (levels - 1)
        if check_integer("num_mel_bins", num_mel_bins, 1) % factor:
            raise ValueError(
                f"num_mel_bins={num_mel_bins} must be a multiple of {factor}, as there are {levels} levels"
            )
        self.vq = ImageVQModel(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            latent_channels=latent_channels,
            mid_block_add_attention=False,
            sample_size=num_mel_bins,
            num_vq_embeddings=num_vq_embeddings,
            vq_embed_dim=vq_embed_dim,
            codebook_norm="l2",
            codebook_update="ema",
            codebook_init=codebook_init,
            beta=beta,
            ema_decay=ema_decay,
            restart_threshold=restart_threshold,
        )

    @property
    def num_codes(self) -> int:
        """Size K of the codebook."""
        return self.config.num_vq_embeddings

    @property
    def downsample_factor(self) -> int:
        """Samples of a frame of codes."""
        return self.config.hop_length * self.vq.downsample_factor

    def filters(self, device: torch.device | str) -> torch.Tensor:
        """The mel filters (M, F), float32 whatever the weights are; where values are, as weights may be offloaded."""
        c = self.config
        high = c.sampling_rate / 2 if c.max_frequency is None else c.max_frequency
        return mel_filters(c.sampling_rate, c.n_fft, c.num_mel_bins, c.min_frequency, high).to(device)

    def spectrogram(self, waveform: torch.Tensor) -> torch.Tensor:
        """Log-mel spectrograms (B, 1, M, n f), in [-1, 1], of waveforms (B, T), followed by silence up to n frames.

        Raises:
            ValueError: if the shape or dtype is not that, or there are no samples.
        """
        if waveform.ndim != 2 or not waveform.is_floating_point() or not waveform.numel():
            raise ValueError(f"waveform must be floats (B, T), got {waveform.dtype} of shape {tuple(waveform.shape)}")
        low, high = self.config.log_mel_range
        whole = pad_to_multiple(waveform, self.downsample_factor)
        log_mel = log_mel_spectrogram(whole, self.filters(whole.device), self.config.n_fft, self.config.hop_length)
        return (2 * (log_mel - low) / (high - low) - 1).clamp(-1, 1)[:, None].to(waveform.dtype)

    @apply_forward_hook
    @torch.no_grad()
    def encode_codes(self, waveform: torch.Tensor) -> torch.LongTensor:
        """Codes (B, n, q) int64 in [0, num_codes) of waveforms (B, T) in about [-1, 1].

        Raises:
            ValueError: as [`spectrogram`].
        """
        return self.vq.encode_codes(self.spectrogram(waveform)).transpose(1, 2)  # (B, M/f, n) to (B, n, q)

    @apply_forward_hook
    def decode_log_mel(self, codes: torch.LongTensor) -> torch.Tensor:
        """log10 of the mel amplitudes, (B, n f, M) float32, of codes (B, n, q): what vocoders take.

        Raises:
            ValueError: if the codes have another shape or dtype, or are out of range.
        """
        bands = self.config.num_mel_bins // self.vq.downsample_factor
        if codes.ndim != 3 or codes.shape[2] != bands:
            raise ValueError(f"codes must have shape (B, n, {bands}), got {tuple(codes.shape)}")
        return self._log_mel(self.vq.decode_codes(codes.transpose(1, 2)).sample)

    @apply_forward_hook
    def decode_codes(
        self,
        codes: torch.LongTensor,
        vocoder: Callable[[torch.Tensor], torch.Tensor] | None = None,
        return_dict: bool = True,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Waveforms (B, T), float32, of codes (B, n, q).

        Args:
            vocoder: makes them of log-mel spectrograms (B, n f, M), as transformers' `SpeechT5HifiGan` does, which
                has filters and windows of its own: those that this model must have. By default Griffin-Lim.

        Raises:
            ValueError: as [`decode_log_mel`].
        """
        log_mel = self.decode_log_mel(codes)
        sample = self._griffin_lim(log_mel) if vocoder is None else vocoder(log_mel)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @torch.no_grad()
    def invert_spectrogram(self, spectrogram: torch.Tensor) -> torch.Tensor:
        """Waveforms (B, T), float32, of log-mel spectrograms (B, 1, M, n) in [-1, 1], by Griffin-Lim: what codes that
        lost nothing would come back as."""
        return self._griffin_lim(self._log_mel(spectrogram))

    def _log_mel(self, spectrogram: torch.Tensor) -> torch.Tensor:
        """log10 of the mel amplitudes (B, n, M), float32, of spectrograms (B, 1, M, n)."""
        low, high = self.config.log_mel_range
        return low + (high - low) * (spectrogram.float().clamp(-1, 1)[:, 0].transpose(1, 2) + 1) / 2

    def _griffin_lim(self, log_mel: torch.Tensor) -> torch.Tensor:
        c = self.config
        return griffin_lim(log_mel.mT, self.filters(log_mel.device), c.n_fft, c.hop_length, c.griffin_lim_iterations)

    def forward(self, waveform: torch.Tensor, return_dict: bool = True) -> SpectrogramVQOutput | tuple:
        """Encode, quantize and decode the spectrograms of waveforms (B, T)."""
        spectrogram = self.spectrogram(waveform)  # (B, 1, M, n f)
        output = self.vq(spectrogram)
        if not return_dict:
            return output.sample, output.commit_loss
        return SpectrogramVQOutput(
            sample=output.sample,
            spectrogram=spectrogram,
            commit_loss=output.commit_loss,
            codes=output.codes.transpose(1, 2),
            usage=output.usage,
            perplexity=output.perplexity,
        )
