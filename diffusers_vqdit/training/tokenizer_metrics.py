"""How well a tokenizer gives pictures, texts or sounds back, and how it uses its codes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..models.image_vq import ImageVQModel
from ..models.text_vq import TextVQModel
from ..pipelines.audio_codecs import decode_waveform, encode_waveform, has_own_codes, num_audio_codes, output_rate
from ..utils.decoding import to_pixels
from ..utils.distributed import sum_over_processes
from ..utils.texts import in_parts, normalized, tokenize_to_length
from .audio_losses import SpectralLoss
from .caption_recogniser import CaptionRecogniser
from .frechet_distance import FrechetDistance
from .metrics import counts_by_level, level_figures, psnr, ssim, usage_of_counts


@torch.no_grad()
def measure_image_tokenizer(
    model: ImageVQModel,
    batches: Iterable[torch.Tensor],
    *,
    features: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, float]:
    """PSNR, SSIM, code usage and perplexity, and the Frechet distance of the reconstructions.

    Args:
        model: the tokenizer; it is left in evaluation mode.
        batches: pictures (B, C, H, W) uint8. Each process measures its own, and all return the figures of the whole.
        features: see [`~training.frechet_distance.FrechetDistance`]; without it no Frechet distance is measured.

    Returns:
        ``psnr`` in dB and ``ssim``, means over the pictures; ``mse`` of pixels in [-1, 1], over them all; ``usage``,
        the share of the codes that is used; ``perplexity`` in [1, num_codes]; of residual codes these two for each
        level, ``usage_1``, ..., and their means; ``count``; and ``rfid`` with `features`.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=model.device)
    counts = torch.zeros(model.config.num_quantizers, model.num_codes, dtype=torch.float64, device=model.device)
    distance = None if features is None else FrechetDistance(features)
    for batch in batches:
        original = to_pixels(batch).to(model.device)
        codes = model.encode_codes(original)
        decoded = model.decode_codes(codes).sample.float().clamp(-1, 1)
        error = (decoded - original).square().mean((1, 2, 3))
        values = torch.stack([psnr(decoded, original), ssim(decoded, original), error, torch.ones_like(error)])
        sums += values.double().sum(1)
        counts += counts_by_level(codes, model.num_codes)
        if distance is not None:
            distance.update(original, real=True)
            distance.update(decoded, real=False)
    sums, counts = sum_over_processes(sums), sum_over_processes(counts)
    count = sums[3].item()
    figures = {name: sums[index].item() / count for index, name in enumerate(("psnr", "ssim", "mse"))}
    figures |= level_figures(*usage_of_counts(counts)) | {"count": int(count)}
    if distance is not None:
        figures["rfid"] = distance.compute()
    return figures


@torch.no_grad()
def measure_text_tokenizer(
    model: TextVQModel, tokenizer, captions: Mapping[str, Iterable[str]], batch_size: int = 256
) -> dict[str, float]:
    """Shares of captions that come back exactly, as the tokenizer's normaliser writes them, and the use of codes.

    Args:
        model: the text VQ; it is left in evaluation mode.
        tokenizer: the tokenizer beside it.
        captions: by column, one or more each.
        batch_size: captions encoded at once.

    Returns:
        ``exact_{column}`` of each column; ``usage`` and ``perplexity`` of the codes of positions that hold a token, as
        [`measure_image_tokenizer`] has them; ``positions``, how many of these a caption has on average; ``count``.
    """
    model.eval()
    figures, count, positions = {}, 0, 0
    counts = torch.zeros(len(model.quantizers), model.num_codes, dtype=torch.int64)
    for column, texts in captions.items():
        exact = total = 0
        for part in in_parts(texts, batch_size):
            tokens = tokenize_to_length(tokenizer, part, model.config.max_length)[0].to(model.device)
            codes = model.encode_codes(tokens)
            decoded = tokenizer.batch_decode(model.decode_codes(codes).argmax(-1), skip_special_tokens=True)
            exact += sum(text == normalized(tokenizer, truth) for text, truth in zip(decoded, part, strict=True))
            real = (tokens != tokenizer.pad_token_id).unflatten(1, (-1, model.config.downsample_factor)).any(-1)
            used = codes.reshape(*real.shape, -1)[real].cpu()  # (M, q)
            counts += torch.stack([torch.bincount(level, minlength=model.num_codes) for level in used.unbind(1)])
            positions, total = positions + len(used), total + len(part)
        figures[f"exact_{column}"] = exact / total
        count += total
    return figures | level_figures(*usage_of_counts(counts)) | {"positions": positions / count, "count": count}


@torch.no_grad()
def measure_audio_tokenizer(
    codec: Any, feature_extractor: Any, sounds: Iterable[np.ndarray], captions: Sequence[str] | None = None
) -> dict[str, float]:
    """How well a codec gives sounds back, and how it uses its codes.

    Args:
        codec, feature_extractor: as [`~pipelines.audio_codecs.load_audio_codec`] gives them.
        sounds: waveforms (T,) at the feature extractor's rate, one after the other.
        captions: English texts that the sounds say, for a recogniser to tell them by, among all of them.

    Returns:
        ``spectral_distance`` ([`~training.audio_losses.SpectralLoss`]), the mean over the sounds, of a codec that
        gives sounds at the rate that it takes; ``psnr`` of the log-mel spectrograms of a [`SpectrogramVQModel`];
        ``usage`` and ``perplexity``, by level too; ``count``; with `captions` the shares ``recognised_originals`` and
        ``recognised``, and what tells how far the recogniser can be trusted: ``recognised_quarter_random`` and
        ``recognised_half_random``, with so many of the codes drawn at random, and of a [`SpectrogramVQModel`]
        ``recognised_griffin_lim``, without codes.
    """
    rate, made_rate = feature_extractor.sampling_rate, output_rate(codec, feature_extractor)
    spectral = SpectralLoss(rate).to(codec.device)
    found: dict[str, list[float]] = {}
    every: list[torch.Tensor] = []
    recogniser = None if captions is None else CaptionRecogniser(sorted(set(captions)))
    generator, num_codes = torch.Generator().manual_seed(0), num_audio_codes(codec)
    for number, sound in enumerate(sounds):
        codes = encode_waveform(codec, feature_extractor, sound, codec.device)
        every.append(codes.cpu())
        waveform, made = torch.from_numpy(sound).to(codec.device)[None], decode_waveform(codec, codes)
        if made_rate == rate:
            size = min(len(sound), len(made))
            found.setdefault("spectral_distance", []).append(spectral(made[None, :size], waveform[:, :size]).item())
        if has_own_codes(codec):
            decoded = codec.vq.decode_codes(codes.T[None]).sample
            found.setdefault("psnr", []).append(psnr(decoded, codec.spectrogram(waveform)).item())
        if recogniser is not None and captions is not None and recogniser.knows(said := captions[number]):
            found.setdefault("recognised_originals", []).append(recogniser.hears(sound, rate, said))
            others = {"recognised": made}
            for name, part in (("quarter", 1 / 4), ("half", 1 / 2)):
                drawn = torch.randint(0, num_codes, codes.shape, generator=generator).to(codes.device)
                chosen = (torch.rand(codes.shape, generator=generator) < part).to(codes.device)
                others[f"recognised_{name}_random"] = decode_waveform(codec, torch.where(chosen, drawn, codes))
            if has_own_codes(codec):
                others["recognised_griffin_lim"] = codec.invert_spectrogram(codec.spectrogram(waveform))[0]
            for name, other in others.items():
                found.setdefault(name, []).append(recogniser.hears(other.cpu().numpy(), made_rate, said))
    codes = torch.cat(every)
    codes = codes.reshape(-1, 1) if has_own_codes(codec) else codes  # of one codebook
    counts = counts_by_level(codes.reshape(-1, 1, 1, codes.shape[1]), num_codes)
    figures = {name: sum(values) / len(values) for name, values in found.items()}
    return figures | level_figures(*usage_of_counts(counts)) | {"count": len(every)}
