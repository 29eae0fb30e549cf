"""Losses of Gaussian diffusion and flow matching over latents, as pure functions."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from ..schedulers.samplers import Generators, uniform
from ..utils.checks import check_number
from .optimization import unwrap


def at_timesteps(values: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """``values[timesteps]`` as (B, 1, 1, 1), float32, on the timesteps' device."""
    return values.to(timesteps.device, torch.float32)[timesteps].view(-1, 1, 1, 1)


def diffusion_target(
    scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.LongTensor
) -> torch.Tensor:
    """What is predicted of x_t = sqrt(a) x_0 + sqrt(1 - a) e, (B, C, h, w), by the scheduler's ``prediction_type``.

    Args:
        scheduler: whose ``alphas_cumprod`` a is.
        latents, noise: x_0 and e, (B, C, h, w).
        timesteps: (B,) int64.

    Returns:
        for ``"epsilon"`` e, for ``"v_prediction"`` sqrt(a) e - sqrt(1 - a) x_0 (Salimans & Ho 2022, section 4), for
        ``"sample"`` x_0.
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    if prediction_type == "sample":
        return latents
    raise ValueError(f"prediction_type={prediction_type!r} must be 'epsilon', 'v_prediction' or 'sample'")


def min_snr_weights(snr: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Weights of the squared error under which that of x_0 has weight min(SNR, gamma) (Hang et al. 2023, section 3.4).

    The error of x_0 is that of epsilon over SNR, and that of v over SNR + 1. `snr` is a / (1 - a): diffusers'
    ``compute_snr`` rounds two roots and their quotient's square besides.
    """
    clipped = snr.clamp(max=gamma)
    return clipped / {"epsilon": snr, "v_prediction": snr + 1.0, "sample": torch.ones_like(snr)}[prediction_type]


def flow_matching_pair(
    latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_s = (1 - s) x_0 + s e and its velocity dx/ds = e - x_0 (Lipman et al. 2023; Ma et al. 2024, SiT, eq. 1 and 4).

    `sigmas` s is (B, 1, 1, 1) in [0, 1], 1 being noise, as in `FlowMatchEulerDiscreteScheduler`, whose ``scale_noise``
    takes none but those of its ``num_train_timesteps``.
    """
    return (1.0 - sigmas) * latents + sigmas * noise, noise - latents


def draw_sigmas(batch_size: int, shift: float, logit_normal: bool, generator: Generators = None) -> torch.Tensor:
    """Noise levels (B,) in (0, 1): uniform as in SiT or logit-normal, then shifted (Esser et al. 2024, section 3).

    `generator` is one, or one a row, on the CPU: diffusers' ``compute_density_for_timestep_sampling`` takes one only,
    and its draws depend on how many processes share a batch.
    """
    if logit_normal:
        sigmas = randn_tensor((batch_size,), generator=generator).sigmoid()
    else:
        sigmas = uniform(torch.Size((batch_size,)), generator, torch.device("cpu")).float()
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def variance_bound(
    latents: torch.Tensor,
    noised: torch.Tensor,
    noise_prediction: torch.Tensor,
    variance_prediction: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
) -> torch.Tensor:
    """The variational bound's term of each sample (B,) in bits per dimension, for learning the variance.

    log sigma^2 = f log beta_t + (1 - f) log beta~_t with f = (v + 1) / 2 (Nichol & Dhariwal 2021, eq. 15); the mean's
    prediction gets no gradient (their L_hybrid). At t = 0 the term is the density's, not that of 8-bit pixels.

    Args:
        latents, noised, noise_prediction, variance_prediction: x_0, x_t, e and v, (B, C, h, w).
        timesteps: (B,) int64.
        alphas_cumprod: (T,).
    """
    alphas_cumprod = alphas_cumprod.double()
    previous = F.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
    betas = 1.0 - alphas_cumprod / previous
    posterior = betas * (1.0 - previous) / (1.0 - alphas_cumprod)
    log_posterior = torch.cat([posterior[1:2], posterior[1:]]).log()  # at t = 0 it has no variance
    from_clean = betas * previous.sqrt() / (1.0 - alphas_cumprod)
    from_noised = (1.0 - previous) * (1.0 - betas).sqrt() / (1.0 - alphas_cumprod)

    def at(values: torch.Tensor) -> torch.Tensor:
        return at_timesteps(values, timesteps)

    predicted = (noised - (1.0 - at(alphas_cumprod)).sqrt() * noise_prediction.detach()) / at(alphas_cumprod).sqrt()
    mean = at(from_clean) * predicted + at(from_noised) * noised
    true_mean = at(from_clean) * latents + at(from_noised) * noised
    fraction = (variance_prediction + 1.0) / 2.0
    log_variance = fraction * at(betas.log()) + (1.0 - fraction) * at(log_posterior)
    # KL(N(true_mean, posterior) || N(mean, exp(log_variance)))
    ratio = at(log_posterior) - log_variance
    divergence = 0.5 * (ratio.exp() - 1.0 - ratio + (true_mean - mean).square() * (-log_variance).exp())
    likelihood = 0.5 * (math.log(2.0 * math.pi) + log_variance + (latents - mean).square() * (-log_variance).exp())
    bound = torch.where(timesteps.view(-1, 1, 1, 1) == 0, likelihood, divergence)
    return bound.flatten(1).mean(1) / math.log(2.0)


def drawn_to_drop(batch_size: int, probability: float, generator: Generators = None) -> torch.BoolTensor:
    """Which samples (B,) lose a condition in this step, for classifier-free guidance: each with `probability`.

    Drawn once a step, so that all blocks see the same (stock DiT draws in every block). `generator` is one, or one a
    row, on the CPU.
    """
    check_number("probability", probability, 0, 1)
    return uniform(torch.Size((batch_size,)), generator, torch.device("cpu")) < probability


def latent_diffusion_loss(
    transformer: nn.Module,
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler,
    latents: torch.Tensor,
    labels: torch.LongTensor,
    *,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    snr_gamma: float | None = None,
    logit_normal: bool = False,
    generator: Generators = None,
) -> torch.Tensor:
    """The mean squared error of one batch, with the variance's bound where the transformer learns it.

    Args:
        transformer: a `VQDiTTransformer2DModel` with ``segments=None``, possibly wrapped.
        scheduler: a `FlowMatchEulerDiscreteScheduler` for flow matching; else a `DDPMScheduler`, whose
            ``prediction_type`` is trained.
        latents: normalised x_0 (B, C, h, w).
        labels: (B,), the null label where dropped.
        encoder_hidden_states, encoder_attention_mask: captions, rows of zeros in the mask where dropped.
        snr_gamma: min-SNR's gamma; None for none. Not for flow matching.
        logit_normal: whether flow matching draws its noise levels so, and not uniformly.
        generator: draws noise and timesteps; one, or one a row, on the CPU.
    """
    batch_size, channels = latents.shape[:2]
    noise = randn_tensor(latents.shape, generator=generator).to(latents)
    captions = {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
    learns_variance = unwrap(transformer).config.out_channels == 2 * channels
    if hasattr(scheduler, "scale_noise"):
        if learns_variance or snr_gamma is not None:
            raise ValueError("flow matching has no learned variance (out_channels = 2 in_channels) and no snr_gamma")
        sigmas = draw_sigmas(batch_size, scheduler.config.shift, logit_normal, generator).to(latents)
        noised, target = flow_matching_pair(latents, noise, sigmas.view(-1, 1, 1, 1))
        times = sigmas * scheduler.config.num_train_timesteps
        prediction = transformer(noised, times, labels, **captions).sample.float()
        return F.mse_loss(prediction, target)
    prediction_type = scheduler.config.prediction_type
    times = uniform(latents.shape[:1], generator, torch.device("cpu")) * scheduler.config.num_train_timesteps
    times = times.long().to(latents.device)
    noised = scheduler.add_noise(latents, noise, times)
    output = transformer(noised, times, labels, **captions).sample.float()
    target = diffusion_target(scheduler, latents, noise, times)
    loss = (output[:, :channels] - target).square().flatten(1).mean(1)  # (B,)
    if snr_gamma is not None:
        alphas = at_timesteps(scheduler.alphas_cumprod, times)
        loss = loss * min_snr_weights(alphas / (1.0 - alphas), snr_gamma, prediction_type).flatten()
    if learns_variance:
        if prediction_type != "epsilon":
            raise ValueError(f"a learned variance needs prediction_type='epsilon', got {prediction_type!r}")
        loss = loss + variance_bound(
            latents, noised, output[:, :channels], output[:, channels:], times, scheduler.alphas_cumprod
        )
    return loss.mean()


# ---------------------------------------------------------------------------------------------------------------------
# Alignment of hidden states to a frozen encoder


class AlignmentProjector(nn.Sequential):
    """REPA's projection of hidden states (B, N, D) to a vision encoder's width (Yu et al. 2025, section 3)."""

    def __init__(self, dim: int, feature_dim: int, hidden_dim: int = 2048) -> None:
        super().__init__(
            nn.Linear(dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.SiLU(),
            nn.Linear(hidden_dim, feature_dim),
        )


def alignment_loss(projected: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Mean of minus the cosine between projected hidden states and features (B, N, F) (Yu et al. 2025, eq. 8)."""
    return -F.cosine_similarity(projected.float(), features.float(), dim=-1).mean()


def patch_features(encoder: nn.Module, pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Features (B, N, F) of a transformers vision backbone on a grid of N = prod(grid) patches.

    Class and register tokens are left out, and another grid than the encoder's own is interpolated.

    Args:
        encoder: a ViT with ``patch_size`` in its config (DINOv2, CLIP's vision model, ViT), or a convolutional one
            whose last hidden state is (B, F, h, w).
        pixels: (B, 3, H, W), normalised as the encoder wants them.
        grid: rows and columns of the transformer's patches.
    """
    states = encoder(pixel_values=pixels).last_hidden_state
    if states.ndim == 3:
        patch = encoder.config.patch_size
        rows, columns = pixels.shape[2] // patch, pixels.shape[3] // patch
        states = states[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))  # (B, F, h, w)
    if tuple(states.shape[2:]) != tuple(grid):
        states = F.interpolate(states, grid, mode="bilinear", antialias=True)
    return states.flatten(2).transpose(1, 2)
