"""How well an image tokenizer gives pictures back, and how it uses its codes."""

from collections.abc import Callable

import torch

from ..models.image_vq import ImageVQModel
from ..models.quantizers import perplexity
from ..utils.distributed import sum_over_processes
from .data import to_pixels
from .frechet_distance import FrechetDistance
from .metrics import psnr, ssim


@torch.no_grad()
def measure_image_tokenizer(
    model: ImageVQModel,
    pictures: torch.Tensor,
    *,
    batch_size: int = 64,
    features: Callable[[torch.Tensor], torch.Tensor] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, float]:
    """PSNR, SSIM, code usage and perplexity, and the Frechet distance of the reconstructions.

    Args:
        model: the tokenizer; it is left in evaluation mode.
        pictures: (N, 3, H, W) uint8, the same on all processes.
        batch_size: of each process.
        features: see [`~training.frechet_distance.FrechetDistance`]; without it no Frechet distance is measured.
        rank, world_size: of this process. Each measures its part, and all return the figures of the whole.

    Returns:
        ``psnr`` in dB and ``ssim``, means over the pictures; ``mse`` of pixels in [-1, 1], over them all; ``usage``,
        the share of the codes that is used; ``perplexity`` in [1, num_codes]; ``count``; and ``rfid`` with `features`.

    Raises:
        ValueError: if there are fewer pictures than processes.
    """
    if len(pictures) < world_size:
        raise ValueError(f"{len(pictures)} pictures can't be shared by {world_size} processes")
    model.eval()
    part, sums = pictures[rank::world_size], torch.zeros(4, dtype=torch.float64, device=model.device)
    counts = torch.zeros(model.num_codes, dtype=torch.float64, device=model.device)
    distance = None if features is None else FrechetDistance(features)
    for batch in part.split(batch_size):
        original = to_pixels(batch).to(model.device)
        codes = model.encode_codes(original)
        decoded = model.decode_codes(codes).sample.float().clamp(-1, 1)
        error = (decoded - original).square().mean((1, 2, 3))
        values = torch.stack([psnr(decoded, original), ssim(decoded, original), error, torch.ones_like(error)])
        sums += values.double().sum(1)
        counts += torch.bincount(codes.flatten(), minlength=model.num_codes)
        if distance is not None:
            distance.update(original, real=True)
            distance.update(decoded, real=False)
    sums, counts = sum_over_processes(sums), sum_over_processes(counts)
    count = sums[3].item()
    figures = {name: sums[index].item() / count for index, name in enumerate(("psnr", "ssim", "mse"))}
    figures |= {
        "usage": (counts > 0).double().mean().item(),
        "perplexity": perplexity(counts / counts.sum()).item(),
        "count": int(count),
    }
    if distance is not None:
        figures["rfid"] = distance.compute()
    return figures
