"""Pictures to the latents that Gaussian diffusion works on, and back."""

from collections.abc import Iterable

import torch
from diffusers import VQModel


def downsample_factor(vae: torch.nn.Module) -> int:
    """Pixels of a picture's side for each latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_statistics(
    vae: torch.nn.Module, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of a VAE's latents, to broadcast to (B, D, h, w), as its config has them.

    The deviation is ``latents_std / scaling_factor`` and the mean ``latents_mean``, as in diffusers' pipelines; a
    config with ``scaling_factor`` and ``shift_factor`` alone is read as it is there, too.

    Args:
        device: where they are to be; by default PyTorch's, the CPU unless that was changed.
    """
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if (mean is None) != (std is None):
        raise ValueError(f"latents_mean={mean} and latents_std={std}: the VAE's config must have both or neither")
    if mean is None:
        mean, std = [vae.config.get("shift_factor") or 0.0], [1.0]
    mean, std = (torch.tensor(value, dtype=torch.float32, device=device).view(1, -1, 1, 1) for value in (mean, std))
    return mean, std / vae.config.scaling_factor


@torch.no_grad()
def raw_latents(vae: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Latents (B, D, h, w) of pictures (B, C, H, W) in [-1, 1]: before quantization, or a KL-VAE's most likely.

    The pictures are where the VAE computes, which isn't ``vae.device`` while its weights are offloaded."""
    encoded = vae.encode(pixels.to(vae.dtype))
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()


def encode_latents(vae: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Normalised latents (B, D, h, w), float32, of pictures (B, C, H, W) in [-1, 1]."""
    mean, deviation = latent_statistics(vae, pixels.device)
    return (raw_latents(vae, pixels).float() - mean) / deviation


@torch.no_grad()
def decode_latents(vae: torch.nn.Module, latents: torch.Tensor, force_not_quantize: bool = False) -> torch.Tensor:
    """Pictures (B, C, H, W), about [-1, 1], of normalised latents (B, D, h, w).

    Those of a VQ model pass through the codebook first, as in LDM-VQ (Rombach et al. 2022, section 3.1), unless
    `force_not_quantize`.
    """
    mean, deviation = latent_statistics(vae, latents.device)
    raw = (latents.float() * deviation + mean).to(vae.dtype)
    if isinstance(vae, VQModel):
        return vae.decode(raw, force_not_quantize=force_not_quantize).sample
    return vae.decode(raw).sample


def measure_latents(batches: Iterable[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of raw latents, over all of them.

    They belong into the VAE's config, with a scaling factor of 1:
    ``vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0)``.

    Args:
        batches: raw latents (B, D, h, w), batch by batch.

    Raises:
        ValueError: if there are none, or a channel is constant.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for latents in batches:
        latents = latents.double()
        count += latents.numel() // latents.shape[1]
        total = total + latents.sum((0, 2, 3))
        squares = squares + latents.square().sum((0, 2, 3))
    if not count:
        raise ValueError("batches has no latents to measure")
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    if (std < 1e-8).any():
        raise ValueError(f"channels {(std < 1e-8).nonzero()[:, 0].tolist()} of the latents are constant")
    return mean.tolist(), std.tolist()
