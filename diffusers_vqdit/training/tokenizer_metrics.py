"""How well a tokenizer gives pictures or texts back, and how it uses its codes."""

from collections.abc import Callable, Iterable, Mapping

import torch

from ..models.image_vq import ImageVQModel
from ..models.text_vq import TextVQModel
from ..utils.decoding import to_pixels
from ..utils.distributed import sum_over_processes
from ..utils.texts import in_parts, normalized, tokenize_to_length
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
        batches: pictures (B, 3, H, W) uint8. Each process measures its own, and all return the figures of the whole.
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
