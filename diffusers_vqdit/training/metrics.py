"""How like two pictures are, and how much of a codebook is in use."""

import torch


def psnr(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture in dB, for pictures (B, C, H, W) in [-1, 1] (peak 2)."""
    error = (prediction.float().clamp(-1, 1) - target.float()).square().flatten(1).mean(1)
    return 10.0 * torch.log10(4.0 / error.clamp_min(1e-12))


def ssim(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each picture, for pictures (B, C, H, W) in [-1, 1].

    An 11 x 11 Gaussian window with a deviation of 1.5 pixels, K1 = 0.01, K2 = 0.03 (Wang et al. 2004, eq. 13),
    averaged over channels and over the positions where the window fits.
    """
    window_size, deviation, peak = 11, 1.5, 2.0
    if min(prediction.shape[-2:]) < window_size:
        raise ValueError(f"ssim needs pictures of at least {window_size} pixels, got {tuple(prediction.shape)}")
    channels = prediction.shape[1]
    offsets = torch.arange(window_size, device=prediction.device, dtype=torch.float32) - window_size // 2
    line = torch.exp(-offsets.square() / (2 * deviation**2))
    line = line / line.sum()
    window = (line[:, None] * line[None, :]).expand(channels, 1, window_size, window_size)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, window, groups=channels)

    x, y = prediction.float().clamp(-1, 1), target.float()
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    score = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return score.flatten(1).mean(1)


def code_usage(codes: torch.Tensor, num_codes: int) -> tuple[float, float]:
    """Share of the codebook in use, and perplexity (exp of the entropy in nats), over all `codes`."""
    usage, perplexity = usage_of_counts(torch.bincount(codes.flatten(), minlength=num_codes))
    return float(usage), float(perplexity)


def expected_usage(num_codes: int, num_vectors: int) -> float:
    """Share of the codebook that so many vectors show where all codes are used alike: 1 - (1 - 1/K)^N."""
    return 1.0 - (1.0 - 1.0 / num_codes) ** num_vectors


def usage_of_counts(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As [`code_usage`], float64 (...), of how often each code occurs (..., K)."""
    share = counts.double() / counts.sum(-1, keepdim=True)
    entropy = -(share * share.clamp_min(1e-30).log()).sum(-1)
    return (counts > 0).double().mean(-1), entropy.exp()


def counts_by_level(codes: torch.Tensor, num_codes: int) -> torch.Tensor:
    """How often each code occurs in codes (N, h, w), (1, K); of residual ones (N, h, w, q) on each level, (q, K)."""
    levels = codes.reshape(codes.shape[:3].numel(), -1).unbind(1)
    return torch.stack([torch.bincount(level, minlength=num_codes) for level in levels])


def level_figures(usage: torch.Tensor, perplexity: torch.Tensor) -> dict[str, float]:
    """``usage`` and ``perplexity``; of residual codes' (q,) the means, and ``usage_1``, ``perplexity_1``, ... too."""
    figures = {"usage": usage.mean().item(), "perplexity": perplexity.mean().item()}
    if usage.numel() > 1:
        figures |= {f"usage_{level}": value for level, value in enumerate(usage.tolist(), 1)}
        figures |= {f"perplexity_{level}": value for level, value in enumerate(perplexity.tolist(), 1)}
    return figures
