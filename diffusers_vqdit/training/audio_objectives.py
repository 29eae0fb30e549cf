"""What training lowers, and what validation measures, of each kind of audio codec."""

import argparse
import inspect
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ..models.quantizers import Quantizer
from ..models.spectrogram_vq import SpectrogramVQModel
from ..pipelines.audio_codecs import (
    decode_waveform,
    encode_waveform,
    has_own_codes,
    num_audio_codes,
    output_rate,
    samples_per_frame,
)
from ..utils.distributed import gather_rows
from .audio_losses import SPECTRAL_WEIGHT, WINDOWS, SpectralLoss
from .metrics import counts_by_level, level_figures, psnr, usage_of_counts


logger = logging.getLogger(__name__)

DIFFERENCES = {"l1": F.l1_loss, "l2": F.mse_loss}


@dataclass
class AudioStep:
    """What a codec made of a micro-batch.

    Args:
        loss: of the codec alone, a scalar: the weighted sum of the next two.
        reconstruction, commitment: scalars, as they are logged.
        real, made: spectrograms (B, 1, M, n) in about [-1, 1].
        figures: ``usage`` and ``perplexity`` of its codes.
        codes: where a [`~training.watch.TrainingWatch`] knows their codebook.
    """

    loss: torch.Tensor
    reconstruction: torch.Tensor
    commitment: torch.Tensor
    real: torch.Tensor
    made: torch.Tensor
    figures: dict[str, float] = field(default_factory=dict)
    codes: torch.LongTensor | None = None


class AudioObjective(ABC):
    """The training of a codec.

    Attributes:
        metric: what validation measures.
        quantizer: that is trained, where its kind is one of this package's.
    """

    metric: str
    quantizer: Quantizer | None = None

    def __init__(self, codec: Any, feature_extractor: Any) -> None:
        self.feature_extractor = feature_extractor
        self.sampling_rate: int = feature_extractor.sampling_rate
        self.hop = samples_per_frame(codec, feature_extractor)
        self.num_codes = num_audio_codes(codec)
        codec.float()

    @abstractmethod
    def step(self, model: torch.nn.Module, waveforms: torch.Tensor) -> AudioStep:
        """What is learned of waveforms (B, T), T a multiple of `hop`, by a codec as Accelerate wraps it."""

    @abstractmethod
    def picture_size(self, length: int) -> tuple[int, int]:
        """(M, n) of the spectrograms of `length` samples."""

    @abstractmethod
    def measure(self, codec: Any, waveform: torch.Tensor) -> tuple[float, torch.LongTensor]:
        """The metric and the codes (n, q) of a waveform (T,)."""

    def train(self, codec: Any) -> None:
        """Put a codec into training mode."""
        codec.train()

    def usage(self, codes: torch.LongTensor) -> dict[str, float]:
        """``usage`` and ``perplexity`` of codes (..., q), of residual ones by level too."""
        counts = counts_by_level(codes.reshape(-1, 1, 1, codes.shape[-1]), self.num_codes)
        return level_figures(*usage_of_counts(counts))


class SpectrogramObjective(AudioObjective):
    """Of a [`SpectrogramVQModel`]: log-mel spectrograms. Waveforms are made of them by what learns nothing."""

    metric = "psnr"

    def __init__(self, codec: SpectrogramVQModel, feature_extractor: Any, args: argparse.Namespace) -> None:
        super().__init__(codec, feature_extractor)
        self.bands, self.hop_length = codec.config.num_mel_bins, codec.config.hop_length
        self.difference = DIFFERENCES[args.reconstruction_loss]
        self.quantizer = codec.vq.quantize
        if args.gradient_checkpointing:
            codec.enable_gradient_checkpointing()
        if args.compile:
            # The quantizer, whose statistics and restarts break graphs, stays as it is.
            for part in (codec.vq.encoder, codec.vq.decoder):
                part.compile()

    def step(self, model: torch.nn.Module, waveforms: torch.Tensor) -> AudioStep:
        output = model(waveforms)
        made, real = output.sample.float(), output.spectrogram.float()
        reconstruction = self.difference(made, real)
        loss, figures = reconstruction + output.commit_loss, level_figures(output.usage, output.perplexity)
        return AudioStep(loss, reconstruction, output.commit_loss, real, made, figures, output.codes)

    def picture_size(self, length: int) -> tuple[int, int]:
        return self.bands, length // self.hop_length

    def measure(self, codec: Any, waveform: torch.Tensor) -> tuple[float, torch.LongTensor]:
        spectrogram = codec.spectrogram(waveform[None])
        codes = codec.vq.encode_codes(spectrogram)
        return psnr(codec.vq.decode_codes(codes).sample, spectrogram).item(), codes[0].T

    def usage(self, codes: torch.LongTensor) -> dict[str, float]:
        return super().usage(codes.reshape(-1, 1))  # of one codebook


class WaveformObjective(AudioObjective):
    """Of a codec of transformers: the [`SpectralLoss`] of what it makes, and the loss of its quantizer where the model
    gives one, as DAC does.

    What no gradient reaches is frozen. DAC's quantizer has a straight-through estimator and losses for its codebooks:
    all of it is trained. Those of Encodec and Mimi hand on codes alone, and their codebooks are buffers that only
    their authors' code updates: the decoder is trained, and sounds keep the codes that they have.

    Raises:
        ValueError: if the codec doesn't take and give waveforms of one rate, or nothing of it can be trained.
    """

    metric = "spectral_distance"

    def __init__(self, codec: Any, feature_extractor: Any, args: argparse.Namespace) -> None:
        super().__init__(codec, feature_extractor)
        kind = type(codec).__name__
        if codec.main_input_name != "input_values" or output_rate(codec, feature_extractor) != self.sampling_rate:
            raise ValueError(
                f"pretrained_model_name_or_path: a {kind} can't be trained here; a codec must make waveforms of "
                "waveforms, at one sampling rate"
            )
        self.spectral = SpectralLoss(self.sampling_rate, DIFFERENCES[args.reconstruction_loss]).to(codec.device)
        self.options = {}
        if "bandwidth" in inspect.signature(codec.forward).parameters:  # by default the lowest, of fewest codebooks
            self.options["bandwidth"] = max(codec.config.target_bandwidths)
        if args.gradient_checkpointing:
            codec.gradient_checkpointing_enable()
        self._freeze_the_unreached(codec)
        if args.compile:
            codec.compile()

    def _freeze_the_unreached(self, codec: Any) -> None:
        parameters = list(codec.parameters())
        with torch.random.fork_rng():
            loss = self.step(codec.train(), torch.zeros(1, 4 * self.hop, device=codec.device)).loss
        if not loss.requires_grad:
            raise ValueError(f"pretrained_model_name_or_path: a {type(codec).__name__} gives sounds no gradient")
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.requires_grad_(gradient is not None)
        if frozen := sum(p.numel() for p, gradient in zip(parameters, found, strict=True) if gradient is None):
            logger.info(f"{frozen / 1e6:.1f} M parameters, which no gradient reaches, stay as they are")

    def train(self, codec: Any) -> None:
        codec.train()
        for module in codec.modules():  # dropout would change the codes of what is frozen
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()

    def step(self, model: torch.nn.Module, waveforms: torch.Tensor) -> AudioStep:
        output = model(input_values=waveforms[:, None], **self.options)
        made = output.audio_values.reshape(len(waveforms), -1)[:, : waveforms.shape[1]].float()
        real = waveforms[:, : made.shape[1]]
        reconstruction, given = self.spectral(made, real), getattr(output, "loss", None)
        commitment = reconstruction.new_zeros(()) if given is None else given.float().mean()
        loss = SPECTRAL_WEIGHT * len(WINDOWS) * reconstruction + commitment
        codes = output.audio_codes.reshape(len(waveforms), -1, output.audio_codes.shape[-1]).mT  # (B, n, q)
        pictures = self.spectral.picture(real), self.spectral.picture(made)
        return AudioStep(loss, reconstruction, commitment, *pictures, figures=self.usage(gather_rows(codes)))

    def picture_size(self, length: int) -> tuple[int, int]:
        height, width = self.spectral.picture(
            torch.zeros(1, length, device=next(self.spectral.buffers()).device)
        ).shape[2:]
        return height, width

    def measure(self, codec: Any, waveform: torch.Tensor) -> tuple[float, torch.LongTensor]:
        codes = encode_waveform(codec, self.feature_extractor, waveform.cpu().numpy(), waveform.device)
        made = decode_waveform(codec, codes)[None, : len(waveform)]
        return self.spectral(made, waveform[None, : made.shape[1]]).item(), codes


def audio_objective(codec: Any, feature_extractor: Any, args: argparse.Namespace) -> AudioObjective:
    """How a codec is trained, by ``reconstruction_loss``, ``gradient_checkpointing`` and ``compile`` of `args`; it is
    put into training mode.

    Where it is None, ``reconstruction_loss`` is set to the kind's own: ``"l2"`` of a spectrogram, ``"l1"`` of a
    waveform's several.
    """
    own = has_own_codes(codec)
    args.reconstruction_loss = args.reconstruction_loss or ("l2" if own else "l1")
    objective = (SpectrogramObjective if own else WaveformObjective)(codec, feature_extractor, args)
    objective.train(codec)
    return objective
