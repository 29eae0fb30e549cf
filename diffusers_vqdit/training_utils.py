"""What the training scripts share: reading a dataset, parameter groups, moving averages, measures.

The Accelerate loops themselves stand in full in ``training/``.
"""

import argparse
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel

from .training.checkpoints import find_checkpoint, save_checkpoint  # noqa: F401 (kept for who imports them here)
from .training.columns import check_captions  # noqa: F401
from .training.data import decode_image, decode_images, load_training_dataset, shuffled_batches, to_pixels  # noqa: F401
from .training.files import checkpoint_step, checkpoints, save_pretrained_atomically  # noqa: F401
from .utils.redaction import known_secrets, without_secrets


logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Optimization


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay for matrices only; embeddings, norms and biases have none."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    decayed, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 and id(parameter) not in embeddings else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


# ---------------------------------------------------------------------------------------------------------------------
# Trackers


def tracker_config(args: argparse.Namespace) -> dict[str, int | float | str | bool]:
    """The arguments of a run as every tracker takes them: TensorBoard refuses lists, paths and None.

    Without the Hub's token and other secrets, which others would read in the tracker.
    """
    secrets = known_secrets(args.hub_token)
    kept = {name: value for name, value in vars(args).items() if name != "hub_token"}
    return {n: v if isinstance(v, int | float) else without_secrets(str(v), secrets) for n, v in kept.items()}


@contextmanager
def averaged_weights(ema: EMAModel | None, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Give parameters their moving averages until the end of the ``with`` block; without an EMA nothing changes."""
    if ema is None:
        yield
        return
    parameters = list(parameters)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


# ---------------------------------------------------------------------------------------------------------------------
# Measures


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
    counts = torch.bincount(codes.flatten(), minlength=num_codes).double()
    probabilities = counts / counts.sum()
    entropy = -(probabilities * probabilities.clamp_min(1e-30).log()).sum()
    return float((counts > 0).double().mean()), math.exp(float(entropy))


# ---------------------------------------------------------------------------------------------------------------------
# Draws


def step_generator(seed: int, step: int, *path: int) -> torch.Generator:
    """A CPU generator that depends on (seed, step) alone, so that a resumed run draws as an unbroken one; for what all
    processes draw alike. More integers of at least 0 name one of many of the step's."""
    # Sums of them would give neighbours the same draws: row 1 of a step might have the numbers of row 0 of the next.
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step, *path)).generate_state(1)[0]))


def row_generators(seed: int, step: int, batch_size: int, *, rank: int = 0) -> list[torch.Generator]:
    """CPU generators of a process's rows, that depend on (seed, step, row of the global batch) alone: what they draw
    is the same however many processes share the batch.

    Args:
        batch_size: rows B of each process; the process `rank` has the rows `rank` B to (`rank` + 1) B - 1.
    """
    # Counted from 1: trailing zeros don't change a SeedSequence.
    return [step_generator(seed, step, rank * batch_size + row + 1) for row in range(batch_size)]


# ---------------------------------------------------------------------------------------------------------------------
# Models


def set_dropout(model: ModelMixin, dropout: float) -> None:
    """Give a loaded model another dropout rate, in all its dropout layers and in its config."""
    model.register_to_config(dropout=dropout)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside DistributedDataParallel or torch.compile."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model, keep_torch_compile=False)
